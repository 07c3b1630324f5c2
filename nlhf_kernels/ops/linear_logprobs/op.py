"""linear_logprobs: what logprobs gives, from hidden states and output heads, without ever storing the logits whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import INTEGERS, Sizes, check_integer, check_not_empty, check_number, check_tensor
from ...core.registry import built_on
from ...core.vocabulary import VocabularySlice, is_dtensor
from ..logprobs.layout import Output, Settings, Want, real_dtype
from ..logprobs.op import (
    DTYPES,
    Logprobs,
    LogprobsProblem,
    as_logprobs,
    beta_tensor,
    check_beta,
    check_constant,
    check_saved,
    check_targets,
    check_wanted,
)
from ..logprobs.op import OP as LOGPROBS
from .chunks import CHUNK_BYTES, Chunked, Gradients, Kept, Needs, Side
from .head import Head, check_head
from .slices import ChunkedSlice, local_heads


def _describe(hidden: torch.Tensor, *_: Any, **__: Any) -> LogprobsProblem:
    return LogprobsProblem(hidden.device, (compute_dtype(hidden),))


OP = built_on(LOGPROBS, "linear_logprobs", _describe)


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the products are made in: autocast's dtype where it is on, else the hidden states' own."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def chunked(inputs: tuple[Any, ...], op: Any = OP, part: VocabularySlice | None = None) -> Chunked:
    """The tensors and settings of an operator call, cast to the dtype of the products, with the backend chosen."""
    *tensors, targets, beta, numbers, wanted, chunk_bytes, compute, backend = inputs
    _check_operands(op.name, tensors, targets, beta, wanted, chunk_bytes, compute)
    if part is None and not tensors[1].shape[0]:
        raise ValueError(f"{op.name}: weight: expected at least one of vocabulary; got 0")
    check_targets(op.name, targets, tensors[1].shape[0] if part is None else part.total)
    policy, reference = Side(*tensors[:3]), None
    if tensors[3] is not None:
        reference = Side(*tensors[3:])
        shared = policy.shares_head_with(reference)  # asked before a cast makes two of one
    kept = Kept.of(targets)
    policy = policy._replace(hidden=kept.pick(policy.hidden, 0)).to(compute)
    if reference is not None:
        reference = reference._replace(hidden=kept.pick(reference.hidden, 0))
        reference = policy._replace(hidden=reference.hidden.to(compute)) if shared else reference.to(compute)
    chosen = op.resolve(backend, LogprobsProblem(targets.device, (compute,)))
    beta = kept.pick(beta) if beta is not None and beta.ndim else beta
    settings = Settings.of(numbers, wanted)
    call = (policy, reference, kept.pick(targets).contiguous(), beta, settings, chosen, chunk_bytes, kept)
    return Chunked(*call) if part is None else ChunkedSlice(*call, part)


def _check_operands(
    op: str,
    tensors: list[Any],
    targets: torch.Tensor,
    beta: torch.Tensor | None,
    wanted: int,
    chunk_bytes: int,
    compute: torch.dtype,
) -> None:
    hidden, weight, bias, *reference = tensors
    sizes: Sizes = {}
    device = hidden.device
    check_tensor(op, "hidden", hidden, ("tokens", "hidden"), DTYPES, sizes)
    check_tensor(op, "weight", weight, ("vocabulary", "hidden"), DTYPES, sizes, device)
    if bias is not None:
        check_tensor(op, "bias", bias, ("vocabulary",), DTYPES, sizes, device)
    if reference[0] is not None:
        check_tensor(op, "reference_hidden", reference[0], ("tokens", "reference_hidden"), DTYPES, sizes, device)
        check_tensor(op, "reference_weight", reference[1], ("vocabulary", "reference_hidden"), DTYPES, sizes, device)
        if reference[2] is not None:
            check_tensor(op, "reference_bias", reference[2], ("vocabulary",), DTYPES, sizes, device)
    check_not_empty(op, "weight", sizes, "hidden")
    check_tensor(op, "targets", targets, ("tokens",), INTEGERS, sizes, device)
    if compute not in DTYPES:
        raise TypeError(f"{op}: compute: expected one of {DTYPES}; got {compute}")
    check_beta(op, beta, sizes["tokens"], real_dtype(compute), device)
    check_wanted(op, wanted, reference[0] is not None, beta is not None)
    check_integer(op, "chunk_bytes", chunk_bytes, 1, 2**62)


def _run(*inputs: Any, part: VocabularySlice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(inputs[0].device.type, enabled=False):
        call = chunked(inputs, part=part)
        values, normalizers = call.outputs()
        buffer = call.buffer()
        for rows in call.chunks():
            values[:, rows], normalizers[:, rows] = call.score(rows, call.logits(rows, buffer))
        values, normalizers = call.merged(values, normalizers, slice(0, call.targets.numel()), call.settings)
        if call.reference is not None and not call.compares and call.targets.numel():
            values[Output.REFERENCE] = call.reference_logprobs(buffer)
        return call.kept.spread(values), call.kept.spread(normalizers)


def _fake(hidden: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    real, count = real_dtype(inputs[-2]), hidden.shape[0]
    return hidden.new_empty((5, count), dtype=real), hidden.new_empty((6, count), dtype=real)


def _run_backward(
    values: torch.Tensor,
    normalizers: torch.Tensor,
    upstream: torch.Tensor,
    needs: list[bool],
    *inputs: Any,
    part: VocabularySlice | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits are computed again: they were not kept."""
    with torch.autocast(values.device.type, enabled=False):
        call = chunked(inputs, part=part)
        saved = {"values": values, "normalizers": normalizers, "upstream": upstream}
        check_saved(OP.name, saved, call.kept.total, real_dtype(inputs[-2]), call.targets.device)
        gradients = Gradients(call.policy, Needs(*needs))
        buffer = call.buffer()
        of_rows = [call.kept.pick(part) for part in saved.values()]
        for rows in call.chunks():
            of_chunk = (part[:, rows] for part in of_rows)
            gradients.add(rows, call.logits_gradient(rows, call.logits(rows, buffer), *of_chunk))
        return call.gradient_tensors(gradients)


def fake_gradients(needs: list[bool], hidden: torch.Tensor, weight: torch.Tensor, compute: torch.dtype) -> Any:
    real, empty = real_dtype(compute), hidden.new_empty(0, dtype=compute)
    return (
        torch.empty_like(hidden, dtype=compute) if needs[0] else empty,
        torch.empty_like(weight, dtype=real) if needs[1] else empty.clone(),
        weight.new_empty(weight.shape[0], dtype=real) if needs[2] else empty.clone(),
    )


def _fake_backward(values: Any, normalizers: Any, upstream: Any, needs: list[bool], *inputs: Any) -> Any:
    return fake_gradients(needs, inputs[0], inputs[1], inputs[-2])


INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? reference_hidden, Tensor? reference_weight,"
    " Tensor? reference_bias, Tensor targets, Tensor? beta, float[] numbers, int wanted, int chunk_bytes,"
    " ScalarType compute, str backend"
)
_operator = torch_op.define("linear_logprobs", f"({INPUTS}) -> (Tensor, Tensor)", _run, _fake)
_backward = torch_op.define(
    "linear_logprobs_backward",
    f"(Tensor values, Tensor normalizers, Tensor upstream, bool[] needs, {INPUTS}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _scored(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """With collectives in it a call is no operator: torch.compile would have to know the group by name."""
    *operands, part = inputs
    result: tuple[torch.Tensor, torch.Tensor] = _operator(*operands) if part is None else _run(*operands, part=part)
    return result


def _gradients(needs: Any, saved: Any, inputs: Any, upstream: torch.Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, values, normalizers = saved
    *plain, part = inputs[8:]
    asked = list(needs[:3])
    operands = (values, normalizers, upstream, asked, *tensors, *plain)
    parts = _backward(*operands) if part is None else _run_backward(*operands, part=part)
    given = [
        part.to(tensor.dtype) if ask else None for ask, part, tensor in zip(asked, parts, tensors[:3], strict=True)
    ]
    return (*given, *[None] * 11)


_differentiable = torch_op.differentiable(_scored, lambda inputs, output: (*inputs[:8], *output), _gradients)


class LinearInputs(NamedTuple):
    """The checked arguments that all linear ops share, flat: (N, D) hidden states, (N,) targets."""

    tensors: tuple[torch.Tensor | None, ...]  # hidden, weight, bias of the policy, then of the reference
    transforms: tuple[Any, Any]
    compute: torch.dtype
    chunk_bytes: int
    part: VocabularySlice | None  # of the heads; None: they are whole


def check_linear(
    op: str,
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    shape: tuple[str, ...],
    sizes: Sizes,
    reference_hidden: torch.Tensor | None,
    reference_head: Head | torch.Tensor | None,
    chunk_bytes: int | None,
) -> LinearInputs:
    """Shapes, dtypes, devices, and that the reference asks for no gradient. Binds the symbols it meets in `sizes`."""
    check_tensor(op, "hidden", hidden, (*shape, "hidden"), DTYPES, sizes)
    if is_dtensor(hidden):
        raise TypeError(f"{op}: hidden: expected a plain tensor, equal in all processes of the head; got a DTensor")
    head, reference_head, part = local_heads(op, head, reference_head)
    policy = check_head(op, "head", head, sizes, "hidden", hidden.device)
    check_not_empty(op, "head.weight", sizes, *(["vocabulary"] if part is None else []), "hidden")
    other: Head | None = None
    if reference_hidden is not None:
        expected = (*shape, "reference_hidden")
        check_tensor(op, "reference_hidden", reference_hidden, expected, DTYPES, sizes, hidden.device)
        check_constant(op, "reference_hidden", reference_hidden)
        given = policy if reference_head is None else reference_head
        other = check_head(op, "reference_head", given, sizes, "reference_hidden", hidden.device)
        if other.weight is not policy.weight:
            check_constant(op, "reference_head.weight", other.weight)
        if other.bias is not None and other.bias is not policy.bias:
            check_constant(op, "reference_head.bias", other.bias)
    elif reference_head is not None:
        raise ValueError(f"{op}: reference_head: expected with reference_hidden; got it alone")
    chunk = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
    return LinearInputs(
        (
            hidden.reshape(-1, hidden.shape[-1]),
            policy.weight,
            policy.bias,
            None if reference_hidden is None else reference_hidden.detach().reshape(-1, reference_hidden.shape[-1]),
            None if other is None else other.weight.detach(),
            None if other is None or other.bias is None else other.bias.detach(),
        ),
        (policy.transform, policy.transform if other is None else other.transform),
        compute_dtype(hidden),
        check_integer(op, "chunk_bytes", chunk, 1, 2**62),
        part,
    )


def linear_logprobs(
    hidden: torch.Tensor,  # (..., D): one or two dimensions before the last
    head: Head | torch.Tensor,  # the policy's; its weight (V, D) alone is fine
    targets: torch.Tensor,  # (...) int64; -100: not scored
    reference_hidden: torch.Tensor | None = None,  # (..., D')
    reference_head: Head | torch.Tensor | None = None,  # None: the policy's, as a constant
    *,
    beta: float | torch.Tensor | None = None,  # number or (...); asks for the mixture
    temperature: float = 1.0,
    entropy: bool = False,
    kl: bool = False,
    chunk_bytes: int | None = None,  # of logits held at a time; None: 512 MiB on a GPU, 64 MiB on a CPU
    backend: str | None = None,
) -> Logprobs:
    """`logprobs(hidden @ weight^T + bias, ...)` with memory for a chunk of logits only; backward computes them again.

    Differentiable in the policy's hidden states and head; what asks for no gradient costs none. The head's gradient is
    summed in float32. Under autocast the products are made in its dtype.

    A head may be a DTensor that tensor-parallel processes share: each then computes with its own slice of the
    vocabulary (README.md, section 4), and all get the same result.
    """
    op = "linear_logprobs"
    shape = {2: ("tokens",), 3: ("sequences", "tokens")}.get(getattr(hidden, "ndim", 2), ("...",))
    sizes: Sizes = {}
    inputs = check_linear(op, hidden, head, shape, sizes, reference_hidden, reference_head, chunk_bytes)
    check_tensor(op, "targets", targets, shape, INTEGERS, sizes, hidden.device)
    if reference_hidden is None and (kl or beta is not None):
        raise ValueError(f"{op}: {'kl' if kl else 'beta'}: expected only with reference_hidden; got None for it")
    check_number(op, "temperature", temperature, 0.0, open_low=True)
    flags = Want.ENTROPY * entropy | Want.KL * kl | Want.MIXTURE * (beta is not None)
    numbers, wanted = Settings(temperature, *inputs.transforms, flags).flat()
    values, _ = _differentiable(
        *inputs.tensors,
        targets.reshape(-1),
        beta_tensor(op, beta, targets, real_dtype(inputs.compute)),
        numbers,
        wanted,
        inputs.chunk_bytes,
        inputs.compute,
        backend or "",
        inputs.part,
    )
    return as_logprobs(values, targets.shape, reference_hidden is not None, wanted)
