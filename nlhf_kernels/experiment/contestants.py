"""Who takes part: algorithms of `train`, each from the same start with the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

START = "sft"  # the supervised policy, everyone's start and reference


@dataclass(frozen=True)
class Contestant:
    label: str
    algorithm: str
    beta: float | None = None  # nash-md's and ipo-md's
    tau: str = "tau"  # the preset's field that it pays for leaving the reference
    averaged: bool = False  # whether its opponent is a moving average

    def options(self, preset: Any) -> dict[str, Any]:
        """Of NashConfig, beside the budget."""
        options: dict[str, Any] = {"algorithm": self.algorithm, "tau": getattr(preset, self.tau)}
        if self.beta is not None:
            options["beta"] = self.beta
        if self.averaged:
            options["ema_decay"] = preset.ema_decay
        return options


NASH_BETAS = (0.0, 0.125, 0.25, 0.5, 1.0)
BASELINE = "rlhf"
CONTESTANTS: dict[str, Contestant] = {
    BASELINE: Contestant("RLHF", "rlhf", tau="reward_tau"),
    **{f"nash-md-{beta:g}": Contestant(f"Nash-MD {beta:g}", "nash-md", beta) for beta in NASH_BETAS},
    "nash-ema": Contestant("Nash-EMA", "nash-ema", averaged=True),
    "ipo-md": Contestant("IPO-MD 0.125", "ipo-md", 0.125, tau="ipo_tau"),
}


def label(name: str) -> str:
    return "SFT" if name == START else CONTESTANTS[name].label


def beta_of(name: str) -> float | None:
    """The mixture's weight of the reference, of a Nash-MD contestant."""
    contestant = CONTESTANTS.get(name)
    return contestant.beta if contestant is not None and contestant.algorithm == "nash-md" else None
