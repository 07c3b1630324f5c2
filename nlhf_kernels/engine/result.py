"""What a rollout hands back: tokens and their log-probabilities, row by row, player by player."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch


class Finish(IntEnum):
    """Why a response ended."""

    LENGTH = 0  # max_new_tokens
    END = 1  # an end token, which is the response's last
    STOPPED = 2  # a stopping criterion


@dataclass(frozen=True)
class Responses:
    """One player's answers: row `prompt * samples + sample`. R rows, T tokens."""

    tokens: torch.Tensor  # (R, T) int64; the pad id after a row's end
    mask: torch.Tensor  # (R, T) bool: the tokens that count, the end token included
    lengths: torch.Tensor  # (R,) int64
    finish: torch.Tensor  # (R,) int8, of Finish
    policy_logprobs: torch.Tensor | None  # (R, T) float32, of the parameters that played; temperature 1, unfiltered
    reference_logprobs: torch.Tensor | None  # (R, T) float32, likewise; None without a reference
    mixture_logprobs: torch.Tensor | None  # (R, T) float32, of what was drawn from: after temperature and filters
    ok: torch.Tensor  # (R,) bool; False: at some step the logits were no distribution (NaN), the token there is 0

    def check_finite(self, op: str) -> None:
        """Raise where a token comes from logits that were no distribution: it would pass for an answer."""
        wrong = int((~self.ok).sum())
        if wrong:
            raise FloatingPointError(
                f"{op}: expected finite logits; got NaN or infinity in {wrong} of {len(self.ok)} answers"
            )

    @property
    def finish_reasons(self) -> list[str]:
        return [Finish(reason).name.lower() for reason in self.finish.tolist()]


@dataclass(frozen=True)
class RolloutResult:
    """Responses in the order of the players that were asked for, and how they came about."""

    responses: tuple[Responses, ...]
    seed: int  # gives the same rows again
    ends: tuple[int, ...]  # the end tokens
    steps: int  # token steps taken
    row_steps: int  # rows decoded, summed over steps: at most rows * steps; rows that end early leave
    notes: tuple[str, ...]  # what could not be done the fast way, and why

    def __iter__(self) -> Iterator[Responses]:
        """y, y_prime = engine.rollout(...)"""
        return iter(self.responses)

    def __getitem__(self, player: int) -> Responses:
        return self.responses[player]
