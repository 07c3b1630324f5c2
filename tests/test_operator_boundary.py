"""`torch.ops.nlhf_kernels.*` called directly: operands that a kernel would misread are refused by name.

Kernels read memory by address. So every operator call of the examples is repeated with one argument changed at a time,
and must be refused or equal the oracle.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import nlhf_kernels
from nlhf_kernels.core import capabilities, settings, tuning
from nlhf_kernels.core.calls import Calls
from nlhf_kernels.core.checks import overlap
from nlhf_kernels.core.registry import BackendUnavailable
from nlhf_kernels.ops.mixture_sample import op as op_of_the_sampler
from nlhf_kernels.ops.mixture_sample.layout import MixtureSampleInputs
from tests.support.backends import DEVICE, device_of, every_rival
from tests.test_operators import ROOMS, WITH_OPERATORS, recorded_operator_calls

OPERATOR = torch.ops.nlhf_kernels


def rearranged_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return {change: tensor} of the same shape with other memory layouts."""
    if not tensor.ndim:
        return {}
    return {
        "expanded": tensor[:1].expand(tensor.shape),
        "every second of its storage": torch.stack([tensor, tensor], -1)[..., 0],
        "transposed": tensor.transpose(0, -1).contiguous().transpose(0, -1),
    }


def changed_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return {change: tensor}: the rearranged tensors, and other dtypes and sizes, which should be refused."""
    wrong = rearranged_tensors(tensor)
    wrong |= {f"as {dtype}": tensor.to(dtype) for dtype in (torch.float16, torch.float64, torch.int32, torch.bool)}
    wrong["without dimensions"] = tensor.reshape(-1)[:1].reshape(())
    wrong["with another dimension"] = tensor[None]
    for dim in range(tensor.ndim):
        wrong[f"dimension {dim} empty"] = tensor.narrow(dim, 0, 0)
        wrong[f"dimension {dim} one shorter"] = tensor.narrow(dim, 0, max(tensor.shape[dim] - 1, 0))
    return wrong


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its strides and storage, as some operators write into their arguments."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def outcome(function: Any, arguments: list[Any]) -> Any:
    """Return the operator's result or the argument that it overwrites; None if it refuses."""
    arguments = [copied(value) if isinstance(value, torch.Tensor) else value for value in arguments]
    try:
        result = function(*arguments)
    except (ValueError, TypeError) as error:
        if str(error).partition(":")[0] not in nlhf_kernels.__all__:
            raise  # the message does not name the op
        return None
    if result is not None:
        return result
    (overwritten,) = (i for i, argument in enumerate(function._schema.arguments) if argument.alias_info is not None)
    return arguments[overwritten]


def assert_refused_or_right(function: Any, call: list[Any], backend: str, what: str) -> None:
    try:
        got = outcome(function, [*call, backend])
    except BackendUnavailable:
        return
    expected = outcome(function, [*call, "torch"])
    assert (expected is None) == (got is None), what
    if got is not None:
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-2, atol=1e-2, msg=what)


def examples(op: str, device: torch.device) -> list[tuple[str, Any, Any]]:
    """Return (public function, args, kwargs) of every example."""
    own = [(op, *make(device)) for make in importlib.import_module(f"tests.test_{op}").EXAMPLES]
    return [*own, ("linear_nash_pg_loss", *_linear_nash(device))] if op == "nash_pg_loss" else own


def _linear_nash(device: torch.device) -> tuple[Any, Any]:
    """Return a linear_nash_pg_loss call with packed sequences and given reference log-probabilities."""
    hidden = torch.randn(5, 4, device=device, requires_grad=True)
    weight = torch.randn(7, 4, device=device, requires_grad=True)
    arguments = hidden, weight, torch.tensor([1, 6, -100, 0, 3], device=device), torch.tensor([0.2, 0.9], device=device)
    given = -torch.rand(5, device=device)
    return arguments, {"tau": 0.1, "reference_logprobs": given, "cu_seqlens": torch.tensor([0, 3, 5])}


@every_rival
@pytest.mark.parametrize("op", WITH_OPERATORS)
def test_a_changed_operand_is_refused_or_read_right(op, backend) -> None:
    reasons: list[str] = []
    few = backend == "triton" and settings.triton_interpret  # slow; refusals do not depend on the backend
    changes = rearranged_tensors if few else changed_tensors
    for public, args, kwargs in examples(op, device_of(backend))[: 1 if few else None]:
        reasons = nlhf_kernels.explain(op, *args, **kwargs).reasons[backend]
        calls = [] if reasons else recorded_operator_calls(public, args, kwargs)
        for function, (*operands, _) in calls:
            for index, operand in enumerate(operands):
                if function is OPERATOR.scaled_gradient.default:
                    continue  # implemented by PyTorch operations alone
                models = operand if isinstance(operand, list) else [operand]
                for place, part in enumerate(models):
                    for what, changed in (changes(part) if isinstance(part, torch.Tensor) else {}).items():
                        new = [*models[:place], changed, *models[place + 1 :]] if models is operand else changed
                        call = [*operands[:index], new, *operands[index + 1 :]]
                        assert_refused_or_right(function, call, backend, f"{function}: argument {index} {what}")
    if reasons:
        pytest.skip("; ".join(reasons))


ROWS, VOCABULARY = 3, 50


def sampler_call(**changes: Any) -> list[Any]:
    logits = torch.randn(ROWS, VOCABULARY)
    call = {
        "logits": [logits, logits + 1],
        "settings": torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.7, 0.3]]),
        "filtered": False,
        "bias": None,
        "uniforms": torch.full((ROWS,), 0.5, dtype=torch.float64),
        "seed": torch.tensor(1),
        "row_ids": torch.arange(ROWS),
        "step": torch.tensor(2),
        "stream": 0,
        "logprob_mask": 7,
        "backend": "",
    }
    return list({**call, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": []}, "logits: expected 1 to 4 models; got 0"),
        ({"logits": [torch.randn(ROWS, VOCABULARY)] * 64, "settings": torch.ones(1, 68)}, "1 to 4 models; got 64"),
        ({"logits": [torch.randn(ROWS, 0)] * 2}, "logits: expected .rows, vocabulary., at least one token"),
        (
            {"settings": torch.ones(1, 6, dtype=torch.float16)},
            r"settings: expected float32 \(1, 6\) on cpu; got float16",
        ),
        ({"settings": torch.ones(1, 6).expand(ROWS, 6)}, "settings: expected neighbouring elements"),
        ({"settings": torch.ones(ROWS, 8)[:, :6]}, "settings: expected neighbouring elements"),
        (
            {"uniforms": None, "row_ids": torch.empty(0, dtype=torch.int64)},
            r"row_ids: expected shape \(rows\) with rows=3; got \(0,\)",
        ),
        ({"uniforms": None, "stream": 256}, "stream: expected an integer in .0, 255.; got 256"),
        ({"logprob_mask": 8}, "logprob_mask: expected an integer in .0, 7.; got 8"),
        ({"uniforms": None, "seed": None}, "seed, row_ids, step: expected all three, or uniforms"),
        (
            {"uniforms": None, "row_ids": torch.arange(2 * ROWS)[::2]},
            "row_ids: expected neighbouring elements",
        ),
    ],
)
def test_the_sampler_refuses(changes, message) -> None:
    with pytest.raises(ValueError, match=f"mixture_sample: .*{message}"):
        OPERATOR.mixture_sample(*sampler_call(**changes))


SAME_SHAPE_BUT_BAD = [
    ({"settings": torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.7, 0.3]]).half()}, "settings: expected float32"),
    ({"settings": torch.ones(1, 8)[:, :6].expand(ROWS, 6)}, "settings: expected neighbouring elements"),
    ({"logits": [torch.randn(VOCABULARY, ROWS).T] * 2}, "logits: expected neighbouring elements"),
    ({"logits": [torch.randn(ROWS, VOCABULARY), torch.randn(ROWS, VOCABULARY).double()]}, "logits: expected float32"),
    ({"logits": [torch.randn(ROWS, VOCABULARY)]}, "settings: expected float32 .1, 5."),
    ({"uniforms": torch.full((ROWS,), 0.5)}, "uniforms: expected float64"),
    ({"uniforms": torch.full((2 * ROWS,), 0.5, dtype=torch.float64)[::2]}, "uniforms: expected neighbouring elements"),
    ({"bias": torch.zeros(VOCABULARY, dtype=torch.float64)}, "bias: expected float32"),
    ({"stream": 256}, "stream: expected an integer in .0, 255.; got 256"),
    ({"logprob_mask": 8}, "logprob_mask: expected an integer in .0, 7.; got 8"),
]


@pytest.mark.parametrize(("change", "message"), SAME_SHAPE_BUT_BAD)
def test_a_bad_call_after_good_ones_is_refused(change, message) -> None:
    """A signature that has passed the checks vouches for itself only, in the operator and past the dispatcher."""
    call = op_of_the_sampler._operator
    for _ in range(2):
        good = call(MixtureSampleInputs(*sampler_call()))
        assert good[2].all()
    bad = sampler_call(**change)
    for function in (lambda: OPERATOR.mixture_sample(*bad), lambda: call(MixtureSampleInputs(*bad))):
        with pytest.raises((ValueError, TypeError), match=f"mixture_sample: .*{message}"):
            function()


def test_a_known_signature_is_not_checked_again_and_follows_the_backend(monkeypatch) -> None:
    checked = []
    check = op_of_the_sampler._check_operands
    calls = Calls(op_of_the_sampler.OP, MixtureSampleInputs, lambda inputs: (checked.append(1), check(inputs))[1])
    inputs = MixtureSampleInputs(*sampler_call())
    assert calls.run_known(inputs) is NotImplemented
    for _ in range(3):
        calls.run(inputs)
    assert len(checked) == 1 and calls.run_known(inputs) is not NotImplemented
    with nlhf_kernels.use_backend("cuda"), pytest.raises(BackendUnavailable):
        calls.run(inputs)
    assert calls.run_known(inputs._replace(filtered=1)) is NotImplemented, "1 is equal to True and no bool"
    with tuning.record_launches():
        assert calls.run_known(inputs) is NotImplemented, "a launch that is recorded asks for its plan"


def test_what_only_the_dispatcher_does_is_left_to_it() -> None:
    """Signs that wait in the dispatcher, gradients, profilers: such calls do not go past it."""
    inputs = MixtureSampleInputs(*sampler_call())
    sample = op_of_the_sampler._operator
    expected = sample(inputs)[0]
    negative = [torch._neg_view(-model) for model in inputs.logits]
    assert torch.equal(sample(inputs._replace(logits=negative))[0], expected)
    wanting = [model.clone().requires_grad_() for model in inputs.logits]
    assert op_of_the_sampler._calls.run_known(inputs._replace(logits=wanting)) is NotImplemented
    with torch.profiler.profile() as profile:
        sample(inputs)
    assert "nlhf_kernels::mixture_sample" in {event.key for event in profile.key_averages()}


def test_settings_of_ones_own_are_read_right_or_refused() -> None:
    logits = torch.randn(2, ROWS, VOCABULARY)
    options = {"seed": 1, "row_ids": torch.arange(ROWS), "step": 2}
    packed = nlhf_kernels.mixture_settings([0.7, 0.3], device=logits.device, top_k=3).packed
    expected = nlhf_kernels.mixture_sample(*logits, 0.3, **options, top_k=3)
    wider = torch.cat([packed.expand(ROWS, 6), torch.full((ROWS, 2), torch.nan)], 1)
    for own in (packed.expand(ROWS, 6), wider[:, :6], packed.double().float()):
        tokens = nlhf_kernels.mixture_sample(
            *logits, settings=nlhf_kernels.MixtureSettings(own, True), **options
        ).tokens
        assert torch.equal(tokens, expected.tokens)
    for own, error in ((packed.half(), TypeError), (packed[0], ValueError), (packed[:, :5], ValueError)):
        with pytest.raises(error, match="mixture_sample: settings"):
            nlhf_kernels.mixture_sample(*logits, settings=nlhf_kernels.MixtureSettings(own, True), **options)
    with pytest.raises(TypeError, match="mixture_sample: settings: expected MixtureSettings; got Tensor"):
        nlhf_kernels.mixture_sample(*logits, settings=packed, **options)


def test_decode_attention_refuses_ends_of_no_row_and_a_window_of_nothing() -> None:
    query, cache, ends = torch.randn(2, 4, 8), torch.randn(2, 2, 5, 8), torch.tensor([5, 2])
    call = lambda ends, window: OPERATOR.decode_attention(query, cache, cache, None, ends, 1.0, window, 0.0, None, "")  # noqa: E731
    assert call(ends, 1).shape == query.shape
    with pytest.raises(ValueError, match=r"decode_attention: ends: expected shape \(rows\) with rows=2; got \(0,\)"):
        call(ends[:0], 1)
    with pytest.raises(ValueError, match=r"decode_attention: window: expected an integer in"):
        call(ends, -(2**63))


def test_mirror_descent_refuses_an_opponent_that_is_not_there() -> None:
    game = torch.zeros(1, 3), torch.full((1, 3, 3), 0.5), torch.zeros(1, 3), torch.tensor(0.1), torch.tensor([0.1])
    with pytest.raises(ValueError, match="mirror_descent: log_opponent: expected with the opponent 'fixed'"):
        OPERATOR.mirror_descent(*game, "fixed", None, "")


#: temperature, then scale and softcap of the policy and of the reference
SETTINGS = (1.0, 1.0, 0.0, 1.0, 0.0)


def test_logprobs_refuses_what_needs_a_reference_that_is_not_there() -> None:
    policy, targets = torch.randn(2, 5), torch.tensor([1, 2])
    for extras, reference in ((2, None), (4, None), (4, policy)):
        with pytest.raises(ValueError, match=r"logprobs: extras: .* need"):
            OPERATOR.logprobs(policy, reference, targets, None, *SETTINGS, extras, "")


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("op", ROOMS)
@pytest.mark.parametrize("default_dtype", [torch.float64, torch.float16, torch.bfloat16], indirect=True)
def test_the_default_dtype_changes_nothing(op, backend, default_dtype) -> None:
    torch.set_default_dtype(torch.float32)
    for public, args, kwargs in examples(op, DEVICE):
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
        results = []
        for dtype in (torch.float32, default_dtype):
            torch.set_default_dtype(dtype)
            with nlhf_kernels.use_backend(backend):
                outputs = tree_leaves(getattr(nlhf_kernels, public)(*args, **kwargs))
            sums = [out.double().sum() for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
            gradients = torch.autograd.grad(sum(sums), leaves) if sums else ()
            results.append([*outputs, *gradients])
        for one, other in zip(*results, strict=True):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype
                torch.testing.assert_close(other, one, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_the_modules_bound_what_they_index(name) -> None:
    """The native modules refuse sizes out of bounds before they read any address."""
    if reason := capabilities.native_missing(name):
        pytest.skip(reason)
    module, last = capabilities.native(name), (1,) if name == "_cpu" else (0,)  # threads; a stream
    at = 64  # an invalid address
    model = (at, 0, 5)
    sampler = {
        "models": (model, model), "settings": at, "settings_stride": 0, "filtered": False, "bias": 0, "bias_stride": 0,
        "uniforms": at, "seed": 0, "seed_stride": 0, "row_ids": 0, "step": 0, "step_stride": 0, "stream": 0,
        "rows": 1, "vocabulary": 5, "wanted": 7, "tokens": at, "logprobs": at, "ok": at,
    }  # fmt: skip
    workspace = () if name == "_cpu" else (at, at)
    for change, message in (
        ({"models": (model,) * 64}, "models: expected 1 to 4"),
        ({"models": ()}, "models: expected 1 to 4"),
        ({"models": (model, (at, 3, 5))}, "dtype: expected"),
        ({"settings_stride": 5}, "settings_stride: expected 0 or 4"),
        ({"settings": 0}, "expected addresses"),
        ({"uniforms": 0}, "expected addresses, or uniforms"),
        ({"vocabulary": 0}, "vocabulary: expected"),
    ):
        with pytest.raises(ValueError, match=f"mixture_sample: .*{message}"):
            module.mixture_sample(*{**sampler, **change}.values(), *workspace, *last)
    with pytest.raises(ValueError, match="row_uniforms: rows: expected"):
        module.row_uniforms(at, 0, at, at, 0, 0, -1, at, *last)
    with pytest.raises(ValueError, match="mirror_descent: opponent: expected"):
        module.mirror_descent(False, at, at, at, at, 0, at, 1, 2, 3, 7, 0, at, *last)
    with pytest.raises(ValueError, match="mirror_descent: log_opponent: expected"):
        module.mirror_descent(True, at, at, at, at, 0, at, 1, 2, 3, 2, 0, at, *last)
    if name == "_cpu":
        scored, nothing = (at, 0, 5, 1.0, 0.0), (0, 0, 0, 1.0, 0.0)
        with pytest.raises(ValueError, match="logprobs: output_mask: KL and mixture need"):
            module.logprobs(scored, nothing, at, 0, 0, 1.0, 2, 1, 5, at, at, 1)
        sizes = (1, 3, 2, 4, 8, 8, 1)
        with pytest.raises(ValueError, match="decode_attention: heads: expected a multiple"):
            module.decode_attention(0, (at, at, at), (0, 0, 8), (0, 0, 8), 0, at, 0, sizes, 1.0, 0.0, at, 1)


def _stored(strides: tuple[int, int], offset: int = 0) -> torch.Tensor:
    return STORAGE.as_strided((3, 4), strides, offset)


STORAGE = torch.zeros(80)


@pytest.mark.parametrize(
    ("policy", "reference", "shared"),
    [
        (_stored((4, 1)), _stored((4, 1)), True),
        (_stored((4, 1)), _stored((4, 1), 8), True),  # overlaps by rows
        (_stored((4, 1), 8), _stored((4, 1)), True),
        (_stored((4, 1)), _stored((4, 1), 12), False),  # one after the other
        (_stored((8, 1)), _stored((8, 1), 4), False),  # side by side in each row
        (_stored((8, 1), 4), _stored((8, 1)), False),
        (_stored((8, 1)), _stored((8, 1), 3), True),
        (_stored((8, 1)), _stored((8, 1), 5), True),  # reaches into the next row
        (_stored((9, 1)), _stored((9, 1), 5), False),
        (_stored((8, 1)), _stored((8, 1), 8), True),
        (_stored((8, 1)), _stored((8, 1), 24), False),
        (_stored((5, 1)), _stored((0, 1), 12), True),
        (_stored((4, 1)), _stored((4, 1)).clone(), False),
        (_stored((4, 1))[:1], _stored((4, 1))[1:2], False),
        (_stored((4, 1))[:0], _stored((4, 1)), False),
    ],
)
def test_overlap(policy, reference, shared) -> None:
    assert overlap(policy, reference) is shared and overlap(reference, policy) is shared


def test_logits_that_the_reference_shares_are_not_overwritten() -> None:
    """Logits shared with the reference are not overwritten by the gradient (which made it wrong by 0.1)."""
    both = torch.randn(5, 7, requires_grad=True) * 1
    policy, reference, targets = both[:4], both.detach()[1:], torch.tensor([1, 2, 3, 4])
    for options in ({"kl": True}, {"beta": 0.5}, {}):
        with pytest.raises(
            ValueError, match="logprobs: overwrite_logits: expected reference logits in memory of their"
        ):
            nlhf_kernels.logprobs(policy, targets, reference, overwrite_logits=True, **options)
    saved = torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="logprobs: overwrite_logits: expected reference logits in memory of their"):
        OPERATOR.logprobs_backward_(*saved, policy.detach(), reference, targets, None, *SETTINGS, 2, "")
    with pytest.raises(ValueError, match="logprobs: policy: expected rows that share no memory"):
        OPERATOR.logprobs_backward_(*saved, both.detach()[:1].expand(4, 7), None, targets, None, *SETTINGS, 0, "")
