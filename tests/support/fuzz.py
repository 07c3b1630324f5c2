"""Random calls of the public ops with shapes, dtypes, layouts and values from a fixed seed, and checks of the results.

A case is an op's name and a number. `check("logprobs", 17)` rebuilds the call of that number and runs it on every
backend that can. Results are compared element by element with the oracle in float64, relative to PyTorch's own error in
float32; if the values overflow float32, only shapes, dtypes and ranges are checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import nlhf_kernels
from nlhf_kernels.core.settings import BACKENDS
from nlhf_kernels.ops.decode_attention import oracle as attention
from nlhf_kernels.ops.decode_attention.op import DecodeAttentionInputs
from tests.support import mixture
from tests.support.backends import DEVICE
from tests.support.tolerances import CONSTANT

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INTERPRETED_ELEMENTS = 2000  # of a call in Triton's interpreter, which takes milliseconds per instruction
KINDS = ("normal", "normal", "flat", "huge", "tiny", "masked", "nan", "inf", "empty rows", "extreme")
EXTREME = "extreme"  # overflows float32 in any order of operations


class Case(NamedTuple):
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    judge: Callable[[Any, Any, Any], None]  # of the result, the oracle's in float64, the oracle's on the same tensors
    differentiable: bool = False
    elements: int = 0
    truth: Callable[[], Any] | None = None  # in float64, if the op itself does not accept float64


def check(op: str, number: int, candidates: Sequence[str] = BACKENDS) -> list[str]:
    """Run a case on every backend of `candidates` that can run it, and return their names."""
    case = BUILDERS[op](Draw(op, number))
    outcome = run(case, "torch")
    truth = case.truth() if case.truth else run(in_float64(case), "torch")
    backends = []
    for backend in candidates:
        interpreted = backend == "triton" and not torch.cuda.is_available()
        if interpreted and (case.elements > INTERPRETED_ELEMENTS or number % 8):
            continue
        if nlhf_kernels.explain(op, *case.args, **case.kwargs).reasons[backend]:
            continue
        backends.append(backend)
        try:
            result = run(case, backend)
            assert isinstance(result, Exception) == isinstance(outcome, Exception), (result, outcome)
            if isinstance(outcome, Exception):
                assert type(result) is type(outcome), f"raised {result!r}, the oracle {outcome!r}"
            else:
                case.judge(result, truth, outcome)
        except AssertionError as error:
            call = f"tests.support.fuzz.check({op!r}, {number}) on {backend}"
            raise AssertionError(f"{call}: {error}\n{describe(case)}") from error
    return backends


def run(case: Case, backend: str) -> Any:
    """Call the op, and its backward where the case has one; return the outputs or the ValueError that it raised."""
    leaves = [x.detach().clone().requires_grad_() if is_leaf(case, x) else x for x in case.args]
    try:
        outputs = getattr(nlhf_kernels, case.op)(*leaves, **case.kwargs, backend=backend)
    except ValueError as error:
        return error
    if not case.differentiable:
        return outputs
    values = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
    total = sum((x.double() * torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape)).sum() for x in values)
    inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    return outputs, torch.autograd.grad(total, inputs)


def is_leaf(case: Case, value: Any) -> bool:
    return case.differentiable and value is case.args[0]


def in_float64(case: Case) -> Case:
    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return value

    kwargs = {name: widen(value) for name, value in case.kwargs.items()}
    return case._replace(args=tuple(widen(value) for value in case.args), kwargs=kwargs)


def describe(case: Case) -> str:
    def one(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return repr(value)
        return f"{value.dtype} {tuple(value.shape)} strides {value.stride()} offset {value.storage_offset()}"

    named = {f"argument {i}": value for i, value in enumerate(case.args)} | case.kwargs
    return "\n".join(f"  {name}: {one(value)}" for name, value in named.items())


class Draw:
    """Random choices of one case."""

    def __init__(self, op: str, number: int) -> None:
        self.random = random.Random(f"{op} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def choice(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, most: int, least: int = 1) -> int:
        """Draw a size; small sizes, powers of two and their neighbours are more likely."""
        near = 2 ** self.random.randint(0, most.bit_length()) + self.random.randint(-1, 1)
        value = self.choice(self.random.randint(least, most), self.random.randint(least, min(most, least + 3)), near)
        return max(least, min(most, value))

    def values(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Draw (...) numbers of a kind; put faults into some of the rows."""
        limit = torch.finfo(dtype).max
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        scale = {"huge": min(1e30, limit / 100), "tiny": 1e-42, "flat": 0.0, EXTREME: limit}.get(kind, 3.0)
        x = (x * scale).clamp(-limit, limit)
        faults = {"masked": (-torch.inf, 0.5), "nan": (torch.nan, 0.02), "inf": (torch.inf, 0.02)}
        faults["empty rows"] = (-torch.inf, 1.0)
        if kind in faults and len(shape) > 1:
            fault, share = faults[kind]
            where = torch.rand(shape, generator=self.generator) < share
            rows = torch.rand(shape[:-1], generator=self.generator) < 0.5
            if kind == "masked":
                where[..., 0] = False
            x = torch.where(where & rows.unsqueeze(-1), fault, x)
        return x.to(dtype)

    def layout(self, x: torch.Tensor, last_contiguous: bool = False) -> torch.Tensor:
        """Return the values in another layout: with an offset, strided, transposed, or rows expanded from the first."""
        form = self.choice("contiguous", "offset", "padded", "transposed", "expanded")
        if form == "offset" or (form == "transposed" and last_contiguous):
            room = torch.full((x.numel() + 9,), torch.nan, dtype=x.dtype)
            offset = self.random.randint(1, 8)
            x = room[offset : offset + x.numel()].copy_(x.reshape(-1)).view(x.shape)
        elif form == "padded" and x.ndim > 1:
            room = torch.full((*x.shape[:-1], x.shape[-1] + self.random.randint(1, 9)), torch.nan, dtype=x.dtype)
            x = room[..., : x.shape[-1]].copy_(x)
        elif form == "transposed" and x.ndim > 1:
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif form == "expanded" and x.ndim > 1 and x.shape[0] > 0:
            x = x[:1].expand(x.shape)
        return x.to(DEVICE)


def assert_close(result: torch.Tensor, truth: torch.Tensor, pytorch: torch.Tensor, size: torch.Tensor | float) -> None:
    """Compare element by element; `size`: the magnitude of the numbers that an element was computed from.

    Each element must equal, up to rounding, the truth or PyTorch's own result at the same dtype. So numbers that
    overflow or underflow only in float32 pass if PyTorch's do the same.
    """
    assert result.dtype == pytorch.dtype, f"dtype {result.dtype}, expected {pytorch.dtype}"
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    got, exact, same = result.double(), truth.to(result.dtype).double(), pytorch.double()
    error = (same - exact).abs()
    allowed = 8 * CONSTANT[result.dtype] * (size + exact.abs().nan_to_num(0, 0, 0)) + 2 * error.nan_to_num(0, 0, 0)
    ok = (got == exact) | (got == same) | ((got - exact).abs() <= allowed) | ((got - same).abs() <= allowed)
    ok |= got.isnan() & (exact.isnan() | same.isnan())
    if not bool(ok.all()):
        at = (~ok).nonzero()[0].tolist()
        numbers = f"got {got[tuple(at)]:.9g}, float64 {truth[tuple(at)]:.9g}, PyTorch {same[tuple(at)]:.9g}"
        raise AssertionError(f"{int((~ok).sum())} of {ok.numel()} elements differ; at {at}: {numbers}")


def magnitude(*tensors: torch.Tensor | None) -> torch.Tensor:
    """(...) The largest finite number in the last dimension of any of the tensors, at least 1."""
    sizes = [x.double().abs().nan_to_num(0, 0, 0).amax(-1) for x in tensors if x is not None]
    return torch.stack(torch.broadcast_tensors(*sizes)).amax(0).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------- cases
def row_uniforms_case(draw: Draw) -> Case:
    rows = draw.size(6000, 0)
    integers = lambda shape: torch.randint(-(2**63), 2**63 - 1, shape, generator=draw.generator).to(DEVICE)  # noqa: E731
    per_row = lambda: integers((rows,) if draw.chance(0.5) else ())  # noqa: E731
    row_ids = integers((2 * rows,))[::2] if draw.chance(0.3) else integers((rows,))

    def judge(result: torch.Tensor, truth: torch.Tensor, same: torch.Tensor) -> None:
        assert torch.equal(result, same), "bits differ"
        assert bool(((result > 0) & (result < 1)).all())

    args = (per_row(), row_ids, per_row())
    return Case("row_uniforms", args, {"stream": draw.size(255, 0)}, judge, elements=rows * 100)


def logprobs_case(draw: Draw) -> Case:
    rows, vocabulary = draw.size(12, 0), draw.size(6000)
    kind, dtype = draw.choice(*KINDS), draw.choice(F32, BF16, F16)
    policy = draw.layout(draw.values((rows, vocabulary), dtype, kind))
    targets = torch.randint(0, vocabulary, (rows,), generator=draw.generator)
    targets[torch.rand(rows, generator=draw.generator) < 0.2] = -100
    if rows and draw.chance(0.05):
        targets[0] = draw.choice(-1, vocabulary, 2**62, -(2**63))
    reference = beta = None
    if draw.chance(0.6):
        other = draw.choice(kind, "normal") if kind != "masked" else kind
        reference = draw.layout(draw.values((rows, vocabulary), draw.choice(F32, BF16, F16), other))
        if kind == "masked":  # the KL of a token that the reference masks is infinite or not, depending on underflow
            finite = reference.nan_to_num(neginf=-5.0)
            reference = torch.where(policy == -torch.inf, -torch.inf, finite).to(reference.dtype)
        beta = draw.choice(None, 0.0, 1.0, 0.3, -0.5, torch.rand(rows, generator=draw.generator).to(DEVICE))
    temperature = draw.choice(1.0, 0.5, 3.0)
    with_kl = reference is not None and draw.chance(0.4)
    options = {"temperature": temperature, "entropy": draw.chance(0.4), "kl": with_kl}
    differentiable = kind in ("normal", "flat", "tiny", "masked") and rows > 0

    def judge(result: Any, truth: Any, same: Any) -> None:
        gradients = []
        if differentiable:
            (result, *gradients), (truth, *exact), (same, *single) = result, truth, same
            gradients = [(a[0], b[0], c[0]) for a, b, c in zip(gradients, exact, single, strict=True)]
        size = magnitude(policy, reference) * 10 / temperature
        for name in result._fields:
            got, exact_value, same_value = getattr(result, name), getattr(truth, name), getattr(same, name)
            assert (got is None) == (same_value is None), name
            if got is not None and kind != EXTREME:
                assert_close(got, exact_value, same_value, size)
        for gradient, exact_gradient, same_gradient in gradients:
            assert_close(gradient, exact_gradient, same_gradient, (size * size / temperature).unsqueeze(-1))

    kwargs = {"reference_logits": reference, "beta": beta, **options}
    return Case("logprobs", (policy, targets.to(DEVICE)), kwargs, judge, differentiable, 4 * rows * vocabulary)


def mixture_sample_case(draw: Draw) -> Case:
    rows, vocabulary = draw.size(8, 0), draw.size(20_000)
    kind, dtype = draw.choice(*KINDS), draw.choice(F32, BF16, F16)
    policy = draw.layout(draw.values((rows, vocabulary), dtype, kind))
    reference = beta = None
    if draw.chance(0.7):
        other = draw.values((rows, vocabulary), draw.choice(F32, BF16, F16), draw.choice(kind, "normal"))
        reference = draw.layout(other)
        beta = draw.choice(0.0, 1.0, 0.25, 1.5, torch.rand(rows, generator=draw.generator).to(DEVICE))
    uniforms = torch.rand(rows, generator=draw.generator, dtype=torch.float64).to(DEVICE)
    if rows and draw.chance(0.3):
        uniforms[0] = draw.choice(0.0, 1.0)
    options: dict[str, Any] = {"temperature": draw.choice(1.0, 0.0, 0.3, 2.5)}
    if draw.chance(0.5):
        options |= {"top_k": draw.choice(0, 1, 7, 2**20), "top_p": draw.choice(1.0, 0.9, 1e-9)}
        options["min_p"] = draw.choice(0.0, 0.1)
    if draw.chance(0.3):
        shape = (rows, vocabulary) if draw.chance(0.5) else (vocabulary,)
        options["bias"] = draw.values(shape, F32, draw.choice("normal", "masked")).to(DEVICE)

    def judge(result: Any, truth: Any, same: Any) -> None:
        assert result.tokens.shape == (rows,) and result.tokens.dtype == torch.int64
        assert bool(((result.tokens >= 0) & (result.tokens < vocabulary)).all()), "a token outside the vocabulary"
        if kind == EXTREME:
            return
        assert torch.equal(result.ok, same.ok), f"ok {result.ok.tolist()}, the oracle {same.ok.tolist()}"
        if kind in ("normal", "flat", "tiny", "masked") and bool(result.ok.all()) and rows:
            mixture.assert_right(result, policy, reference, beta, uniforms, constant=10.0, **options)

    kwargs = {"reference_logits": reference, "beta": beta, "uniforms": uniforms, **options}
    size = 16 * rows * vocabulary
    return Case("mixture_sample", (policy,), kwargs, judge, elements=size, truth=lambda: None)


def decode_attention_case(draw: Draw) -> Case:
    rows, kv_heads, group = draw.size(4, 0), draw.size(3), draw.size(9)
    positions, dim, value_dim = draw.size(260), draw.size(96), draw.size(96)
    dtype = draw.choice(F32, BF16, F16)
    kind = draw.choice("normal", "normal", "flat", "tiny", "nan", "inf")
    query = draw.values((rows, kv_heads * group, dim), dtype, "normal").to(DEVICE)

    def cache(width: int) -> torch.Tensor:
        x = draw.layout(draw.values((rows, kv_heads, positions, width), dtype, kind), last_contiguous=True)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if draw.chance(0.3) else x

    keys, values = cache(dim), cache(value_dim)
    ends = torch.randint(-2, 2 * positions, (rows,), generator=draw.generator).to(DEVICE)
    starts = torch.randint(-2, positions, (rows,), generator=draw.generator).to(DEVICE) if draw.chance(0.5) else None
    sinks = None
    if draw.chance(0.3):
        sinks = draw.values((kv_heads * group,), draw.choice(F32, dtype), "normal").to(DEVICE)
    options = {"window": draw.choice(None, 1, 7, positions), "softcap": draw.choice(None, 5.0)}
    scale = draw.choice(dim**-0.5, 0.2)

    def truth() -> torch.Tensor:
        wide = (query.double(), keys.double(), values.double())
        window, softcap = options["window"] or 2**62, options["softcap"] or 0.0
        inputs = DecodeAttentionInputs(*wide, starts, ends, scale, window, softcap, sinks, "torch")
        return attention.decode_attention(inputs)

    def judge(result: torch.Tensor, truth: torch.Tensor, same: torch.Tensor) -> None:
        # An infinite value whose weight underflows in float32 gives NaN, in float64 infinity.
        result, truth, same = (torch.where(x.isinf(), torch.nan, x) for x in (result, truth, same))
        size = magnitude(values.flatten(1)).view(rows, 1, 1) * 20 if rows else 1.0
        assert_close(result, truth, same, size)

    kwargs = {"ends": ends, "starts": starts, "sinks": sinks, "scale": scale, **options}
    return Case("decode_attention", (query, keys, values), kwargs, judge, elements=20 * keys.numel(), truth=truth)


def mirror_descent_case(draw: Draw) -> Case:
    games, actions, iterations = draw.size(4, 0), draw.size(140), draw.size(6, 0)
    dtype = draw.choice(F32, torch.float64)
    kind = draw.choice("normal", "normal", "flat", "masked", "nan", "empty rows")
    log_policy = draw.layout(draw.values((games, actions), dtype, kind))
    log_reference = draw.layout(draw.values((games, actions), dtype, "normal"))
    chances = torch.rand(games, actions, actions, generator=draw.generator, dtype=torch.float64)
    preference = draw.layout(chances.to(dtype))
    tau = draw.choice(0.0, 0.1, 2.0, torch.rand(games, generator=draw.generator).to(DEVICE, dtype))
    steps = torch.rand(iterations, generator=draw.generator).to(DEVICE, dtype)
    opponent = draw.choice("mixture", "policy", draw.layout(draw.values((games, actions), dtype, "normal")))

    def judge(result: torch.Tensor, truth: torch.Tensor, same: torch.Tensor) -> None:
        assert_close(result, truth, same, magnitude(log_policy, log_reference).unsqueeze(-1) * (8 + 4 * iterations))

    kwargs = {"tau": tau, "step_sizes": steps, "opponent": opponent}
    return Case("mirror_descent", (log_policy, preference, log_reference), kwargs, judge, elements=preference.numel())


def linear_logprobs_case(draw: Draw) -> Case:
    rows, width, vocabulary = draw.size(20, 0), draw.size(40), draw.size(900)
    hidden = draw.layout(draw.values((rows, width), F32, draw.choice("normal", "tiny", "flat")))
    head = draw.layout(draw.values((vocabulary, width), F32, "normal") / width)
    targets = torch.randint(0, vocabulary, (rows,), generator=draw.generator).to(DEVICE)
    options = {"entropy": draw.chance(0.5), "temperature": draw.choice(1.0, 0.5)}
    options["chunk_bytes"] = draw.choice(None, 4096, 2**20)
    if draw.chance(0.5):
        options |= {"reference_hidden": draw.layout(draw.values((rows, width), F32, "normal")), "kl": True}

    def judge(result: Any, truth: Any, same: Any) -> None:
        if rows:
            (result, gradients), (truth, exact), (same, single) = result, truth, same
            assert_close(gradients[0], exact[0], single[0], 100.0)
        for name in result._fields:
            if getattr(result, name) is not None:
                assert_close(getattr(result, name), getattr(truth, name), getattr(same, name), 100.0)

    return Case("linear_logprobs", (hidden, head, targets), options, judge, rows > 0, 20 * rows * vocabulary)


BUILDERS: dict[str, Callable[[Draw], Case]] = {
    "row_uniforms": row_uniforms_case,
    "logprobs": logprobs_case,
    "mixture_sample": mixture_sample_case,
    "decode_attention": decode_attention_case,
    "mirror_descent": mirror_descent_case,
    "linear_logprobs": linear_logprobs_case,
}
