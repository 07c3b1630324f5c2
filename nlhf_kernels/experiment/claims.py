"""The claims under examination, decided by the numbers: reproduced, contradicted, or not resolved at this size.

1. An interior beta beats self-play (beta = 0) and best response (beta = 1).
2. Nash learning beats the reward-model baseline where preferences cycle.

A match counts as won when the interval of its win rate is above 1/2 by more than a margin, below which a preference is
none that anybody would notice. Where one candidate of several may win, their intervals are widened for that choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .contestants import BASELINE, beta_of, label
from .intervals import Estimate
from .tournament import MARGIN, Tournament

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not resolved"


def interior_beta(tournament: Tournament) -> dict[str, Any] | None:
    """None where the contestants do not allow the question."""
    betas = {name: beta for name in tournament.names if (beta := beta_of(name)) is not None}
    ends = [next((name for name, beta in betas.items() if beta == end), None) for end in (0.0, 1.0)]
    inner = [name for name, beta in betas.items() if 0 < beta < 1]
    if None in ends or not inner:
        return None
    matches = {
        name: {str(end): tournament.rate(name, str(end), comparisons=len(inner)) for end in ends} for name in inner
    }
    won = [name for name, each in matches.items() if all(rate.low > 0.5 + MARGIN for rate in each.values())]
    lost = all(any(rate.high < 0.5 - MARGIN for rate in each.values()) for each in matches.values())
    best = max(inner, key=lambda name: min(rate.mean for rate in matches[name].values()))
    return {
        "claim": "an interior beta beats beta = 0 and beta = 1",
        "verdict": REPRODUCED if won else CONTRADICTED if lost else OPEN,
        "best": label(best),
        "compared": len(inner),
        "matches": _shown({(name, end): rate for name, each in matches.items() for end, rate in each.items()}),
    }


def beats_rewards(tournament: Tournament, where: Sequence[int] | None) -> dict[str, Any] | None:
    """Nash-MD of every beta below 1, Nash-EMA and IPO-MD against the baseline; `where`: these prompts only."""
    rivals = [name for name in tournament.names if name in ("nash-ema", "ipo-md") or (beta_of(name) or 0.0) < 1]
    rivals = [name for name in rivals if name not in (BASELINE, "sft")]
    if BASELINE not in tournament.names or not rivals:
        return None
    claim = "Nash learning beats the reward baseline" + ("" if where is None else " on prompts whose answers cycle")
    if where is not None and len(where) < 2:
        return {"claim": claim, "verdict": OPEN, "best": None, "compared": len(rivals), "prompts": len(where),
                "matches": []}  # fmt: skip
    rates = {name: tournament.rate(name, BASELINE, where, len(rivals)) for name in rivals}
    won = any(rate.low > 0.5 + MARGIN for rate in rates.values())
    lost = all(rate.high < 0.5 - MARGIN for rate in rates.values())
    return {
        "claim": claim,
        "verdict": REPRODUCED if won else CONTRADICTED if lost else OPEN,
        "best": label(max(rivals, key=lambda name: rates[name].mean)),
        "compared": len(rivals),
        "prompts": next(iter(rates.values())).prompts,
        "matches": _shown({(name, BASELINE): rate for name, rate in rates.items()}),
    }


def by_beta(tournament: Tournament) -> list[dict[str, Any]]:
    """Win rates of Nash-MD against the baseline, or against the supervised policy where there is none."""
    against = BASELINE if BASELINE in tournament.names else "sft"
    points = []
    for name in tournament.names:
        beta = beta_of(name)
        if beta is not None:
            rate = tournament.rate(name, against)
            points.append({"beta": beta, "against": label(against), **rate.to_dict()})
    return sorted(points, key=lambda point: float(point["beta"]))


def _shown(matches: Mapping[tuple[str, str], Estimate]) -> list[dict[str, Any]]:
    return [{"first": label(a), "second": label(b), **rate.to_dict()} for (a, b), rate in matches.items()]
