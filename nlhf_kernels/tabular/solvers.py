"""Algorithms for the regularised Nash equilibrium, built on one fused step, `mirror_descent`.

An algorithm yields its policies at given marks (numbers of steps), so that `solve` can record them and show progress;
the steps between two marks are one launch wherever the algorithm allows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch

from ..core.checks import check_number
from ..ops import mirror_descent
from .game import PreferenceGame

Policies = Iterator[torch.Tensor]  # (G, A) log-probabilities, one per mark


class Solution(NamedTuple):
    """The policies of a run.

    Args:
        log_policy (tensor (..., A)): log-probabilities after the last step.
        marks (tuple of M ints): numbers of steps at which a policy was recorded.
        trajectory (tensor (M, ..., A)): log-probabilities at the marks.
        ok (tensor (...,), bool): False where the game had a NaN or the policy is not a distribution.
    """

    log_policy: torch.Tensor
    marks: tuple[int, ...]
    trajectory: torch.Tensor
    ok: torch.Tensor


class _Run(NamedTuple):
    """A game in the kernels' layout, with the numbers of steps at which policies are recorded."""

    preference: torch.Tensor  # (G, A, A)
    log_reference: torch.Tensor  # (G, A)
    tau: float
    marks: Sequence[int]

    def step(self, log_policy: torch.Tensor, step_sizes: torch.Tensor, opponent: str | torch.Tensor) -> torch.Tensor:
        return mirror_descent(
            log_policy, self.preference, self.log_reference, tau=self.tau, step_sizes=step_sizes, opponent=opponent
        )

    def sizes(self, step: float | None) -> torch.Tensor:  # (steps,)
        """Return constant step sizes, or the theorem's 2 / (tau (t + 2))."""
        count = torch.arange(self.marks[-1], dtype=self.preference.dtype, device=self.preference.device)
        return torch.full_like(count, step) if step is not None else 2 / (self.tau * (count + 2))

    def spans(self) -> Iterator[tuple[int, int]]:
        return pairwise((0, *self.marks))


def nash_md(run: _Run, log_policy: torch.Tensor, *, step: float | None = None, samples: int = 0) -> Policies:
    """Run Nash-MD: mirror descent against the mixture with the reference; steps decrease if `step` is None."""
    return _descend(run, log_policy, run.sizes(step), "mixture", samples)


def online_mirror_descent(
    run: _Run, log_policy: torch.Tensor, *, step: float | None = None, samples: int = 0
) -> Policies:
    """Run OMD, self-play: mirror descent against the policy itself; steps decrease if `step` is None."""
    return _descend(run, log_policy, run.sizes(step), "policy", samples)


def _descend(run: _Run, log_policy: torch.Tensor, sizes: torch.Tensor, opponent: str, samples: int) -> Policies:
    for first, last in run.spans():
        if samples:
            for t in range(first, last):
                log_opponent = _sampled(run, log_policy, sizes[t], opponent, samples)
                log_policy = run.step(log_policy, sizes[t : t + 1], log_opponent)
        else:
            log_policy = run.step(log_policy, sizes[first:last], opponent)
        yield log_policy


def _sampled(run: _Run, log_policy: torch.Tensor, size: torch.Tensor, opponent: str, samples: int) -> torch.Tensor:
    """Replace the opponent by `samples` of its actions, which estimate P(a > opponent) without bias."""
    b = size * run.tau if opponent == "mixture" else 0 * size
    log_opponent = log_policy if b == 0 else ((1 - b) * log_policy + b * run.log_reference)
    actions = torch.multinomial(log_opponent.nan_to_num(nan=0.0).softmax(-1), samples, replacement=True)
    counts = torch.zeros_like(log_policy).scatter_add_(-1, actions, torch.ones_like(actions, dtype=log_policy.dtype))
    return (counts / samples).log()


def nash_ema(run: _Run, log_policy: torch.Tensor, *, step: float = 0.1, decay: float = 0.9) -> Policies:
    """Run Nash-EMA: the opponent is the exponential moving average of the policy's log-probabilities."""
    sizes, log_average = run.sizes(step), log_policy
    for first, last in run.spans():
        for t in range(first, last):
            log_policy = run.step(log_policy, sizes[t : t + 1], log_average)
            log_average = (decay * log_average + (1 - decay) * log_policy).log_softmax(-1)
        yield log_policy


def extragradient(run: _Run, log_policy: torch.Tensor, *, step: float | None = None) -> Policies:
    """Run EGPO: a half step against the policy itself, then a step from the old policy against the half step's."""
    sizes = run.sizes(step if step is not None else 2 / (1 + 2 * run.tau))
    for first, last in run.spans():
        for t in range(first, last):
            half = run.step(log_policy, sizes[t : t + 1], "policy")
            log_policy = run.step(log_policy, sizes[t : t + 1], half)
        yield log_policy


def nash_mp(run: _Run, log_policy: torch.Tensor, *, eta: float | None = None) -> Policies:
    """Run Nash-MP, mirror prox: EGPO with step eta / (tau (1 + eta)). With eta = 2 tau, KL <= (1 + 2 tau)^-k KL_0."""
    eta = 2 * run.tau if eta is None else eta
    return extragradient(run, log_policy, step=eta / (run.tau * (1 + eta)))


def best_response_to_reference(run: _Run, log_policy: torch.Tensor, *, step: float | None = None) -> Policies:
    """Run steps against the reference alone (beta = 1), which converge to the best response to it."""
    sizes = run.sizes(step)
    for first, last in run.spans():
        log_policy = run.step(log_policy, sizes[first:last], run.log_reference)
        yield log_policy


def self_play_gradient(run: _Run, log_policy: torch.Tensor, *, step: float = 1.0) -> Policies:
    """Run policy gradient on softmax logits, in self-play; each step is proportional to the action's probability."""
    logits = log_policy
    for first, last in run.spans():
        for _ in range(first, last):
            log_pi = logits.log_softmax(-1)
            pi = log_pi.exp()
            advantage = (run.preference @ pi.unsqueeze(-1)).squeeze(-1) - run.tau * (log_pi - run.log_reference)
            logits = log_pi + step * pi * (advantage - (pi * advantage).sum(-1, keepdim=True))
        yield logits.log_softmax(-1)


ALGORITHMS: dict[str, Callable[..., Policies]] = {
    "nash-md": nash_md,
    "omd": online_mirror_descent,
    "ema": nash_ema,
    "egpo": extragradient,
    "nash-mp": nash_mp,
    "best-response": best_response_to_reference,
    "policy-gradient": self_play_gradient,
}


def solve(
    game: PreferenceGame,
    algorithm: str = "nash-md",
    *,
    steps: int = 1000,
    marks: Sequence[int] | None = None,
    start: torch.Tensor | None = None,
    on_mark: Callable[[int], None] | None = None,
    **options: Any,
) -> Solution:
    """Run an algorithm and record its policy at every mark.

    Args:
        game (PreferenceGame): one game or many.
        algorithm (str): a key of `ALGORITHMS`.
        steps (int): number of steps if `marks` is None.
        marks (sequence of int or None): increasing numbers of steps; the last one ends the run.
        start (tensor (..., A) or None): log-probabilities; None: the reference.
        on_mark (callable or None): called with each mark that is reached.
        **options (float): of the algorithm: step, samples, decay, eta.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"solve: algorithm: expected one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    marks = tuple(marks) if marks is not None else (steps,)
    whole = all(isinstance(mark, Integral) for mark in marks)
    if not marks or not whole or any(later <= earlier for earlier, later in pairwise((0, *marks))):
        raise ValueError(f"solve: steps, marks: expected increasing whole numbers from 1; got {marks}")
    _check_options(algorithm, options)
    shape = game.log_reference.shape
    actions = game.actions
    preference = game.preference.reshape(-1, actions, actions)
    run = _Run(preference, game.log_reference.reshape(-1, actions), game.tau, marks)
    first = run.log_reference if start is None else _checked_start(start, game).reshape(-1, actions)
    trajectory = []
    for mark, log_policy in zip(marks, ALGORITHMS[algorithm](run, first, **options), strict=True):
        trajectory.append(log_policy.reshape(shape))
        if on_mark is not None:
            on_mark(mark)
    last = trajectory[-1]
    return Solution(last, marks, torch.stack(trajectory), game.ok & ~last.isnan().any(-1))


def _check_options(algorithm: str, options: Mapping[str, Any]) -> None:
    _, _, *known = inspect.signature(ALGORITHMS[algorithm]).parameters
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"solve: {algorithm}: expected options {', '.join(known)}; got {name!r}")
        check_number("solve", name, value, 0.0)


def _checked_start(start: torch.Tensor, game: PreferenceGame) -> torch.Tensor:
    if start.shape != game.log_reference.shape or start.dtype != game.preference.dtype:
        expected = f"{tuple(game.log_reference.shape)} {game.preference.dtype}"
        raise ValueError(f"solve: start: expected {expected}; got {tuple(start.shape)} {start.dtype}")
    return start.log_softmax(-1)


def equilibrium(game: PreferenceGame, *, tolerance: float = 1e-13, max_steps: int = 1_000_000) -> torch.Tensor:
    """Return the equilibrium pi*_tau as log-probabilities (..., A), by Nash-MP.

    Games with NaN give NaN. If tau is too small for `max_steps`, the error names the last change.

    Args:
        game (PreferenceGame): one game or many.
        tolerance (float): the run ends where no log-probability changes by more, relative, in 50 steps.
        max_steps (int): of Nash-MP.
    """
    log_policy = game.log_reference
    for _ in range(0, max_steps, 50):
        before, log_policy = log_policy, solve(game, "nash-mp", steps=50, start=log_policy).log_policy
        scale = log_policy.abs().amax(-1).clamp(min=1.0)
        moved = ((log_policy - before).abs().amax(-1) / scale)[game.ok]
        if not (moved > tolerance).any():
            return log_policy
    raise RuntimeError(f"equilibrium: still moving by {moved.max():.1e} after {max_steps} steps at tau {game.tau}")
