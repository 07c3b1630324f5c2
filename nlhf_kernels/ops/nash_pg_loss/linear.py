"""linear_nash_pg_loss: the same loss from hidden states and heads, its gradient taken while the logits are at hand.

A token's weight needs its whole sequence. So a chunk holds whole sequences where it can: scored, weighted and turned
into gradients, its logits are never computed again. A sequence that no chunk can hold is walked twice (README.md,
section 3). Backward only scales what forward has made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...core import torch_op
from ...core.checks import INTEGERS, Sizes, check_option, check_tensor
from ...core.vocabulary import VocabularySlice
from ..linear_logprobs.chunks import Chunked, Gradients, Needs
from ..linear_logprobs.head import Head
from ..linear_logprobs.op import INPUTS, check_linear, chunked, fake_gradients
from ..linear_logprobs.products import scaled
from ..logprobs.layout import IGNORED, Output, Settings, Want, real_dtype
from ..logprobs.op import DTYPES
from .op import OP, NashPGLoss, Scalar, as_result, check_terms
from .sequences import Sequences, check_offset_values, layout_symbols
from .weights import KL_MODES, surrogate, token_weights

_OP = "linear_nash_pg_loss"
#: Gradients of logits are made without the normalizer: p * weight / sequences would fall below what float16 can hold.
#: And in float16 they are scaled by a power of two, so that the largest factor of any p so far is between half of this
#: and this: small weights do not vanish, large ones do not overflow.
_FLOAT16_LARGEST = 16.0


def whole_sequences(offsets: list[int], rows: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of sequences that fit in `rows` tokens together; a longer sequence is a run of its own."""
    first = 0
    while first < len(offsets) - 1:
        last = first + 1
        while last < len(offsets) - 1 and offsets[last + 1] - offsets[first] <= rows:
            last += 1
        yield first, last
        first = last


class _Scaling:
    """The factor of all gradients made so far. Later weights may be larger: then it shrinks, and they with it."""

    def __init__(self, compute: torch.dtype, device: torch.device) -> None:
        self.active = compute == torch.float16
        self.factor = torch.ones((), dtype=torch.float32, device=device)

    def admit(self, upstream: torch.Tensor, values: torch.Tensor, gradients: Gradients) -> torch.Tensor:  # (5, C)
        """`upstream` of a run of rows, scaled; `gradients` of the runs before are brought to the same factor."""
        if not self.active or not upstream.numel():
            return upstream
        kl = upstream[Output.KL].abs() * (2 * values[Output.KL] + 1)  # bounds p |log p - log q - KL| times upstream
        largest = (upstream[Output.POLICY].abs() + kl).nan_to_num(0, 0, 0).max()
        exponent = torch.frexp(largest.float()).exponent  # largest < 2^exponent
        factor = _FLOAT16_LARGEST * torch.exp2(-exponent.float())
        if not gradients.empty:
            factor = torch.minimum(factor, self.factor)
            gradients.scale(factor / self.factor)
        self.factor = factor
        return upstream * factor


def _run(
    advantage: torch.Tensor,
    offsets: torch.Tensor,
    reference_logprobs: torch.Tensor | None,
    tau: float,
    mode: str,
    needs: list[bool],
    *inputs: Any,
    part: VocabularySlice | None = None,
) -> tuple[torch.Tensor, ...]:
    with torch.autocast(advantage.device.type, enabled=False):
        call = chunked(inputs, OP, part)
        _check_operands(advantage, offsets, reference_logprobs, mode, call)
        offsets = call.kept.offsets(offsets.contiguous())
        boundaries = offsets.tolist()
        offsets = offsets.to(call.targets.device)
        buffer = call.buffer()
        values, normalizers = call.outputs()
        if reference_logprobs is not None:
            values[Output.REFERENCE] = call.kept.pick(reference_logprobs)
        elif not call.compares and call.targets.numel():
            values[Output.REFERENCE] = call.reference_logprobs(buffer)
        weights = torch.zeros_like(values[0], dtype=torch.float64)
        gradients = Gradients(call.policy, Needs(*needs))
        scaling = _Scaling(inputs[-2], call.targets.device)
        for first, last in whole_sequences(boundaries, call.rows_per_chunk):
            start, stop = boundaries[first], boundaries[last]
            chunks = list(call.chunks(start, stop))
            run = slice(start, stop)
            logits = _score(call, run, chunks, buffer, values, normalizers)
            sequences = Sequences.from_offsets(offsets[first : last + 1] - start, stop - start)
            weights[run] = token_weights(mode, tau, advantage[first:last], values[:, run], sequences)
            if any(needs):
                upstream = _upstream(mode, tau, weights[run], values.dtype)
                upstream = scaling.admit(upstream, values[:, run], gradients)
                for rows in chunks:
                    kept = logits[0] if len(chunks) == 1 else call.logits(rows, buffer)
                    saved = (values[:, rows], normalizers[:, rows], upstream[:, rows.start - start : rows.stop - start])
                    gradients.add(rows, call.logits_gradient(rows, kept, *saved))
        weights.masked_fill_(call.targets == IGNORED, 0)
        total = surrogate(mode, tau, weights, values[Output.POLICY], values[Output.KL])
        spread = call.kept.spread
        return total, spread(values), spread(weights), *call.gradient_tensors(gradients), scaling.factor


def _check_operands(
    advantage: torch.Tensor, offsets: torch.Tensor, reference_logprobs: torch.Tensor | None, mode: str, call: Chunked
) -> None:
    """Those that linear_logprobs has not checked."""
    check_option(_OP, "mode", mode, KL_MODES)
    device = call.targets.device
    check_tensor(_OP, "offsets", offsets, ("sequences + 1",), INTEGERS, {}, torch.device("cpu"))
    check_offset_values(_OP, offsets.tolist(), call.kept.total)
    check_tensor(_OP, "advantage", advantage, ("sequences",), DTYPES, {"sequences": offsets.numel() - 1}, device)
    if reference_logprobs is not None:
        sizes = {"tokens": call.kept.total}
        check_tensor(_OP, "reference_logprobs", reference_logprobs, ("tokens",), DTYPES, sizes, device)


def _score(
    call: Chunked,
    run: slice,
    chunks: list[slice],  # of the run
    buffer: torch.Tensor,
    values: torch.Tensor,  # (5, N)
    normalizers: torch.Tensor,  # (6, N)
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Fill in values and normalizers of a run. Returns the logits of its chunks; the last are still in `buffer`."""
    known = values[Output.REFERENCE, run].clone()
    logits = []
    for rows in chunks:
        logits.append(call.logits(rows, buffer))
        values[:, rows], normalizers[:, rows] = call.score(rows, logits[-1])
    values[:, run], normalizers[:, run] = call.merged(values[:, run], normalizers[:, run], run, call.settings)
    if not call.compares:
        values[Output.REFERENCE, run] = known
    return logits


def _upstream(mode: str, tau: float, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # (5, N)
    upstream = torch.zeros((len(Output), weights.numel()), dtype=dtype, device=weights.device)
    upstream[Output.POLICY] = -weights
    if mode == "exact":
        upstream[Output.KL] = tau
    return upstream


def _fake(advantage: Any, offsets: Any, given: Any, tau: Any, mode: Any, needs: list[bool], *inputs: Any) -> Any:
    hidden, weight, compute = inputs[0], inputs[1], inputs[-2]
    total = hidden.new_empty((), dtype=torch.float64)
    values = hidden.new_empty((len(Output), hidden.shape[0]), dtype=real_dtype(compute))
    weights = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    factor = hidden.new_empty((), dtype=torch.float32)
    return total, values, weights, *fake_gradients(needs, hidden, weight, compute), factor


_operator = torch_op.define(
    _OP,
    f"(Tensor advantage, Tensor offsets, Tensor? reference_logprobs, float tau, str mode, bool[] needs, {INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_scaled = torch_op.define(
    "scaled_gradient",
    "(Tensor part, Tensor scale, ScalarType dtype) -> Tensor",
    scaled,
    lambda part, scale, dtype: torch.empty_like(part, dtype=dtype),
)
_HIDDEN, _WEIGHT, _BIAS = 6, 7, 8  # positions of what is differentiated


def _backward(needs: Any, saved: Any, inputs: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    *parts, factor = saved
    dtypes = inputs[-1]
    scale = upstream / factor
    given: list[torch.Tensor | None] = [None] * len(inputs)
    for position, part, dtype in zip((_HIDDEN, _WEIGHT, _BIAS), parts, dtypes, strict=True):
        if needs[position]:
            given[position] = _scaled(part, scale.to(real_dtype(part.dtype)), dtype)
    return tuple(given)


def _forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    *operands, part, _ = inputs  # the last are dtypes, for the gradients
    result: tuple[torch.Tensor, ...] = _operator(*operands) if part is None else _run(*operands, part=part)
    return result


_differentiable = torch_op.differentiable(
    _forward,
    lambda inputs, output: output[3:],
    _backward,
    visible=lambda output: output[:3],
)


def linear_nash_pg_loss(
    hidden: torch.Tensor,  # (B, T, D), or (N, D) with cu_seqlens
    head: Head | torch.Tensor,  # the policy's; its weight (V, D) alone is fine
    targets: torch.Tensor,  # (B, T) or (N,) int64; -100: not part of the response
    preference: torch.Tensor | None = None,  # (B,) P(y > y'), in [0, 1]; or advantage
    reference_hidden: torch.Tensor | None = None,  # (B, T, D') or (N, D')
    reference_head: Head | torch.Tensor | None = None,  # None: the policy's, as a constant
    *,
    advantage: torch.Tensor | None = None,  # (B,), any finite numbers; instead of preference and baseline
    tau: float,
    kl: str = "sequence",
    reference_logprobs: torch.Tensor | None = None,  # as targets; instead of reference_hidden
    mask: torch.Tensor | None = None,  # as targets; 0: not part of the response
    cu_seqlens: torch.Tensor | None = None,  # (B + 1,); one on the CPU costs no synchronisation
    baseline: Scalar | None = None,  # number, () or (B,), with preference; None: 1/2
    normalizer: Scalar | None = None,  # None: the number of sequences
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int | None = None,  # of logits held at a time; None: 512 MiB on a GPU, 64 MiB on a CPU
    backend: str | None = None,
) -> NashPGLoss:
    """`nash_pg_loss` of hidden @ weight^T + bias, with memory for a chunk of logits and the gradients only.

    The gradients are computed in the forward pass, for those of hidden states, weight and bias that ask for one, and
    scaled in the backward pass. Heads may be DTensors that tensor-parallel processes share, as in `linear_logprobs`.
    """
    sizes: Sizes = {}
    symbols = layout_symbols(cu_seqlens)
    inputs = check_linear(_OP, hidden, head, symbols, sizes, reference_hidden, reference_head, chunk_bytes)
    terms = check_terms(
        _OP, targets, mask, cu_seqlens, advantage, preference, baseline, normalizer, tau, kl,
        (reference_hidden, reference_logprobs), sizes, hidden.device,
    )  # fmt: skip
    flags = Want.ENTROPY * entropy | Want.KL * (kl == "exact")
    numbers, wanted = Settings(temperature, *inputs.transforms, flags).flat()
    needs = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs.tensors[:3]]
    total, values, weights = _differentiable(
        terms.advantage,
        terms.layout.offsets(torch.device("cpu")),  # the chunks are planned on the host
        terms.reference_logprobs,
        tau,
        kl,
        needs,
        *inputs.tensors,
        terms.layout.targets,
        None,
        numbers,
        wanted,
        inputs.chunk_bytes,
        inputs.compute,
        backend or "",
        inputs.part,
        [None if tensor is None else tensor.dtype for tensor in inputs.tensors[:3]],
    )
    scored_entropy = values[Output.ENTROPY] if entropy else None
    return as_result(total / terms.normalizer, values, weights.detach(), scored_entropy, targets.shape, kl)
