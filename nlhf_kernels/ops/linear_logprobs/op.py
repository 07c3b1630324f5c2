"""linear_logprobs: the outputs of logprobs, from hidden states and output heads, without storing the logits whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import INTEGERS, Sizes, check_integer, check_not_empty, check_number, check_tensor
from ...core.registry import Op, built_on
from ...core.vocabulary import VocabularySlice, is_dtensor
from ..logprobs.layout import Extra, Normalizer, Output, Settings, Transform, real_dtype
from ..logprobs.op import (
    DTYPES,
    Logprobs,
    LogprobsProblem,
    as_logprobs,
    beta_tensor,
    check_beta,
    check_constant,
    check_extras,
    check_saved,
    check_targets,
    token_symbols,
)
from ..logprobs.op import OP as LOGPROBS
from .chunks import CHUNK_BYTES, Chunked, Gradients, Needs, ScoredRows, Side, choose_chunk_bytes, compares_models
from .head import Head, check_head
from .slices import ChunkedSlice, local_heads


class LinearLogprobsInputs(NamedTuple):
    hidden: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    reference_hidden: torch.Tensor | None  # (N, D'); this and the next two are constants
    reference_weight: torch.Tensor | None  # (V, D')
    reference_bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor  # (N,) int64
    beta: torch.Tensor | None  # () or (N,), in the dtype of the outputs
    settings: Settings
    chunk_bytes: int  # of logits held at a time; 0: chosen by `choose_chunk_bytes`
    compute: torch.dtype  # of the products
    backend: str


class LinearLogprobsBackwardInputs(NamedTuple):
    values: torch.Tensor  # (5, N)
    normalizers: torch.Tensor  # (6, N)
    upstream: torch.Tensor  # (5, N), the gradient of `values`
    needs: Needs
    forward: LinearLogprobsInputs


def _describe(hidden: torch.Tensor, *_: object, **__: object) -> LogprobsProblem:
    return LogprobsProblem(hidden.device, (compute_dtype(hidden),))


OP = built_on(LOGPROBS, "linear_logprobs", _describe)


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype of the products: autocast's where it is on, else the hidden states' own."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def chunked(inputs: LinearLogprobsInputs, op: Op = OP, part: VocabularySlice | None = None) -> Chunked:
    """Check an operator's inputs, cast them to the dtype of the products, choose the backend."""
    _check_operands(op.name, inputs)
    if part is None and not inputs.weight.shape[0]:
        raise ValueError(f"{op.name}: weight: expected at least one of vocabulary; got 0")
    check_targets(op.name, inputs.targets, inputs.weight.shape[0] if part is None else part.total)
    scored = ScoredRows.of(inputs.targets)
    policy = Side(scored.pick(inputs.hidden, 0), inputs.weight, inputs.bias)
    reference = None
    if inputs.reference_hidden is not None and inputs.reference_weight is not None:
        hidden = scored.pick(inputs.reference_hidden, 0)
        reference = Side(hidden, inputs.reference_weight, inputs.reference_bias)
    shared = reference is not None and policy.shares_head_with(reference)  # before a cast, which would copy it twice
    policy = policy.to(inputs.compute)
    if reference is not None:
        reference = (
            policy._replace(hidden=reference.hidden.to(inputs.compute)) if shared else reference.to(inputs.compute)
        )
    beta = inputs.beta
    call = Chunked(
        policy,
        reference,
        targets=scored.pick(inputs.targets).contiguous(),
        beta=scored.pick(beta) if beta is not None and beta.ndim else beta,
        settings=inputs.settings,
        backend=op.resolve(inputs.backend, LogprobsProblem(inputs.targets.device, (inputs.compute,))),
        chunk_bytes=inputs.chunk_bytes or _default_chunk_bytes(inputs, part),
        scored=scored,
    )
    return call if part is None else ChunkedSlice(**vars(call), part=part)


def _default_chunk_bytes(inputs: LinearLogprobsInputs, part: VocabularySlice | None) -> int:
    """Return the default size of a chunk: equal in all processes that share a head, whatever memory each has free."""
    device = inputs.hidden.device
    if part is None:
        return choose_chunk_bytes(device, inputs.hidden.shape[1], compares_models(inputs.settings))
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


def _check_operands(op: str, inputs: LinearLogprobsInputs) -> None:
    sizes: Sizes = {}
    device = inputs.hidden.device
    check_tensor(op, "hidden", inputs.hidden, ("tokens", "hidden"), DTYPES, sizes)
    check_tensor(op, "weight", inputs.weight, ("vocabulary", "hidden"), DTYPES, sizes, device)
    if inputs.bias is not None:
        check_tensor(op, "bias", inputs.bias, ("vocabulary",), DTYPES, sizes, device)
    hidden, weight, bias = inputs.reference_hidden, inputs.reference_weight, inputs.reference_bias
    if hidden is not None:
        check_tensor(op, "reference_hidden", hidden, ("tokens", "reference_hidden"), DTYPES, sizes, device)
        check_tensor(op, "reference_weight", weight, ("vocabulary", "reference_hidden"), DTYPES, sizes, device)
        if bias is not None:
            check_tensor(op, "reference_bias", bias, ("vocabulary",), DTYPES, sizes, device)
    check_not_empty(op, "weight", sizes, "hidden")
    check_tensor(op, "targets", inputs.targets, ("tokens",), INTEGERS, sizes, device)
    if inputs.compute not in DTYPES:
        raise TypeError(f"{op}: compute: expected one of {DTYPES}; got {inputs.compute}")
    check_beta(op, inputs.beta, sizes["tokens"], real_dtype(inputs.compute), device)
    check_extras(op, inputs.settings.extras, hidden is not None, inputs.beta is not None)
    check_integer(op, "chunk_bytes", inputs.chunk_bytes, 0, 2**62)


def _run(inputs: LinearLogprobsInputs, part: VocabularySlice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        call = chunked(inputs, part=part)
        values, normalizers = call.outputs()
        buffer = call.buffer()
        for rows in call.chunks():
            values[:, rows], normalizers[:, rows] = call.score(rows, call.logits(rows, buffer))
        values, normalizers = call.merged(values, normalizers, slice(0, call.targets.numel()), call.settings)
        if call.reference is not None and not call.compares and call.targets.numel():
            values[Output.REFERENCE] = call.reference_logprobs(buffer)
        return call.scored.spread(values), call.scored.spread(normalizers)


def _fake(inputs: LinearLogprobsInputs) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, real = inputs.hidden, real_dtype(inputs.compute)
    shapes = ((len(Output), hidden.shape[0]), (len(Normalizer), hidden.shape[0]))
    return hidden.new_empty(shapes[0], dtype=real), hidden.new_empty(shapes[1], dtype=real)


def _run_backward(
    inputs: LinearLogprobsBackwardInputs, part: VocabularySlice | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recompute the logits, and compute the gradients from them."""
    values, normalizers, upstream, needs, forward = inputs
    with torch.autocast(values.device.type, enabled=False):
        call = chunked(forward, part=part)
        saved = {"values": values, "normalizers": normalizers, "upstream": upstream}
        check_saved(OP.name, saved, call.scored.total, real_dtype(forward.compute), call.targets.device)
        gradients = Gradients(call.policy, needs)
        buffer = call.buffer()
        of_rows = [call.scored.pick(tensor) for tensor in saved.values()]
        for rows in call.chunks():
            of_chunk = (tensor[:, rows] for tensor in of_rows)
            gradients.add(rows, call.logits_gradient(rows, call.logits(rows, buffer), *of_chunk))
        return call.gradient_tensors(gradients)


def fake_gradients(needs: Needs, inputs: LinearLogprobsInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, compute = inputs.hidden, inputs.weight, inputs.compute
    real, empty = real_dtype(compute), hidden.new_empty(0, dtype=compute)
    return (
        torch.empty_like(hidden, dtype=compute) if needs.hidden else empty,
        torch.empty_like(weight, dtype=real) if needs.weight else empty.clone(),
        weight.new_empty(weight.shape[0], dtype=real) if needs.bias else empty.clone(),
    )


_operator = torch_op.define("linear_logprobs", LinearLogprobsInputs, "(Tensor, Tensor)", _run, _fake)
_backward = torch_op.define(
    "linear_logprobs_backward",
    LinearLogprobsBackwardInputs,
    "(Tensor, Tensor, Tensor)",
    _run_backward,
    lambda inputs: fake_gradients(inputs.needs, inputs.forward),
)


def _score(inputs: LinearLogprobsInputs, part: VocabularySlice | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the operator; for a shared head call `_run`: torch.compile would need the process group by name."""
    return _operator(inputs) if part is None else _run(inputs, part)


class _LinearLogprobs(torch.autograd.Function):
    """`_score` with its gradients with respect to hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: LinearLogprobsInputs,
        part: VocabularySlice | None,
    ) -> Any:
        values, normalizers = _score(inputs, part)
        reference = inputs.reference_hidden, inputs.reference_weight, inputs.reference_bias
        ctx.save_for_backward(
            hidden, weight, bias, *reference, inputs.targets, inputs.beta, values, normalizers
        )  # fmt: skip
        ctx.settings = inputs.settings, inputs.chunk_bytes, inputs.compute, inputs.backend
        ctx.part = part
        return values

    @staticmethod
    @torch_op.differentiable_once
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        *operands, values, normalizers = ctx.saved_tensors
        forward = LinearLogprobsInputs(*operands, *ctx.settings)
        needs = Needs(*ctx.needs_input_grad[:3])
        inputs = LinearLogprobsBackwardInputs(values, normalizers, upstream, needs, forward)
        hidden, weight, bias = _backward(inputs) if ctx.part is None else _run_backward(inputs, ctx.part)
        return (
            hidden.to(forward.hidden.dtype) if needs.hidden else None,
            weight.to(forward.weight.dtype) if needs.weight else None,
            bias.to(forward.bias.dtype) if needs.bias and forward.bias is not None else None,
            None,
            None,
        )


class Models(NamedTuple):
    """The arguments about models that all linear ops share, checked and flattened."""

    policy: Side
    reference: Side | None  # detached
    policy_transform: Transform
    reference_transform: Transform
    compute: torch.dtype
    chunk_bytes: int  # 0: to be chosen
    part: VocabularySlice | None  # of the heads; None: they are whole

    def inputs(
        self, targets: torch.Tensor, beta: torch.Tensor | None, temperature: float, extras: int, backend: str | None
    ) -> LinearLogprobsInputs:
        settings = Settings(temperature, self.policy_transform, self.reference_transform, extras)
        hidden, weight, bias = (None, None, None) if self.reference is None else self.reference
        return LinearLogprobsInputs(
            *self.policy, hidden, weight, bias, targets.reshape(-1), beta, settings, self.chunk_bytes, self.compute,
            backend or "",
        )  # fmt: skip


def check_linear(
    op: str,
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    shape: tuple[str, ...],
    sizes: Sizes,
    reference_hidden: torch.Tensor | None,
    reference_head: Head | torch.Tensor | None,
    chunk_bytes: int | None,
) -> Models:
    """Check shapes, dtypes, devices, and that the reference asks for no gradient. Binds symbols in `sizes`."""
    check_tensor(op, "hidden", hidden, (*shape, "hidden"), DTYPES, sizes)
    if is_dtensor(hidden):
        raise TypeError(f"{op}: hidden: expected a plain tensor, equal in all processes of the head; got a DTensor")
    head, reference_head, part = local_heads(op, head, reference_head)
    policy = check_head(op, "head", head, sizes, "hidden", hidden.device)
    check_not_empty(op, "head.weight", sizes, *(["vocabulary"] if part is None else []), "hidden")
    other, reference = policy, None
    if reference_hidden is not None:
        expected = (*shape, "reference_hidden")
        check_tensor(op, "reference_hidden", reference_hidden, expected, DTYPES, sizes, hidden.device)
        check_constant(op, "reference_hidden", reference_hidden)
        own_head = policy if reference_head is None else reference_head
        other = check_head(op, "reference_head", own_head, sizes, "reference_hidden", hidden.device)
        if other.weight is not policy.weight:
            check_constant(op, "reference_head.weight", other.weight)
        if other.bias is not None and other.bias is not policy.bias:
            check_constant(op, "reference_head.bias", other.bias)
        other_bias = None if other.bias is None else other.bias.detach()
        reference = Side(_flat(reference_hidden.detach()), other.weight.detach(), other_bias)
    elif reference_head is not None:
        raise ValueError(f"{op}: reference_head: expected with reference_hidden; got it alone")
    return Models(
        Side(_flat(hidden), policy.weight, policy.bias),
        reference,
        policy.transform,
        other.transform,
        compute_dtype(hidden),
        0 if chunk_bytes is None else check_integer(op, "chunk_bytes", chunk_bytes, 1, 2**62),
        part,
    )


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def linear_logprobs(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    targets: torch.Tensor,
    reference_hidden: torch.Tensor | None = None,
    reference_head: Head | torch.Tensor | None = None,
    *,
    beta: float | torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    kl: bool = False,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Logprobs:
    """`logprobs(hidden @ weight^T + bias, ...)` with memory for a chunk of logits only; backward computes them again.

    Differentiable in the policy's hidden states and head; gradients that are not required cost nothing. The head's is
    summed in float32. Under autocast the products have its dtype. A head may be a DTensor that tensor-parallel
    processes share: each then computes with its own slice of the vocabulary (README.md, section 4), and all get the
    same result.

    Args:
        hidden ((..., D) float32, bfloat16, float16 or float64): the policy's; one or two dimensions before D.
        head: the policy's, a Head or its weight (V, D) alone.
        targets ((...) int64): token ids; -100 is not scored.
        reference_hidden ((..., D')): the reference's hidden states, a constant.
        reference_head: the reference's; None takes the policy's, as a constant.
        beta (number or (...)): weight of the reference in the mixture, whose log-probability it asks for.
        temperature: above 0.
        entropy: asks for the policy's entropy.
        kl: asks for the exact KL(policy || reference), over the vocabulary.
        chunk_bytes: bytes of logits held at a time; None takes 64 MiB on a CPU, on a GPU 512 MiB to 2 GiB (4 GiB with
            KL or mixture), as its free memory permits.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = "linear_logprobs"
    shape = token_symbols(hidden)
    sizes: Sizes = {}
    models = check_linear(op, hidden, head, shape, sizes, reference_hidden, reference_head, chunk_bytes)
    check_tensor(op, "targets", targets, shape, INTEGERS, sizes, hidden.device)
    if reference_hidden is None and (kl or beta is not None):
        raise ValueError(f"{op}: {'kl' if kl else 'beta'}: expected only with reference_hidden; got None for it")
    check_number(op, "temperature", temperature, 0.0, open_low=True)
    extras = Extra.ENTROPY * entropy | Extra.KL * kl | Extra.MIXTURE * (beta is not None)
    weights = beta_tensor(op, beta, targets, real_dtype(models.compute))
    inputs = models.inputs(targets, weights, temperature, extras, backend)
    if torch_op.asks_for_gradient(*models.policy):
        values = _LinearLogprobs.apply(*models.policy, inputs, models.part)  # type: ignore[no-untyped-call]
    else:
        values, _ = _score(inputs, models.part)
    return as_logprobs(values, targets.shape, reference_hidden is not None, extras)
