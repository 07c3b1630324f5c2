"""Contestants and presets of the experiment: every number in one place, each preset a whole experiment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ...core.checks import check_integer, check_number
from ..presets import OP, check_contestants, check_grid, check_heads

INFORMATION = {
    "pairs": "the same sample of human pairs, once",
    "queries": "the same number of annotators' votes, asked during training",
}


@dataclass(frozen=True)
class Contestant:
    """A learner and the information that it trains on.

    Args:
        label (str): its name in figures and tables.
        algorithm (str): of `train`.
        information (str): a key of INFORMATION.
        beta (float | None): weight of the reference in the opponent's mixture; None where the algorithm has none.
    """

    label: str
    algorithm: str
    information: str
    beta: float | None = None


CONTESTANTS = {
    "rlhf-pairs": Contestant("RLHF", "rlhf", "pairs"),
    "nash-md-pairs": Contestant("Nash-MD 0.25", "nash-md", "pairs", 0.25),
    "rlhf-queries": Contestant("RLHF", "rlhf", "queries"),
    "nash-md-0.125-queries": Contestant("Nash-MD 0.125", "nash-md", "queries", 0.125),
    "nash-md-queries": Contestant("Nash-MD 0.25", "nash-md", "queries", 0.25),
    "nash-md-0.5-queries": Contestant("Nash-MD 0.5", "nash-md", "queries", 0.5),
    "self-play-queries": Contestant("self-play", "self-play", "queries"),
    "best-response-queries": Contestant("best response", "best-response", "queries"),
    "nash-ema-queries": Contestant("Nash-EMA", "nash-ema", "queries"),
    "ipo-md-queries": Contestant("IPO-MD 0.25", "ipo-md", "queries", 0.25),
}
#: The matches of the claim: Nash-MD and RLHF on the same information.
CLAIMED = {"pairs": ("nash-md-pairs", "rlhf-pairs"), "queries": ("nash-md-queries", "rlhf-queries")}
CORE = tuple(name for pair in CLAIMED.values() for name in pair)


def full_label(name: str) -> str:
    """Return a contestant's name, with its information where two contestants share the name.

    Args:
        name (str): a key of CONTESTANTS.
    """
    contestant = CONTESTANTS[name]
    return f"{contestant.label} ({contestant.information})"


@dataclass(frozen=True)
class CandidatePreset:
    """The numbers of an experiment. Each contestant trains `runs` times at each tau of its grid.

    Args:
        knobs (tuple of float): values of `cycling`, from 0 (a reward) to 1 (cycles only).
        games (int): prompts at each setting.
        candidates (int): answers to choose from.
        strength (float): scale of the annotators' log-odds.
        reference_spread (float): amplitude of the reference's logits over the circle of angles.
        hidden, layers, heads (int): the model's size.
        start_steps (int): of fitting the reference policy.
        pairs (int): human pairs, for the contestants that learn from a sample.
        comparison_steps, comparison_batch (int): of training the preference and the reward model.
        comparison_rates (tuple of float): learning rates tried for each of the two; held-out log-loss decides.
        contestants (tuple of str): keys of CONTESTANTS.
        runs (int): training runs of each contestant at each tau.
        taus, reward_taus (tuple of float): the grids, falling: of preferences and of RLHF's reward.
        updates (int): of every training run.
        samples_per_prompt (int): answers to every prompt in every update; each is compared once.
        learning_rate (float): of training runs and best responses.
        ema_decay (float): Nash-EMA's.
        checkpoints (int): of each run, evenly spaced, the last at its end.
        budget (float): nats of KL at which policies are compared.
        response_taus (tuple of float): at which best responses are trained.
        response_starts (int): 1: from the reference; 2: from the opponent, too.
        threads (int): of PyTorch on the CPU; 0: as many as it takes.
        seed (int): of everything.
    """

    knobs: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    games: int = 12
    candidates: int = 5
    strength: float = 4.0
    reference_spread: float = 1.0
    hidden: int = 64
    layers: int = 1
    heads: int = 4
    start_steps: int = 300
    pairs: int = 9000
    comparison_steps: int = 600
    comparison_batch: int = 64
    comparison_rates: tuple[float, ...] = (2e-3, 4e-3)
    contestants: tuple[str, ...] = CORE
    runs: int = 3
    taus: tuple[float, ...] = (0.2, 0.1, 0.06)
    reward_taus: tuple[float, ...] = (1.0, 0.5, 0.2)
    updates: int = 120
    samples_per_prompt: int = 7
    learning_rate: float = 2e-3
    ema_decay: float = 0.9
    checkpoints: int = 6
    budget: float = 1.0
    response_taus: tuple[float, ...] = (0.05,)
    response_starts: int = 2
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"games": 2, "candidates": 3, "hidden": 8, "layers": 1, "heads": 1, "start_steps": 1, "pairs": 20,
                  "comparison_steps": 1, "comparison_batch": 1, "runs": 1, "updates": 1, "samples_per_prompt": 2,
                  "checkpoints": 1, "response_starts": 1, "threads": 0, "seed": 0}  # fmt: skip
        for name, low in counts.items():
            check_integer(OP, name, getattr(self, name), low, 2**31 - 1)
        for name in ("strength", "reference_spread", "learning_rate", "budget"):
            check_number(OP, name, getattr(self, name), 0.0, open_low=True)
        check_number(OP, "ema_decay", self.ema_decay, 0.0, 1.0)
        check_integer(OP, "response_starts", self.response_starts, 1, 2)
        check_integer(OP, "checkpoints", self.checkpoints, 1, self.updates)
        check_heads(self.hidden, self.heads)
        for name in ("taus", "reward_taus"):
            check_grid(name, getattr(self, name), open_low=True)
        for name in ("knobs", "comparison_rates", "response_taus"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{OP}: {name}: expected at least one number; got none")
            for value in values:
                check_number(OP, name, value, 0.0, 1.0 if name == "knobs" else float("inf"), open_low=name != "knobs")
        if any(later <= earlier for earlier, later in itertools.pairwise(self.knobs)):
            raise ValueError(f"{OP}: knobs: expected rising numbers; got {self.knobs}")
        check_contestants(self.contestants, CONTESTANTS)

    def grid(self, contestant: str) -> tuple[float, ...]:
        """The contestant's taus, falling.

        Args:
            contestant (str): a key of CONTESTANTS.
        """
        return self.reward_taus if CONTESTANTS[contestant].algorithm == "rlhf" else self.taus

    def marks(self) -> list[int]:
        """Updates after which a run's policy is recorded."""
        return [round(self.updates * (index + 1) / self.checkpoints) for index in range(self.checkpoints)]

    def cells(self) -> list[tuple[str, int, int]]:
        """Return every training run: contestant, index of its tau, number of the run."""
        return [
            (name, index, run)
            for name in self.contestants
            for index in range(len(self.grid(name)))
            for run in range(self.runs)
        ]

    def options(self, contestant: str, index: int) -> dict[str, Any]:
        """Return this contestant's options of NashConfig, beside the common budget.

        Args:
            contestant (str): a key of CONTESTANTS.
            index (int): which tau of its grid.
        """
        chosen = CONTESTANTS[contestant]
        options: dict[str, Any] = {"algorithm": chosen.algorithm, "tau": self.grid(contestant)[index]}
        if chosen.beta is not None:
            options["beta"] = chosen.beta
        if chosen.algorithm == "nash-ema":
            options["ema_decay"] = self.ema_decay
        return options


CANDIDATE_PRESETS = {
    # seconds: a smoke test of the pipeline
    "tiny": CandidatePreset(
        knobs=(0.0, 1.0), games=2, candidates=3, hidden=16, heads=2, start_steps=5, pairs=32, comparison_steps=2,
        comparison_batch=8, comparison_rates=(1e-3,), runs=1, taus=(0.1,), reward_taus=(0.5,), updates=2,
        samples_per_prompt=2, checkpoints=2,
    ),
    # minutes on two CPU cores
    "small": CandidatePreset(contestants=(*CORE, "self-play-queries", "best-response-queries")),
    # an hour or two on two CPU cores: all contestants, more runs, more games, a finer grid of taus
    "standard": CandidatePreset(
        contestants=tuple(CONTESTANTS), games=16, runs=10, taus=(0.4, 0.2, 0.1, 0.06), reward_taus=(2.0, 1.0, 0.5, 0.2),
        updates=200, samples_per_prompt=8, pairs=20000, comparison_steps=1500, checkpoints=10,
        response_taus=(0.1, 0.05),
    ),
    # minutes on one GPU
    "gpu": CandidatePreset(
        contestants=tuple(CONTESTANTS), games=24, runs=3, updates=150, samples_per_prompt=16, pairs=40000,
        comparison_batch=256, checkpoints=10, response_starts=1, threads=0,
    ),
}  # fmt: skip
