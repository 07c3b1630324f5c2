"""logprobs: from the logits of one or two models, log-probabilities of given tokens, entropy, KL; with gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import FLOATS, INTEGERS, Sizes, check_memory, check_not_empty, check_number, check_tensor, overlap
from ...core.registry import Backend, Op, register
from ...core.upstream import viewed
from .layout import IGNORED, Normalizer, Output, Settings, Want, real_dtype

_HERE = "nlhf_kernels.ops.logprobs"
DTYPES = (*FLOATS, torch.float64)


class Logprobs(NamedTuple):
    """Shaped like the targets, float32 (float64 for float64 logits); None where not asked for, 0 where ignored."""

    policy: torch.Tensor
    reference: torch.Tensor | None
    entropy: torch.Tensor | None  # of the policy, in nats
    kl: torch.Tensor | None  # KL(policy || reference) over the whole vocabulary
    mixture: torch.Tensor | None  # of the token under softmax((1 - beta) log pi + beta log mu)


class LogprobsProblem(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype, ...]


def _describe(policy_logits: torch.Tensor, targets: Any = None, reference_logits: Any = None, **_: Any) -> Any:
    logits = [policy_logits] if reference_logits is None else [policy_logits, reference_logits]
    return LogprobsProblem(policy_logits.device, tuple(model.dtype for model in logits))


def no_float64(problem: Any) -> list[str]:
    return ["dtype: the kernels compute in float32; float64 is for the backend torch"] * (
        torch.float64 in problem.dtypes
    )


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


def _run(policy: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    reference, targets, beta, numbers, wanted, backend = arguments
    _check_operands(policy, reference, targets, beta, wanted)
    check_targets(OP.name, targets, policy.shape[1])
    chosen = OP.resolve(backend, _describe(policy, targets, reference))
    result: tuple[torch.Tensor, torch.Tensor] = chosen.run(
        policy, reference, targets.contiguous(), beta, Settings.of(numbers, wanted)
    )
    return result


def _check_operands(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    targets: torch.Tensor,
    beta: torch.Tensor | None,
    wanted: int,
) -> None:
    shape, device = policy.shape, policy.device
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"{OP.name}: policy: expected (N, V), at least one token; got {tuple(shape)}")
    check_memory(OP.name, "policy", policy, shape, DTYPES, device, "rows")
    if reference is not None:
        check_memory(OP.name, "reference", reference, shape, DTYPES, device, "rows")
    check_memory(OP.name, "targets", targets, (shape[0],), INTEGERS, device, "any")
    check_beta(OP.name, beta, shape[0], real_dtype(policy.dtype), device)
    check_wanted(OP.name, wanted, reference is not None, beta is not None)


def check_beta(op: str, beta: torch.Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> None:
    if beta is not None:
        check_memory(op, "beta", beta, (count,) if beta.ndim else (), (dtype,), device)


def check_wanted(op: str, wanted: int, with_reference: bool, with_beta: bool) -> None:
    if wanted & (Want.KL | Want.MIXTURE) and not with_reference:
        raise ValueError(f"{op}: wanted: KL and mixture need the reference; got {wanted} without")
    if wanted & Want.MIXTURE and not with_beta:
        raise ValueError(f"{op}: wanted: the mixture needs beta; got {wanted} without")


def check_saved(op: str, saved: dict[str, torch.Tensor], count: int, dtype: torch.dtype, device: torch.device) -> None:
    """What backward gets beside the forward's inputs."""
    for name, tensor in saved.items():
        outputs = len(Normalizer) if name == "normalizers" else len(Output)
        check_memory(op, name, tensor, (outputs, count), (dtype,), device, "any")


def _fake(policy: torch.Tensor, reference: Any, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    real, count = real_dtype(policy.dtype), targets.shape[0]
    return policy.new_empty((5, count), dtype=real), policy.new_empty((6, count), dtype=real)


def _run_backward(policy: torch.Tensor, *arguments: Any) -> torch.Tensor:
    out = torch.empty_like(policy, memory_format=torch.contiguous_format)
    _gradient_into(out, policy, *arguments)
    return out


def _run_backward_in_place(policy: torch.Tensor, reference: torch.Tensor | None, *arguments: Any) -> None:
    if not rows_apart(policy):
        raise ValueError(f"{OP.name}: policy: expected rows that share no memory; got strides {policy.stride()}")
    _check_not_the_reference(OP.name, policy, reference)
    _gradient_into(policy, policy, reference, *arguments)


def _gradient_into(out: torch.Tensor, policy: torch.Tensor, *arguments: Any) -> None:
    reference, targets, beta, values, normalizers, upstream, numbers, wanted, backend = arguments
    _check_operands(policy, reference, targets, beta, wanted)
    saved = {"values": values, "normalizers": normalizers, "upstream": upstream}
    check_saved(OP.name, saved, policy.shape[0], real_dtype(policy.dtype), policy.device)
    chosen = OP.resolve(backend, _describe(policy, targets, reference))
    settings = Settings.of(numbers, wanted)
    parts = (part.contiguous() for part in saved.values())
    chosen.run_backward(policy, reference, targets.contiguous(), beta, *parts, settings, out)


def _fake_backward(policy: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(policy, memory_format=torch.contiguous_format)


_FORWARD = "Tensor? reference, Tensor targets, Tensor? beta, "
_NUMBERS = "float[] numbers, int wanted, str backend) -> "
_SAVED = "Tensor values, Tensor normalizers, Tensor upstream, "
_operator = torch_op.define("logprobs", f"(Tensor policy, {_FORWARD}{_NUMBERS}(Tensor, Tensor)", _run, _fake)
_backward = torch_op.define(
    "logprobs_backward", f"(Tensor policy, {_FORWARD}{_SAVED}{_NUMBERS}Tensor", _run_backward, _fake_backward
)
_backward_in_place = torch_op.define(
    "logprobs_backward_",
    f"(Tensor(a!) policy, {_FORWARD}{_SAVED}{_NUMBERS}()",
    _run_backward_in_place,
    lambda *_: None,
)


def _save(inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return (*inputs[:4], *output)


def _gradients(needs: Any, saved: Any, inputs: Any, upstream: torch.Tensor, _: Any) -> tuple[Any, ...]:
    numbers, wanted, backend = inputs[4:]
    gradient = _backward(*saved, upstream, numbers, wanted, backend)
    return gradient, None, None, None, None, None, None


def _gradients_in_place(needs: Any, saved: Any, inputs: Any, upstream: torch.Tensor, _: Any) -> tuple[Any, ...]:
    numbers, wanted, backend = inputs[4:]
    policy = saved[0]
    _backward_in_place(*saved, upstream, numbers, wanted, backend)
    torch.autograd.graph.increment_version(policy)  # whoever saved the logits hears that they are gone
    return policy, None, None, None, None, None, None


_differentiable = torch_op.differentiable(_operator, _save, _gradients)
_overwriting = torch_op.differentiable(_operator, _save, _gradients_in_place)


def logprobs(
    policy_logits: torch.Tensor,  # (..., V) float32, bfloat16, float16 or float64
    targets: torch.Tensor,  # (...) int64; -100: not scored
    reference_logits: torch.Tensor | None = None,  # (..., V), its dtype its own; a constant
    *,
    beta: float | torch.Tensor | None = None,  # number or (...); asks for the mixture
    temperature: float = 1.0,
    entropy: bool = False,
    kl: bool = False,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> Logprobs:
    """Score `targets` under the policy and, where its logits are given, under the reference.

    Everything is of softmax(logits / temperature) and differentiable in the policy's logits. entropy, kl (exact, over
    the vocabulary) and the log-probability under the geometric mixture of weight `beta` are computed where asked for.
    overwrite_logits lets backward write the gradient over the policy's logits: no second (N, V) buffer, one backward.
    The reference's must then lie in memory of their own.

    Shift the targets, not the logits: `logits[:, :-1]` would be copied. On a GPU a target outside [0, V) gives NaN in
    its row; on a CPU it raises.
    """
    op = "logprobs"
    shape = _symbols(policy_logits)
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
        overwrite_logits = rows_apart(rows)  # others keep their logits
        if not torch.compiler.is_compiling():  # which knows no addresses; backward looks too
            _check_not_the_reference(op, rows, reference)
    wanted = Want.ENTROPY * entropy | Want.KL * kl | Want.MIXTURE * (beta is not None)
    numbers, wanted = Settings(temperature, wanted=wanted).flat()
    values, _ = (_overwriting if overwrite_logits else _differentiable)(
        rows,
        reference,
        targets.reshape(-1),
        beta_tensor(op, beta, targets, real_dtype(policy_logits.dtype)),
        numbers,
        wanted,
        backend or "",
    )
    return as_logprobs(values, targets.shape, reference_logits is not None, wanted)


def as_logprobs(values: torch.Tensor, shape: Any, with_reference: bool, wanted: int) -> Logprobs:
    """The rows of `values` under their names."""

    def row(output: Output, given: bool | int) -> torch.Tensor | None:
        return values[output].reshape(shape) if given else None

    return Logprobs(
        values[Output.POLICY].reshape(shape),
        row(Output.REFERENCE, with_reference),
        row(Output.ENTROPY, wanted & Want.ENTROPY),
        row(Output.KL, wanted & Want.KL),
        row(Output.MIXTURE, wanted & Want.MIXTURE),
    )


def beta_tensor(
    op: str, beta: float | torch.Tensor | None, targets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """beta as the kernels read it: () for all rows, or (N,)."""
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
    """Whether no two rows share memory."""
    return len(rows) < 2 or rows.stride()[0] >= rows.shape[1]


def _check_not_the_reference(op: str, policy: torch.Tensor, reference: torch.Tensor | None) -> None:
    """A row of the reference that an earlier row's gradient was written over would give a wrong gradient."""
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
    """On the CPU, where looking costs no synchronisation. Runs inside the operator: a compiled graph checks too."""
    if targets.device.type == "cpu" and targets.numel():
        wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocabulary)
        if bool(wrong.any()):
            value = int(targets[wrong][0])
            raise ValueError(f"{op}: targets: expected token ids in [0, {vocabulary}) or {IGNORED}; got {value}")


def _symbols(logits: object) -> tuple[str, ...]:
    ndim = logits.ndim if isinstance(logits, torch.Tensor) else 2
    return {2: ("tokens",), 3: ("sequences", "tokens")}.get(ndim, ("...",))


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """(N, V) with contiguous columns; the rows may lie further apart."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
