"""logprobs: from the logits of one or two models, log-probabilities of given tokens, entropy, KL; with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import FLOATS, INTEGERS, Sizes, check_memory, check_not_empty, check_number, check_tensor, overlap
from ...core.registry import Backend, Op, register
from ...core.upstream import viewed
from .layout import (
    IGNORED,
    Extra,
    LogprobsBackwardInputs,
    LogprobsInputs,
    Normalizer,
    Output,
    Settings,
    empty_outputs,
    real_dtype,
)

_HERE = "nlhf_kernels.ops.logprobs"
DTYPES = (*FLOATS, torch.float64)


class Logprobs(NamedTuple):
    """Float32 (float64 for float64 logits), None where not requested, 0 at targets that are not scored.

    Args:
        policy (as targets): log-probability of the token under the policy.
        reference (as targets): under the reference.
        entropy (as targets): of the policy, in nats.
        kl (as targets): KL(policy || reference) over the whole vocabulary.
        mixture (as targets): log-probability under softmax((1 - beta) log pi + beta log mu).
    """

    policy: torch.Tensor
    reference: torch.Tensor | None
    entropy: torch.Tensor | None
    kl: torch.Tensor | None
    mixture: torch.Tensor | None


class LogprobsProblem(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype, ...]


def _describe(
    policy_logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    reference_logits: torch.Tensor | None = None,
    **_: object,
) -> LogprobsProblem:
    return problem_of(policy_logits, reference_logits)


def problem_of(policy_logits: torch.Tensor, reference_logits: torch.Tensor | None) -> LogprobsProblem:
    """Describe a call by its logits, of any shape."""
    logits = [policy_logits] if reference_logits is None else [policy_logits, reference_logits]
    return LogprobsProblem(policy_logits.device, tuple(model.dtype for model in logits))


def no_float64(problem: LogprobsProblem) -> list[str]:
    wrong = torch.float64 in problem.dtypes
    return ["dtype: the kernels compute in float32; float64 is for the backend torch"] if wrong else []


def _backend(name: str, module: str, suffix: str) -> Backend:
    limits = no_float64 if name != "torch" else (lambda problem: [])
    return Backend(name, f"{module}:logprobs{suffix}", limits, backward=f"{module}:logprobs_backward{suffix}")


OP = register(
    Op(
        name="logprobs",
        backends=(
            _backend("torch", f"{_HERE}.oracle", ""),
            _backend("triton", f"{_HERE}.triton_kernels", ""),
            _backend("cpu", f"{_HERE}.native", "_cpu"),
        ),
        order={"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
        absent={
            "cuda": "two passes over logits that memory bounds: Triton streams them; a CUDA kernel waits for a "
            "measurement that shows bandwidth left"
        },
    )
)


def _run(inputs: LogprobsInputs) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = _checked(inputs)
    check_targets(OP.name, inputs.targets, inputs.policy.shape[1])
    result: tuple[torch.Tensor, torch.Tensor] = _resolve(inputs).run(inputs)
    return result


def _checked(inputs: LogprobsInputs) -> LogprobsInputs:
    """Check the operands; return them with contiguous targets."""
    policy, reference, targets, beta, settings, backend = inputs
    shape, device = policy.shape, policy.device
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"{OP.name}: policy: expected (N, V), at least one token; got {tuple(shape)}")
    check_memory(OP.name, "policy", policy, shape, DTYPES, device, "rows")
    if reference is not None:
        check_memory(OP.name, "reference", reference, shape, DTYPES, device, "rows")
    check_memory(OP.name, "targets", targets, (shape[0],), INTEGERS, device, "any")
    check_beta(OP.name, beta, shape[0], real_dtype(policy.dtype), device)
    check_extras(OP.name, settings.extras, reference is not None, beta is not None)
    return LogprobsInputs(policy, reference, targets.contiguous(), beta, settings, backend)


def _resolve(inputs: LogprobsInputs) -> Backend:
    return OP.resolve(inputs.backend, problem_of(inputs.policy, inputs.reference))


def check_beta(op: str, beta: torch.Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> None:
    if beta is not None:
        check_memory(op, "beta", beta, (count,) if beta.ndim else (), (dtype,), device)


def check_extras(op: str, extras: int, with_reference: bool, with_beta: bool) -> None:
    if extras & (Extra.KL | Extra.MIXTURE) and not with_reference:
        raise ValueError(f"{op}: extras: KL and mixture need the reference; got {extras} without")
    if extras & Extra.MIXTURE and not with_beta:
        raise ValueError(f"{op}: extras: the mixture needs beta; got {extras} without")


def check_saved(op: str, saved: dict[str, torch.Tensor], count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check what backward takes beside the forward's inputs."""
    for name, tensor in saved.items():
        outputs = len(Normalizer) if name == "normalizers" else len(Output)
        check_memory(op, name, tensor, (outputs, count), (dtype,), device, "any")


def _run_backward(inputs: LogprobsBackwardInputs) -> torch.Tensor:
    out = torch.empty_like(inputs.forward.policy, memory_format=torch.contiguous_format)
    _write_gradient(inputs, out)
    return out


def _run_backward_in_place(inputs: LogprobsBackwardInputs) -> None:
    policy = inputs.forward.policy
    if not rows_apart(policy):
        raise ValueError(f"{OP.name}: policy: expected rows that share no memory; got strides {policy.stride()}")
    _check_not_the_reference(OP.name, policy, inputs.forward.reference)
    _write_gradient(inputs, policy)


def _write_gradient(inputs: LogprobsBackwardInputs, out: torch.Tensor) -> None:
    values, normalizers, upstream, forward = inputs
    forward = _checked(forward)
    saved = {"values": values, "normalizers": normalizers, "upstream": upstream}
    check_saved(OP.name, saved, forward.policy.shape[0], real_dtype(forward.policy.dtype), forward.policy.device)
    contiguous = LogprobsBackwardInputs(values.contiguous(), normalizers.contiguous(), upstream.contiguous(), forward)
    _resolve(forward).run_backward(contiguous, out)


_operator = torch_op.define("logprobs", LogprobsInputs, "(Tensor, Tensor)", _run, empty_outputs)
_backward = torch_op.define(
    "logprobs_backward",
    LogprobsBackwardInputs,
    "Tensor",
    _run_backward,
    lambda inputs: torch.empty_like(inputs.forward.policy, memory_format=torch.contiguous_format),
)
_backward_in_place = torch_op.define(
    "logprobs_backward_",
    LogprobsBackwardInputs,
    "()",
    _run_backward_in_place,
    lambda inputs: None,
    overwrites="forward_policy",
)


class _Logprobs(torch.autograd.Function):
    """The operator with its gradient with respect to `inputs.policy`, its only differentiable argument."""

    @staticmethod
    def forward(ctx: Any, policy: torch.Tensor, inputs: LogprobsInputs, overwrite: bool) -> Any:
        values, normalizers = _operator(inputs)
        ctx.save_for_backward(policy, inputs.reference, inputs.targets, inputs.beta, values, normalizers)
        ctx.settings, ctx.backend, ctx.overwrite = inputs.settings, inputs.backend, overwrite
        return values

    @staticmethod
    @torch_op.differentiable_once
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        policy, reference, targets, beta, values, normalizers = ctx.saved_tensors
        forward = LogprobsInputs(policy, reference, targets, beta, ctx.settings, ctx.backend)
        inputs = LogprobsBackwardInputs(values, normalizers, upstream, forward)
        if not ctx.overwrite:
            return _backward(inputs), None, None
        _backward_in_place(inputs)
        torch.autograd.graph.increment_version(policy)  # so that autograd raises if the saved logits are used again
        return policy, None, None


def logprobs(
    policy_logits: torch.Tensor,
    targets: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
    *,
    beta: float | torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    kl: bool = False,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> Logprobs:
    """Score `targets` under the policy and, where its logits are given, under the reference.

    Outputs are of softmax(logits / temperature) and differentiable in the policy's logits. Shift the targets, not the
    logits: `logits[:, :-1]` would be copied. On a GPU a target outside [0, V) gives NaN in its row; on a CPU it raises.

    Args:
        policy_logits ((..., V) float32, bfloat16, float16 or float64): one or two dimensions before V.
        targets ((...) int64): token ids; -100 is not scored.
        reference_logits ((..., V), its dtype its own): a constant.
        beta (number or (...)): weight of the reference in the mixture, whose log-probability it asks for.
        temperature: above 0.
        entropy: asks for the policy's entropy.
        kl: asks for the exact KL(policy || reference), over the vocabulary.
        overwrite_logits: backward writes the gradient over the policy's logits, which takes no second (N, V) buffer and
            permits one backward. The reference's must then lie in memory of their own.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = "logprobs"
    shape = token_symbols(policy_logits)
    sizes: Sizes = {}
    check_tensor(op, "policy_logits", policy_logits, (*shape, "vocabulary"), DTYPES, sizes)
    device = policy_logits.device
    check_tensor(op, "targets", targets, shape, INTEGERS, sizes, device)
    check_not_empty(op, "policy_logits", sizes, "vocabulary")
    if reference_logits is not None:
        check_tensor(op, "reference_logits", reference_logits, (*shape, "vocabulary"), DTYPES, sizes, device)
        check_constant(op, "reference_logits", reference_logits)
    elif kl or beta is not None:
        raise ValueError(f"{op}: {'kl' if kl else 'beta'}: expected only with reference_logits; got None for them")
    check_number(op, "temperature", temperature, 0.0, open_low=True)
    rows, reference = _rows(policy_logits), None if reference_logits is None else _rows(reference_logits)
    if overwrite_logits:
        _check_may_be_overwritten(op, policy_logits)
        overwrite_logits = rows_apart(rows)  # rows that share memory are not overwritten
        if not torch.compiler.is_compiling():  # which has no addresses; backward checks too
            _check_not_the_reference(op, rows, reference)
    extras = Extra.ENTROPY * entropy | Extra.KL * kl | Extra.MIXTURE * (beta is not None)
    inputs = LogprobsInputs(
        rows,
        reference,
        targets.reshape(-1),
        beta_tensor(op, beta, targets, real_dtype(policy_logits.dtype)),
        Settings(temperature, extras=extras),
        backend or "",
    )
    if torch_op.asks_for_gradient(rows):
        values = _Logprobs.apply(rows, inputs, overwrite_logits)  # type: ignore[no-untyped-call]
    else:
        values, _ = _operator(inputs)
    return as_logprobs(values, targets.shape, reference_logits is not None, extras)


def as_logprobs(values: torch.Tensor, shape: Sequence[int], with_reference: bool, extras: int) -> Logprobs:
    """Return the rows of `values` under their names."""

    def row(output: Output, computed: bool | int) -> torch.Tensor | None:
        return values[output].reshape(shape) if computed else None

    return Logprobs(
        values[Output.POLICY].reshape(shape),
        row(Output.REFERENCE, with_reference),
        row(Output.ENTROPY, extras & Extra.ENTROPY),
        row(Output.KL, extras & Extra.KL),
        row(Output.MIXTURE, extras & Extra.MIXTURE),
    )


def beta_tensor(
    op: str, beta: float | torch.Tensor | None, targets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return beta as the kernels read it: () for all rows, or (N,)."""
    if beta is None:
        return None
    if isinstance(beta, torch.Tensor):
        if beta.ndim and beta.shape != targets.shape:
            raise ValueError(f"{op}: beta: expected a number or shape {tuple(targets.shape)}; got {tuple(beta.shape)}")
        check_constant(op, "beta", beta)
        return beta.to(targets.device, dtype).reshape(-1 if beta.ndim else ()).contiguous()
    return torch.full((), check_number(op, "beta", beta), dtype=dtype, device=targets.device)


def check_constant(op: str, name: str, value: torch.Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name}: expected a constant, no gradient goes there; got a tensor that requires grad")


def rows_apart(rows: torch.Tensor) -> bool:
    """Return whether no two rows share memory."""
    return len(rows) < 2 or rows.stride()[0] >= rows.shape[1]


def _check_not_the_reference(op: str, policy: torch.Tensor, reference: torch.Tensor | None) -> None:
    """Refuse shared memory: a row of the reference overwritten by a gradient would make the next ones wrong."""
    if reference is not None and overlap(policy, reference):
        raise ValueError(
            f"{op}: overwrite_logits: expected reference logits in memory of their own; got some that share it with "
            "the policy's"
        )


def _check_may_be_overwritten(op: str, logits: torch.Tensor) -> None:
    home = viewed(logits)
    if home.is_leaf and home.requires_grad:
        raise ValueError(
            f"{op}: overwrite_logits: expected logits that a model computed; got a leaf, its gradient's home"
        )


def check_targets(op: str, targets: torch.Tensor, vocabulary: int) -> None:
    """Check on the CPU, where reading values needs no synchronisation; in the operator, so also when compiled."""
    if targets.device.type == "cpu" and targets.numel():
        wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocabulary)
        if bool(wrong.any()):
            value = int(targets[wrong][0])
            raise ValueError(f"{op}: targets: expected token ids in [0, {vocabulary}) or {IGNORED}; got {value}")


def token_symbols(vectors: object) -> tuple[str, ...]:
    """Return the symbolic shape of tokens that have a vector each: (N, D) or (B, T, D); vectors of no such shape are
    refused for it later."""
    ndim = vectors.ndim if isinstance(vectors, torch.Tensor) else 2
    return {2: ("tokens",), 3: ("sequences", "tokens")}.get(ndim, ("...",))


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Return (N, V) with contiguous columns; the rows may lie further apart."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
