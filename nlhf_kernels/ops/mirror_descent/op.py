"""mirror_descent: many steps of regularised mirror descent on many preference games, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core import torch_op
from ...core.checks import REALS, Sizes, check_is_tensor, check_not_empty, check_number, check_option, check_tensor
from ...core.registry import Backend, Measured, Op, register

_HERE = "nlhf_kernels.ops.mirror_descent"
OPPONENTS = ("mixture", "policy")
_FIXED = "fixed"  # the operator's name for log_opponent as the opponent in every step


class MirrorDescentInputs(NamedTuple):
    log_policy: torch.Tensor  # (G, A) float32 or float64, as all of them
    preference: torch.Tensor  # (G, A, A), [g, a, b] = P(a > b)
    log_reference: torch.Tensor  # (G, A)
    tau: torch.Tensor  # () or (G,)
    step_sizes: torch.Tensor  # (K,)
    opponent: str  # "mixture", "policy" or "fixed"
    log_opponent: torch.Tensor | None  # (G, A), where the opponent is fixed
    backend: str


class MirrorDescentProblem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    actions: int


def _describe(log_policy: torch.Tensor, *_: object, **__: object) -> MirrorDescentProblem:
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


#: Microseconds a step of cuda, triton and torch (captured), games x actions:
#: 1024 x 64 float32  1.04  1.62  58      64 x 512 float32   23.6  -  71
#: 1024 x 64 float64  2.06  12.9  67       8 x 2048 float32  270   -  92
#: The last is of one block a game. cuda takes several there now, which nothing has measured.
_MEASURED = "medians of captured graphs on one H200, torch 2.11, triton 3.6, 2026-11-26, kernels of 765053e"

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
        measured=(
            Measured("cuda", "up to 512 actions", lambda problem: problem.actions <= 512, ("cuda", "triton", "torch"),
                     _MEASURED),
        ),
    )
)  # fmt: skip


def _check(inputs: MirrorDescentInputs) -> None:
    log_policy, preference, log_reference, tau, step_sizes, opponent, log_opponent, _ = inputs
    op = OP.name
    sizes: Sizes = {}
    check_tensor(op, "log_policy", log_policy, ("games", "actions"), REALS, sizes)
    device, same = log_policy.device, (log_policy.dtype,)
    check_tensor(op, "preference", preference, ("games", "actions", "actions"), same, sizes, device)
    check_tensor(op, "log_reference", log_reference, ("games", "actions"), same, sizes, device)
    check_tensor(op, "step_sizes", step_sizes, ("iterations",), same, sizes, device)
    check_not_empty(op, "log_policy", sizes, "actions")
    check_tensor(op, "tau", tau, ("games",) if tau.ndim else (), same, sizes, device)
    check_option(op, "opponent", opponent, (*OPPONENTS, _FIXED))
    if (log_opponent is not None) is not (opponent == _FIXED):
        raise ValueError(f"{op}: log_opponent: expected with the opponent {_FIXED!r} and not without; got {opponent!r}")
    if log_opponent is not None:
        check_tensor(op, "opponent", log_opponent, ("games", "actions"), same, sizes, device)


def _run(inputs: MirrorDescentInputs) -> torch.Tensor:
    _check(inputs)
    contiguous = MirrorDescentInputs._make(
        value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs
    )
    result: torch.Tensor = OP.resolve(inputs.backend, _describe(inputs.log_policy)).run(contiguous)
    return result


def _fake(inputs: MirrorDescentInputs) -> torch.Tensor:
    _check(inputs)
    return torch.empty_like(inputs.log_policy, memory_format=torch.contiguous_format)


_operator = torch_op.define("mirror_descent", MirrorDescentInputs, "Tensor", _run, _fake)


def mirror_descent(
    log_policy: torch.Tensor,
    preference: torch.Tensor,
    log_reference: torch.Tensor,
    *,
    tau: float | torch.Tensor,
    step_sizes: torch.Tensor,
    opponent: str | torch.Tensor = "mixture",
    backend: str | None = None,
) -> torch.Tensor:  # (G, A)
    """Run K steps of mirror descent in G preference games of A actions; return the last log-policies.

    One step of size eta moves the policy towards the reference and then along its win probabilities:

        log pi <- (1 - eta tau) log pi + eta tau log mu + eta P(. > opponent) + const

    Not differentiable; gradients are not recorded.

    Args:
        log_policy ((G, A) float32 or float64): the initial policy; need not be normalised.
        preference ((G, A, A)): [g, a, b] is P(a > b).
        log_reference ((G, A)): log mu.
        tau (number or (G,)): strength of the regularisation.
        step_sizes ((K,)): eta of every step.
        opponent (str or (G, A)): "mixture" is the policy's geometric mixture with the reference (Nash-MD), "policy" the
            policy itself (online mirror descent), a tensor the log-probabilities of the opponent in every step.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = OP.name
    tensors = {"log_policy": log_policy, "preference": preference, "log_reference": log_reference}
    for name, value in {**tensors, "step_sizes": step_sizes}.items():
        check_is_tensor(op, name, value)
    if not isinstance(tau, torch.Tensor):
        tau = torch.full((), check_number(op, "tau", tau, 0.0), dtype=log_policy.dtype, device=log_policy.device)
    log_opponent = None
    if isinstance(opponent, torch.Tensor):
        log_opponent, opponent = opponent.detach(), _FIXED
    else:
        check_option(op, "opponent", opponent, OPPONENTS)
    return _operator(
        MirrorDescentInputs(
            log_policy.detach(),
            preference.detach(),
            log_reference.detach(),
            tau.detach(),
            step_sizes.detach(),
            opponent,
            log_opponent,
            backend or "",
        )
    )
