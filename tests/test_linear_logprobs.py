"""linear_logprobs: against fully stored logits in float64; heads of every kind; independence from chunking."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch

import nlhf_kernels
from nlhf_kernels import Head
from nlhf_kernels.ops.linear_logprobs import chunks, products
from nlhf_kernels.ops.linear_logprobs.oracle import linear_logprobs as oracle
from nlhf_kernels.ops.logprobs.layout import Extra, Output
from tests.support.backends import DEVICE, call, device_of, every_backend
from tests.support.poison import poisoned_allocations
from tests.support.tolerances import assert_accurate

EVERYTHING = Extra.ENTROPY | Extra.KL | Extra.MIXTURE
ORDER = [Output.POLICY, Output.ENTROPY, Output.KL, Output.MIXTURE, Output.REFERENCE]


def problem(rows=13, hidden=24, vocabulary=301, dtype=torch.float32, device=DEVICE, other_hidden=None):
    """Return the policy's hidden states and weight, targets, the reference's two, beta; one row in three is ignored."""
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(device, dtype)

    other_hidden = other_hidden or hidden
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[2::3] = -100
    beta = torch.rand(rows, generator=generator).to(device)
    policy = normal(rows, hidden), normal(vocabulary, hidden, scale=0.5)
    reference = normal(rows, other_hidden), normal(vocabulary, other_hidden, scale=0.5)
    return *policy, targets.to(device), *reference, beta


def _example(**settings):
    def make(device):
        hidden, weight, targets, reference_hidden, reference_weight, beta = problem(5, 8, 37, device=device)
        beta = beta if settings.get("kl") else None
        args = (hidden.requires_grad_(), Head(weight.requires_grad_()), targets, reference_hidden, reference_weight)
        return args, {"beta": beta, "chunk_bytes": 37 * 4 * 4, **settings}

    return make


EXAMPLES = [_example(), _example(kl=True, entropy=True, temperature=0.7)]


def values_of(result) -> torch.Tensor:
    return torch.stack([result.policy, result.entropy, result.kl, result.mixture, result.reference])


def upstream_like(values: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return weights.to(values)


def assert_right(backend, inputs, head=None, reference_head=None, chunk_rows=4, temperature=1.0, **kwargs) -> None:
    """Compare values and all three gradients with float64, relative to PyTorch's error at the inputs' dtype."""
    hidden, weight, targets, reference_hidden, reference_weight, beta = inputs
    head, reference_head = head or Head(weight), reference_head or Head(reference_weight)

    def run(function, dtype):
        def cast(tensor):
            return None if tensor is None else tensor.detach().to(dtype)

        leaves = [leaf if leaf is None else cast(leaf).requires_grad_() for leaf in (hidden, head.weight, head.bias)]
        ours = head._replace(weight=leaves[1], bias=leaves[2])
        theirs = reference_head._replace(weight=cast(reference_head.weight), bias=cast(reference_head.bias))
        values = function(leaves[0], ours, cast(reference_hidden), theirs, beta.to(dtype))
        asked = [leaf for leaf in leaves if leaf is not None]
        return values.detach(), torch.autograd.grad(values, asked, upstream_like(values))

    def plain(hidden, head, reference_hidden, reference_head, beta):
        real = torch.promote_types(hidden.dtype, torch.float32)
        options = {"beta": beta.to(real), "temperature": temperature, "extras": EVERYTHING}
        return oracle(hidden, head, targets, reference_hidden, reference_head, **options)[ORDER]

    def ours(hidden, head, reference_hidden, reference_head, beta):
        options = {"beta": beta.float(), "temperature": temperature, "entropy": True, "kl": True, **kwargs}
        chunk = chunk_rows * 2 * weight.shape[0] * hidden.element_size()
        return values_of(
            call(
                "linear_logprobs",
                backend,
                hidden,
                head,
                targets,
                reference_hidden,
                reference_head,
                chunk_bytes=chunk,
                **options,
            )
        )

    truth, true_gradients = run(plain, torch.float64)
    pytorch, pytorch_gradients = run(plain, hidden.dtype)
    values, gradients = run(ours, hidden.dtype)
    assert_accurate(values, truth, pytorch)
    for gradient, true, of_pytorch in zip(gradients, true_gradients, pytorch_gradients, strict=True):
        assert_accurate(gradient, true, of_pytorch)
    assert (gradients[0][targets == -100] == 0).all()


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_values_and_gradients(backend, dtype, chunk_rows) -> None:
    assert_right(backend, problem(dtype=dtype, device=device_of(backend)), chunk_rows=chunk_rows, temperature=0.8)


@every_backend
def test_bias_scale_and_soft_capping(backend) -> None:
    """Policy and reference heads each apply their own transform, as in Gemma 2, Granite and Cohere."""
    inputs = problem(device=device_of(backend), other_hidden=16)
    bias = torch.linspace(-2, 2, 301, device=inputs[0].device)
    assert_right(backend, inputs, Head(inputs[1], bias, 0.25, 5.0), Head(inputs[4], bias.flip(0), 1.5, 0.0))
    assert_right(backend, inputs, Head(inputs[1], None, 2.0), Head(inputs[4], None, 1.0, 3.0))


@every_backend
def test_a_shared_head_gives_the_same_from_one_product(backend) -> None:
    inputs = problem(device=device_of(backend))
    assert_right(backend, inputs, Head(inputs[1]), Head(inputs[1]))


def test_products_of_a_shared_head_are_stacked() -> None:
    hidden, weight, targets, reference_hidden, reference_weight, _ = problem(rows=8, device=torch.device("cpu"))

    def products_of(head: torch.Tensor) -> int:
        with mock.patch.object(chunks, "logits_into", wraps=products.logits_into) as made:
            nlhf_kernels.linear_logprobs(hidden, weight, targets, reference_hidden, head, kl=True)
        return made.call_count

    assert products_of(weight) == 1 and products_of(reference_weight) == 2


def test_the_policy_alone() -> None:
    hidden, weight, targets, *_ = problem()
    result = nlhf_kernels.linear_logprobs(hidden, weight, targets, entropy=True)
    assert result.reference is result.kl is result.mixture is None
    expected = oracle(hidden.double(), Head(weight.double()), targets, extras=Extra.ENTROPY)
    assert_accurate(result.policy, expected[0], expected[0].float(), constant=8)
    assert_accurate(result.entropy, expected[2], expected[2].float(), constant=8)


@pytest.mark.parametrize("asking", [(True, False), (False, True)])
def test_frozen_inputs_pay_nothing(asking) -> None:
    """Frozen heads and frozen hidden states cost neither a gradient product nor an accumulator."""
    hidden, weight, targets, *_ = problem()
    targets = targets.clamp(min=0)
    hidden.requires_grad_(asking[0])
    weight.requires_grad_(asking[1])
    total = nlhf_kernels.linear_logprobs(hidden, weight, targets, chunk_bytes=4 * 301 * 4).policy.sum()
    with (
        mock.patch.object(chunks, "add_weight_gradient", wraps=products.add_weight_gradient) as of_weight,
        mock.patch.object(torch, "mm", wraps=torch.mm) as mm,
    ):
        total.backward()
    chunk_count = 4  # of 13 rows, 4 at a time
    assert of_weight.call_count == chunk_count * asking[1]
    assert mm.call_count == chunk_count * (1 + asking[0]), "the logits again, and the gradient of hidden states"
    assert (hidden.grad is not None, weight.grad is not None) == asking


def test_rows_that_are_not_scored_are_not_multiplied_on_the_cpu() -> None:
    """Rows with ignored targets, often two thirds of a batch, take no part in the head's products."""
    hidden, weight, targets, reference_hidden, _, _ = problem(rows=12, device=torch.device("cpu"))
    targets[:8] = -100
    hidden[:8] = reference_hidden[:8] = torch.nan
    with mock.patch.object(chunks, "logits_into", wraps=products.logits_into) as made:
        result = nlhf_kernels.linear_logprobs(hidden, weight, targets, reference_hidden, weight, kl=True, chunk_bytes=1)
    assert made.call_count == int((targets != -100).sum())
    assert (result.kl[targets == -100] == 0).all() and result.kl.isfinite().all()


def test_nothing_recorded_without_gradients() -> None:
    hidden, weight, targets, *_ = problem()
    assert nlhf_kernels.linear_logprobs(hidden, weight, targets).policy.grad_fn is None


def test_the_logits_are_never_stored_whole() -> None:
    hidden, weight, targets, reference_hidden, reference_weight, _ = problem(rows=64, vocabulary=500)
    hidden.requires_grad_()
    weight.requires_grad_()
    with poisoned_allocations() as handed_out:
        result = nlhf_kernels.linear_logprobs(
            hidden, weight, targets, reference_hidden, reference_weight, kl=True, chunk_bytes=8 * 500 * 4
        )
        (result.policy + result.kl).sum().backward()
    assert max(handed_out) <= 500 * 24, "no buffer beyond a chunk of logits or the weight's gradient"
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_the_heads_gradient_does_not_drift_over_many_chunks() -> None:
    """512 equal chunks are summed in float32; a bfloat16 sum would stall once it outgrows the summands."""
    hidden = torch.ones(512, 8, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(64, 8, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    nlhf_kernels.linear_logprobs(hidden, weight, targets, chunk_bytes=64 * 2).policy.sum().backward()
    expected = torch.full((64, 8), -512 / 64, device=DEVICE)
    expected[0] += 512
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-2, atol=0)


def test_sequences_keep_their_shape() -> None:
    hidden, weight, targets, *_ = problem(rows=12)
    flat = nlhf_kernels.linear_logprobs(hidden, weight, targets).policy
    folded = nlhf_kernels.linear_logprobs(hidden.view(3, 4, -1), weight, targets.view(3, 4)).policy
    assert torch.equal(folded, flat.view(3, 4))


def test_transposed_and_sliced_inputs() -> None:
    hidden, weight, targets, *_ = problem(rows=12)
    expected = nlhf_kernels.linear_logprobs(hidden, weight, targets)
    by_columns = nlhf_kernels.linear_logprobs(hidden.t().contiguous().t(), weight.t().contiguous().t(), targets)
    wide = torch.nn.functional.pad(hidden, (3, 5), value=torch.nan)[:, 3:-5]
    sliced = nlhf_kernels.linear_logprobs(wide, weight, targets)
    torch.testing.assert_close(by_columns.policy, expected.policy)
    torch.testing.assert_close(sliced.policy, expected.policy)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_mixed_dtypes(weight_dtype) -> None:
    """Products use autocast's dtype or the hidden states'; each gradient has its input's dtype."""
    hidden, weight, targets, *_ = problem()
    leaves = hidden.requires_grad_(), weight.to(weight_dtype).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        result = nlhf_kernels.linear_logprobs(*leaves, targets).policy
    gradients = torch.autograd.grad(result.sum(), leaves)
    small = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = nlhf_kernels.linear_logprobs(*small, targets).policy
    assert torch.equal(result, expected) and result.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.float32, weight_dtype]
    by_hand = torch.autograd.grad(expected.sum(), small)
    for gradient, other in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(gradient.bfloat16(), other)
    mixed = nlhf_kernels.linear_logprobs(hidden.detach().bfloat16(), leaves[1], targets).policy
    assert torch.equal(mixed, expected)


def test_one_input_used_twice_backward_twice_and_checkpointing() -> None:
    hidden, weight, targets, *_ = problem()
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def scored(hidden, weight):
        result = nlhf_kernels.linear_logprobs(hidden, weight, targets, hidden.detach(), kl=True, chunk_bytes=5000)
        return (result.policy * 0.5 + result.kl).sum()

    once = torch.autograd.grad(scored(*leaves), leaves)
    total = scored(*leaves) + 2 * scored(*leaves)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    checkpointed = torch.utils.checkpoint.checkpoint(scored, *leaves, use_reentrant=False)
    again = torch.autograd.grad(checkpointed, leaves)
    for one, two, three, recomputed in zip(once, first, second, again, strict=True):
        torch.testing.assert_close(two, 3 * one)
        assert torch.equal(two, three) and torch.equal(recomputed, one)


def test_a_tied_head_takes_both_gradients() -> None:
    """If the head is the embedding, its gradient sums both uses."""
    table = torch.randn(50, 8, device=DEVICE, requires_grad=True)
    tokens = torch.arange(10, device=DEVICE)

    def loss(score):
        return score(torch.nn.functional.embedding(tokens, table))

    fused = loss(lambda hidden: nlhf_kernels.linear_logprobs(hidden, table, tokens).policy.sum())
    plain = loss(lambda hidden: (hidden @ table.t()).log_softmax(-1).gather(1, tokens[:, None]).sum())
    torch.testing.assert_close(*(torch.autograd.grad(total, table)[0] for total in (fused, plain)))


def test_no_rows() -> None:
    hidden, weight, targets, reference_hidden, reference_weight, _ = problem(rows=0)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = nlhf_kernels.linear_logprobs(*leaves, targets, reference_hidden, reference_weight)
    assert result.policy.shape == (0,)
    assert (torch.autograd.grad(result.policy.sum(), leaves)[1] == 0).all()


@pytest.mark.parametrize(
    ("hidden_size", "compares", "free_gib", "expected_mib"),
    [
        (4096, False, 80, 2048),
        (4096, False, 16, 2048),
        (4096, False, 15.9, 1024),
        (4096, False, 4, 512),
        (4096, False, 0.1, 512),
        (4096, True, 32, 4096),
        (4096, True, 31.9, 2048),
        (896, False, 80, 1024),
        (896, False, 7, 512),
        (896, True, 80, 2048),
        (896, True, 7, 512),
    ],
)
def test_chunks_grow_with_the_free_memory_of_a_gpu(hidden_size, compares, free_gib, expected_mib, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "free_bytes", lambda device: int(free_gib * 2**30))
    capturing = False
    monkeypatch.setattr(chunks, "is_capturing", lambda device: capturing)
    device = torch.device("cuda", 0)
    assert chunks.choose_chunk_bytes(device, hidden_size, compares) == expected_mib << 20
    capturing = True
    assert chunks.choose_chunk_bytes(device, hidden_size, compares) == 512 << 20
    assert chunks.choose_chunk_bytes(torch.device("cpu"), hidden_size, compares) == 64 << 20


@pytest.mark.parametrize(("hidden_size", "vocabulary"), [(896, 151_936), (4096, 128_256)])
def test_chunks_of_both_models_have_the_rows_of_one(hidden_size, vocabulary, monkeypatch) -> None:
    """Every chunk reads and writes the head's float32 gradient: more chunks for the exact KL would be more of that."""
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 80 << 30)
    monkeypatch.setattr(chunks, "is_capturing", lambda device: False)
    device = torch.device("cuda", 0)
    alone, both = (
        chunks.chunk_rows(8192, vocabulary, 2, compares, chunks.choose_chunk_bytes(device, hidden_size, compares))
        for compares in (False, True)
    )
    assert alone == both


def test_the_operator_chooses_its_chunks_where_none_are_asked_for(monkeypatch) -> None:
    """The operator chooses the chunk size, so compiled graphs contain none; an explicit chunk_bytes is kept."""
    operator = importlib.import_module("nlhf_kernels.ops.linear_logprobs.op")
    asked = []

    def choose(device, hidden_size, compares):
        asked.append((device.type, hidden_size, compares))
        return 400

    monkeypatch.setattr(operator, "choose_chunk_bytes", choose)
    hidden, weight = torch.randn(6, 5), torch.randn(50, 5)
    targets = torch.arange(6)
    with mock.patch.object(chunks, "logits_into", wraps=products.logits_into) as product:
        chosen = nlhf_kernels.linear_logprobs(hidden, weight, targets)
        assert asked == [("cpu", 5, False)] and product.call_count == 3, "two rows of 50 float32 a chunk"
        given = nlhf_kernels.linear_logprobs(hidden, weight, targets, chunk_bytes=1200)
        assert len(asked) == 1 and product.call_count == 4
        nlhf_kernels.linear_logprobs(hidden, weight, targets, hidden, kl=True)
        assert asked[1:] == [("cpu", 5, True)]
    torch.testing.assert_close(chosen.policy, given.policy)


HIDDEN, WEIGHT, TARGETS, REFERENCE_HIDDEN, REFERENCE_WEIGHT, _ = problem(3, 4, 8, device=torch.device("cpu"))
BAD = {
    r"hidden: expected shape": ((HIDDEN[0], WEIGHT, TARGETS), {}),
    r"head: expected a Head or its weight": ((HIDDEN, "weight", TARGETS), {}),
    r"head.weight: expected shape \(vocabulary, hidden\) with vocabulary=4, hidden=4; got \(4, 8\)": (
        (HIDDEN, WEIGHT.t(), TARGETS),
        {},
    ),
    r"head.bias: expected shape \(vocabulary\)": ((HIDDEN, Head(WEIGHT, torch.zeros(7)), TARGETS), {}),
    r"head.scale: expected a finite number": ((HIDDEN, Head(WEIGHT, None, 0.0), TARGETS), {}),
    r"head.softcap: expected a finite number": ((HIDDEN, Head(WEIGHT, None, 1.0, -1.0), TARGETS), {}),
    r"reference_head.weight: expected shape .*vocabulary=8.*got \(7, 4\)": (
        (HIDDEN, WEIGHT, TARGETS, REFERENCE_HIDDEN, REFERENCE_WEIGHT[:7]),
        {},
    ),
    "reference_head.weight: expected a constant": (
        (HIDDEN, WEIGHT, TARGETS, REFERENCE_HIDDEN, REFERENCE_WEIGHT.clone().requires_grad_()),
        {},
    ),
    "reference_head.bias: expected a constant": (
        (HIDDEN, WEIGHT, TARGETS, REFERENCE_HIDDEN, Head(REFERENCE_WEIGHT, torch.zeros(8, requires_grad=True))),
        {},
    ),
    "reference_hidden: expected a constant": ((HIDDEN, WEIGHT, TARGETS, REFERENCE_HIDDEN.clone().requires_grad_()), {}),
    "reference_head: expected with reference_hidden": ((HIDDEN, WEIGHT, TARGETS, None, REFERENCE_WEIGHT), {}),
    "kl: expected only with reference_hidden": ((HIDDEN, WEIGHT, TARGETS), {"kl": True}),
    r"targets: expected token ids in \[0, 8\) or -100; got 9": ((HIDDEN, WEIGHT, torch.tensor([1, 9, 0])), {}),
    "chunk_bytes: expected an integer": ((HIDDEN, WEIGHT, TARGETS), {"chunk_bytes": 0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message) -> None:
    args, kwargs = BAD[message]
    with pytest.raises((ValueError, TypeError), match="^linear_logprobs: " + message):
        nlhf_kernels.linear_logprobs(*args, **kwargs)
