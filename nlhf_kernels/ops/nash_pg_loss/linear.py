"""linear_nash_pg_loss: the same loss from hidden states and heads, its gradient computed while the logits exist.

A token's weight depends on its whole sequence. So a chunk holds whole sequences where it can, and its logits are
computed once, for scores, weights and gradients. The logits of a sequence longer than a chunk are computed twice
(README.md, section 3). Backward only scales the gradients that forward computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import INTEGERS, Sizes, check_number, check_option, check_tensor
from ...core.vocabulary import VocabularySlice
from ..linear_logprobs.chunks import Chunked, Gradients, Needs
from ..linear_logprobs.head import Head
from ..linear_logprobs.op import LinearLogprobsInputs, check_linear, chunked, fake_gradients
from ..linear_logprobs.products import scaled
from ..logprobs.layout import IGNORED, Extra, Output, real_dtype
from ..logprobs.op import DTYPES
from .op import OP, NashPGLoss, Scalar, as_result, check_terms
from .sequences import Sequences, check_offset_values, layout_symbols
from .weights import KL_MODES, surrogate, token_weights

_OP = "linear_nash_pg_loss"
#: Gradients of logits are computed without the normalizer: p * weight / sequences would underflow in float16. There
#: they are also scaled by a power of two, so that the largest factor of any p so far is between half of this and this:
#: small weights do not underflow, large ones do not overflow.
_FLOAT16_LARGEST = 16.0


def whole_sequences(offsets: list[int], rows: int) -> Iterator[tuple[int, int]]:
    """Yield runs [first, last) of sequences that fit in `rows` tokens together; a longer one is a run of its own."""
    first = 0
    while first < len(offsets) - 1:
        last = first + 1
        while last < len(offsets) - 1 and offsets[last + 1] - offsets[first] <= rows:
            last += 1
        yield first, last
        first = last


class _Scaling:
    """The common factor of the accumulated gradients; larger weights later reduce it and rescale them."""

    def __init__(self, compute: torch.dtype, device: torch.device) -> None:
        self.active = compute == torch.float16
        self.factor = torch.ones((), dtype=torch.float32, device=device)

    def admit(self, upstream: torch.Tensor, values: torch.Tensor, gradients: Gradients) -> torch.Tensor:  # (5, C)
        """Return `upstream` of a run of rows, scaled; rescale `gradients` of earlier runs to the same factor."""
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


class LinearNashInputs(NamedTuple):
    advantage: torch.Tensor  # (B,)
    offsets: torch.Tensor  # (B + 1,) int64, on the CPU: the chunks are planned there
    reference_logprobs: torch.Tensor | None  # (N,); instead of the reference's hidden states
    tau: float
    mode: str  # of KL_MODES
    needs: Needs
    scoring: LinearLogprobsInputs


def _run(inputs: LinearNashInputs, part: VocabularySlice | None = None) -> tuple[torch.Tensor, ...]:
    mode, tau = inputs.mode, inputs.tau
    with torch.autocast(inputs.advantage.device.type, enabled=False):
        call = chunked(inputs.scoring, OP, part)
        _check_operands(inputs, call)
        offsets = call.scored.offsets(inputs.offsets.contiguous())
        boundaries = offsets.tolist()
        offsets = offsets.to(call.targets.device)
        buffer = call.buffer()
        values, normalizers = call.outputs()
        if inputs.reference_logprobs is not None:
            values[Output.REFERENCE] = call.scored.pick(inputs.reference_logprobs)
        elif not call.compares and call.targets.numel():
            values[Output.REFERENCE] = call.reference_logprobs(buffer)
        weights = torch.zeros_like(values[0], dtype=torch.float64)
        gradients = Gradients(call.policy, inputs.needs)
        scaling = _Scaling(inputs.scoring.compute, call.targets.device)
        for first, last in whole_sequences(boundaries, call.rows_per_chunk):
            start, stop = boundaries[first], boundaries[last]
            chunks = list(call.chunks(start, stop))
            run = slice(start, stop)
            logits = _score(call, run, chunks, buffer, values, normalizers)
            sequences = Sequences.from_offsets(offsets[first : last + 1] - start, stop - start)
            weights[run] = token_weights(mode, tau, inputs.advantage[first:last], values[:, run], sequences)
            if any(inputs.needs):
                upstream = _upstream(mode, tau, weights[run], values.dtype)
                upstream = scaling.admit(upstream, values[:, run], gradients)
                for rows in chunks:
                    of_chunk = logits[0] if len(chunks) == 1 else call.logits(rows, buffer)
                    saved = (values[:, rows], normalizers[:, rows], upstream[:, rows.start - start : rows.stop - start])
                    gradients.add(rows, call.logits_gradient(rows, of_chunk, *saved))
        weights.masked_fill_(call.targets == IGNORED, 0)
        total = surrogate(mode, tau, weights, values[Output.POLICY], values[Output.KL])
        spread = call.scored.spread
        return total, spread(values), spread(weights), *call.gradient_tensors(gradients), scaling.factor


def _check_operands(inputs: LinearNashInputs, call: Chunked) -> None:
    """Check the operands that `chunked` has not checked."""
    check_option(_OP, "mode", inputs.mode, KL_MODES)
    device, tokens = call.targets.device, call.scored.total
    check_tensor(_OP, "offsets", inputs.offsets, ("sequences + 1",), INTEGERS, {}, torch.device("cpu"))
    check_offset_values(_OP, inputs.offsets.tolist(), tokens)
    sizes: Sizes = {"sequences": inputs.offsets.numel() - 1, "tokens": tokens}
    check_tensor(_OP, "advantage", inputs.advantage, ("sequences",), DTYPES, sizes, device)
    if inputs.reference_logprobs is not None:
        check_tensor(_OP, "reference_logprobs", inputs.reference_logprobs, ("tokens",), DTYPES, sizes, device)


def _score(
    call: Chunked,
    run: slice,
    chunks: list[slice],  # of the run
    buffer: torch.Tensor,
    values: torch.Tensor,  # (5, N)
    normalizers: torch.Tensor,  # (6, N)
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Fill in a run's values and normalizers. Return its chunks' logits; only the last are still in `buffer`."""
    reference_logprobs = values[Output.REFERENCE, run].clone()
    logits = []
    for rows in chunks:
        logits.append(call.logits(rows, buffer))
        values[:, rows], normalizers[:, rows] = call.score(rows, logits[-1])
    values[:, run], normalizers[:, run] = call.merged(values[:, run], normalizers[:, run], run, call.settings)
    if not call.compares:
        values[Output.REFERENCE, run] = reference_logprobs
    return logits


def _upstream(mode: str, tau: float, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # (5, N)
    upstream = torch.zeros((len(Output), weights.numel()), dtype=dtype, device=weights.device)
    upstream[Output.POLICY] = -weights
    if mode == "exact":
        upstream[Output.KL] = tau
    return upstream


def _fake(inputs: LinearNashInputs) -> tuple[torch.Tensor, ...]:
    hidden, compute = inputs.scoring.hidden, inputs.scoring.compute
    total = hidden.new_empty((), dtype=torch.float64)
    values = hidden.new_empty((len(Output), hidden.shape[0]), dtype=real_dtype(compute))
    weights = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    factor = hidden.new_empty((), dtype=torch.float32)
    return total, values, weights, *fake_gradients(inputs.needs, inputs.scoring), factor


class ScaledGradientInputs(NamedTuple):
    part: torch.Tensor
    scale: torch.Tensor  # ()
    dtype: torch.dtype  # of the result


_operator = torch_op.define(
    _OP, LinearNashInputs, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _run, _fake
)
_scaled = torch_op.define(
    "scaled_gradient",
    ScaledGradientInputs,
    "Tensor",
    lambda inputs: scaled(inputs.part, inputs.scale, inputs.dtype),
    lambda inputs: torch.empty_like(inputs.part, dtype=inputs.dtype),
)


def _loss(inputs: LinearNashInputs, part: VocabularySlice | None) -> tuple[torch.Tensor, ...]:
    """Call the operator; for a shared head call `_run`, as in linear_logprobs."""
    return _operator(inputs) if part is None else _run(inputs, part)


class _LinearNash(torch.autograd.Function):
    """`_loss`, whose last results are the gradients with respect to hidden states, weight and bias.

    They are saved and not returned: for each output autograd would allocate zeros of its size in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: LinearNashInputs,
        part: VocabularySlice | None,
    ) -> Any:
        total, values, weights, *gradients, factor = _loss(inputs, part)
        ctx.save_for_backward(*gradients, factor)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total, values, weights

    @staticmethod
    @torch_op.differentiable_once
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> Any:
        *gradients, factor = ctx.saved_tensors
        scale = upstream / factor
        results: list[torch.Tensor | None] = []
        for needed, gradient, dtype in zip(ctx.needs_input_grad[:3], gradients, ctx.dtypes, strict=True):
            inputs = ScaledGradientInputs(gradient, scale.to(real_dtype(gradient.dtype)), dtype)
            results.append(_scaled(inputs) if needed else None)
        return *results, None, None


def linear_nash_pg_loss(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    targets: torch.Tensor,
    preference: torch.Tensor | None = None,
    reference_hidden: torch.Tensor | None = None,
    reference_head: Head | torch.Tensor | None = None,
    *,
    advantage: torch.Tensor | None = None,
    tau: float,
    kl: str = "sequence",
    reference_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    baseline: Scalar | None = None,
    normalizer: Scalar | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> NashPGLoss:
    """`nash_pg_loss` of hidden @ weight^T + bias, with memory for a chunk of logits and the gradients only.

    The gradients are computed in the forward pass, for those of hidden states, weight and bias that need one, and
    scaled in the backward pass. Heads may be DTensors that tensor-parallel processes share, as in `linear_logprobs`.

    Args:
        hidden ((B, T, D), or (N, D) with cu_seqlens): the policy's; float32, bfloat16, float16 or float64.
        head: the policy's, a Head or its weight (V, D) alone.
        targets ((B, T) or (N,) int64): token ids; -100 is not part of the response.
        preference ((B,)): P(y > y'), in [0, 1]; or advantage.
        reference_hidden ((B, T, D') or (N, D')): the reference's hidden states, a constant.
        reference_head: the reference's; None takes the policy's, as a constant.
        advantage ((B,)): any finite numbers, instead of preference and baseline.
        tau: price of leaving the reference, per nat.
        kl: "sequence", "to_go", "exact" or "token", see `nash_pg_loss`.
        reference_logprobs (as targets): instead of reference_hidden.
        mask (as targets): 0 is not part of the response.
        cu_seqlens ((B + 1,)): offsets of packed sequences, from 0 to N; on the CPU they cost no synchronisation.
        baseline (number, () or (B,)): subtracted from the preference; None is 1/2.
        normalizer (number or ()): what the sum is divided by; None is the number of sequences.
        temperature: of the log-probabilities trained on.
        entropy: asks for the policy's entropy.
        chunk_bytes: bytes of logits held at a time; None takes 64 MiB on a CPU, on a GPU 512 MiB to 2 GiB (4 GiB with
            kl="exact"), as its free memory permits.
        backend: see `use_backend`; None leaves the choice to it.
    """
    sizes: Sizes = {}
    symbols = layout_symbols(cu_seqlens)
    models = check_linear(_OP, hidden, head, symbols, sizes, reference_hidden, reference_head, chunk_bytes)
    terms = check_terms(
        _OP,
        sizes,
        hidden.device,
        targets=targets,
        mask=mask,
        cu_seqlens=cu_seqlens,
        advantage=advantage,
        preference=preference,
        baseline=baseline,
        normalizer=normalizer,
        tau=tau,
        kl=kl,
        reference_model=reference_hidden,
        reference_logprobs=reference_logprobs,
    )
    check_number(_OP, "temperature", temperature, 0.0, open_low=True)
    extras = Extra.ENTROPY * entropy | Extra.KL * (kl == "exact")
    needs = Needs(*(torch_op.asks_for_gradient(tensor) for tensor in models.policy))
    offsets = terms.layout.offsets(torch.device("cpu"))
    scoring = models.inputs(terms.layout.targets, None, temperature, extras, backend)
    inputs = LinearNashInputs(terms.advantage, offsets, terms.reference_logprobs, tau, kl, needs, scoring)
    if any(needs):
        total, values, weights = _LinearNash.apply(*models.policy, inputs, models.part)  # type: ignore[no-untyped-call]
    else:
        total, values, weights, *_ = _loss(inputs, models.part)
    scored_entropy = values[Output.ENTROPY] if entropy else None
    return as_result(total / terms.normalizer, values, weights.detach(), scored_entropy, targets.shape, kl)
