"""mirror_descent: many steps of regularised mirror descent on many preference games, in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import torch_op
from ...core.checks import REALS, Sizes, check_not_empty, check_number, check_option, check_tensor
from ...core.registry import Backend, Op, register

_HERE = "nlhf_kernels.ops.mirror_descent"
OPPONENTS = ("mixture", "policy")


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
            Backend("reference", f"{_HERE}.reference:mirror_descent"),
            Backend("triton", f"{_HERE}.triton_kernels:mirror_descent", _triton_limits),
            Backend("cuda", f"{_HERE}.native:mirror_descent_cuda", _cuda_limits),
            Backend("cpu", f"{_HERE}.native:mirror_descent_cpu"),
        ),
        order={"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")},
        describe=_describe,
    )
)


def _run(*arguments: Any) -> torch.Tensor:
    *problem, backend = arguments
    result: torch.Tensor = OP.resolve(backend, _describe(*problem)).run(*problem)
    return result


def _fake(log_policy: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(log_policy)


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
    op = "mirror_descent"
    sizes: Sizes = {}
    check_tensor(op, "log_policy", log_policy, ("games", "actions"), REALS, sizes)
    same = (log_policy.dtype,)
    device = log_policy.device
    check_tensor(op, "preference", preference, ("games", "actions", "actions"), same, sizes, device)
    check_tensor(op, "log_reference", log_reference, ("games", "actions"), same, sizes, device)
    check_tensor(op, "step_sizes", step_sizes, ("iterations",), same, sizes, device)
    check_not_empty(op, "log_policy", sizes, "actions")
    if isinstance(opponent, torch.Tensor):
        log_opponent = check_tensor(op, "opponent", opponent, ("games", "actions"), same, sizes, device)
        log_opponent, opponent = log_opponent.detach().contiguous(), "given"
    else:
        log_opponent, opponent = None, check_option(op, "opponent", opponent, OPPONENTS)
    if isinstance(tau, torch.Tensor):
        check_tensor(op, "tau", tau, ("games",) if tau.ndim else (), same, sizes, device)
    else:
        tau = torch.full((), check_number(op, "tau", tau, 0.0), dtype=log_policy.dtype, device=device)
    inputs = (log_policy, preference, log_reference, tau, step_sizes)
    plain = (tensor.detach().contiguous() for tensor in inputs)
    result: torch.Tensor = _operator(*plain, opponent, log_opponent, backend or "")
    return result
