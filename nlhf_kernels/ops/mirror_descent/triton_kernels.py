"""mirror_descent in Triton: one program per game, its preference matrix in registers while all iterations run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.native import on_device
from .op import MirrorDescentInputs

_MATRIX_BYTES_PER_THREAD = 256  # 64 registers: the largest supported matrix, 64 KiB, takes 8 warps without spills


@triton.jit
def _log_softmax(x):
    shifted = x - tl.max(x, axis=0)
    return shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))


@triton.jit
def mirror_descent_kernel(
    log_policy,  # (games, actions)
    preference,  # (games, actions, actions)
    log_reference,  # (games, actions)
    tau,  # () or (games,)
    step_sizes,  # (iterations,)
    log_opponent,  # (games, actions); read where OPPONENT is "fixed" only
    out,  # (games, actions)
    actions,
    iterations,
    tau_stride,
    OPPONENT: tl.constexpr,  # "mixture", "policy" or "fixed"
    BLOCK: tl.constexpr,  # a power of two >= actions
):
    game = tl.program_id(0).to(tl.int64)
    action = tl.arange(0, BLOCK)
    inside = action < actions
    log_pi = tl.load(log_policy + game * actions + action, mask=inside, other=float("-inf"))
    log_mu = tl.load(log_reference + game * actions + action, mask=inside, other=float("-inf"))
    row = preference + game * actions * actions + action[:, None] * actions
    wins = tl.load(row + action[None, :], mask=inside[:, None] & inside[None, :], other=0.0)
    game_tau = tl.load(tau + game * tau_stride)
    for k in range(iterations):
        step = tl.load(step_sizes + k)
        b = step * game_tau
        # At b = 0 or b = 1 the term of weight 0 is left out: 0 * -inf is NaN.
        own = tl.where(b == 1, tl.where(inside, 0.0, float("-inf")), (1 - b) * log_pi)
        pulled = tl.where(b == 0, 0.0, b * log_mu)
        mixture = tl.where(inside, own + pulled, float("-inf"))
        if OPPONENT == "fixed":
            played = tl.load(log_opponent + game * actions + action, mask=inside, other=float("-inf"))
        elif OPPONENT == "mixture":
            played = mixture
        else:
            played = log_pi
        top = tl.max(played, axis=0)
        weights = tl.exp(played - top)
        rival = weights / tl.sum(weights, axis=0)
        # Without `- top` a constant accumulates, towards 1 / (2 tau), and float32 loses the last digits.
        log_pi = (mixture - top) + step * tl.sum(wins * rival[None, :], axis=1)
    tl.store(out + game * actions + action, _log_softmax(log_pi), mask=inside)


def mirror_descent(inputs: MirrorDescentInputs) -> torch.Tensor:
    log_policy, preference, log_reference, tau, step_sizes, opponent, log_opponent, _ = inputs
    games, actions = log_policy.shape
    out = torch.empty_like(log_policy)
    block = triton.next_power_of_2(actions)
    warps = block * block * log_policy.element_size() // (32 * _MATRIX_BYTES_PER_THREAD)
    if games:
        with on_device(log_policy.device):
            mirror_descent_kernel[(games,)](
                log_policy,
                preference,
                log_reference,
                tau,
                step_sizes,
                log_policy if log_opponent is None else log_opponent,
                out,
                actions,
                step_sizes.numel(),
                tau.ndim,
                OPPONENT=opponent,
                BLOCK=block,
                num_warps=max(1, warps),
            )
    return out
