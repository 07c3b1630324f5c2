"""mirror_descent: many steps of regularised mirror descent on many preference games, in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import (
    REALS,
    Sizes,
    check_is_tensor,
    check_not_empty,
    check_number,
    check_option,
    check_tensor,
)
from ...core.registry import Backend, Op, register

_HERE = "nlhf_kernels.ops.mirror_descent"
OPPONENTS = ("mixture", "policy")
_GIVEN = "given"  # the opponent that is a tensor, in the operator's words


class MirrorDescentProblem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    actions: int


def _describe(log_policy: torch.Tensor, *_: Any, **__: Any) -> MirrorDescentProblem:
    return MirrorDescentProblem(log_policy.device, log_policy.dtype, log_policy.shape[1])


def _triton_limits(problem: MirrorDescentProblem) -> list[str]:
    most = 64 if problem.dtype == torch.float64 else 128
    if problem.actions > most:
        dtype = str(problem.dtype).removeprefix("torch.")
        return [f"actions: the matrix is kept in registers, at most {most} in {dtype}; got {problem.actions}"]
    return []


def _cuda_limits(problem: MirrorDescentProblem) -> list[str]:
    if problem.actions > 8192:
        return [f"actions: a game's vectors are kept in shared memory, at most 8192; got {problem.actions}"]
    return []


OP = register(
    Op(
        name="mirror_descent",
        backends=(
            Backend("torch", f"{_HERE}.oracle:mirror_descent"),
            Backend("triton", f"{_HERE}.triton_kernels:mirror_descent", _triton_limits),
            Backend("cuda", f"{_HERE}.native:mirror_descent_cuda", _cuda_limits),
            Backend("cpu", f"{_HERE}.native:mirror_descent_cpu"),
        ),
        order={"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
    )
)


def _check(
    log_policy: torch.Tensor,
    preference: torch.Tensor,
    log_reference: torch.Tensor,
    tau: torch.Tensor,
    step_sizes: torch.Tensor,
    opponent: str,
    log_opponent: torch.Tensor | None,
) -> None:
    op = OP.name
    sizes: Sizes = {}
    check_tensor(op, "log_policy", log_policy, ("games", "actions"), REALS, sizes)
    device, same = log_policy.device, (log_policy.dtype,)
    check_tensor(op, "preference", preference, ("games", "actions", "actions"), same, sizes, device)
    check_tensor(op, "log_reference", log_reference, ("games", "actions"), same, sizes, device)
    check_tensor(op, "step_sizes", step_sizes, ("iterations",), same, sizes, device)
    check_not_empty(op, "log_policy", sizes, "actions")
    check_tensor(op, "tau", tau, ("games",) if tau.ndim else (), same, sizes, device)
    check_option(op, "opponent", opponent, (*OPPONENTS, _GIVEN))
    if (log_opponent is not None) is not (opponent == _GIVEN):
        raise ValueError(f"{op}: log_opponent: expected with the opponent {_GIVEN!r} and not without; got {opponent!r}")
    if log_opponent is not None:
        check_tensor(op, "opponent", log_opponent, ("games", "actions"), same, sizes, device)


def _run(*arguments: Any) -> torch.Tensor:
    *call, backend = arguments
    _check(*call)
    run = OP.resolve(backend, _describe(*call)).run
    result: torch.Tensor = run(*(x.contiguous() if isinstance(x, torch.Tensor) else x for x in call))
    return result


def _fake(log_policy: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *call, _ = arguments
    _check(log_policy, *call)
    return torch.empty_like(log_policy, memory_format=torch.contiguous_format)


_operator = torch_op.define(
    "mirror_descent",
    "(Tensor log_policy, Tensor preference, Tensor log_reference, Tensor tau, Tensor step_sizes, str opponent,"
    " Tensor? log_opponent, str backend) -> Tensor",
    _run,
    _fake,
)


def mirror_descent(
    log_policy: torch.Tensor,  # (G, A) float32 or float64, unnormalised is fine
    preference: torch.Tensor,  # (G, A, A), [g, a, b] = P(a > b)
    log_reference: torch.Tensor,  # (G, A)
    *,
    tau: float | torch.Tensor,  # number or (G,)
    step_sizes: torch.Tensor,  # (K,)
    opponent: str | torch.Tensor = "mixture",  # or (G, A) log-probabilities
    backend: str | None = None,
) -> torch.Tensor:  # (G, A) log-probabilities
    """Play K steps of mirror descent in G preference games of A actions and return the last policies.

    One step of size eta moves the policy towards the reference and then along its chances of winning:

        log pi <- (1 - eta tau) log pi + eta tau log mu + eta P(. > opponent) + const

    opponent "mixture" plays against the policy's geometric mixture with the reference (Nash-MD), "policy" against the
    policy itself (online mirror descent), a tensor against the policies it holds, the same in every step. Not
    differentiable; gradients are not recorded.
    """
    op = OP.name
    tensors = {"log_policy": log_policy, "preference": preference, "log_reference": log_reference}
    for name, value in {**tensors, "step_sizes": step_sizes}.items():
        check_is_tensor(op, name, value)
    if not isinstance(tau, torch.Tensor):
        tau = torch.full((), check_number(op, "tau", tau, 0.0), dtype=log_policy.dtype, device=log_policy.device)
    log_opponent = None
    if isinstance(opponent, torch.Tensor):
        log_opponent, opponent = opponent.detach(), _GIVEN
    else:
        check_option(op, "opponent", opponent, OPPONENTS)
    plain = (tensor.detach() for tensor in (*tensors.values(), tau, step_sizes))
    result: torch.Tensor = _operator(*plain, opponent, log_opponent, backend or "")
    return result
