"""The claims under examination, decided by the numbers: reproduced, contradicted, not resolved, or too small to tell.

1. An interior beta beats self-play (beta = 0) and best response (beta = 1).
2. Nash learning beats the reward-model baseline where preferences cycle.

Win rates are those at equal KL (`equal_kl.py`). A match counts as won when the interval of its win rate is above 1/2 by
more than a margin. Where one candidate of several may win, their intervals are widened for that choice. Without several
runs an interval covers the choice of prompts alone, and at few prompts its normal approximation is too narrow: below
MIN_RUNS and MIN_PROMPTS there is no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import Estimate
from ..evaluation.tournament import MARGIN
from .equal_kl import EqualKL
from .presets import BASELINE, beta_of, label

REPRODUCED, CONTRADICTED, OPEN, TOO_SMALL = "reproduced", "contradicted", "not resolved", "too small to tell"
MIN_RUNS, MIN_PROMPTS = 3, 100


def evidence(claim: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of training runs and of prompts behind a claim; no runs if there were no matches."""
    matches = claim["matches"]
    return (matches[0]["seeds"], matches[0]["prompts"]) if matches else (0, claim["prompts"])


def verdict(claim: Mapping[str, Any]) -> str:
    """Return a claim's verdict; TOO_SMALL below the minimum of runs and prompts, in older results too."""
    runs, prompts = evidence(claim)
    return str(claim["verdict"]) if runs >= MIN_RUNS and prompts >= MIN_PROMPTS else TOO_SMALL


def interior_beta(equal: EqualKL) -> dict[str, Any] | None:
    """Decide claim 1; None if its contestants do not take part."""
    betas = {name: beta for name in equal.names if (beta := beta_of(name)) is not None}
    ends = [next((name for name, beta in betas.items() if beta == end), None) for end in (0.0, 1.0)]
    inner = [name for name, beta in betas.items() if 0 < beta < 1]
    if None in ends or not inner:
        return None
    rates = {(name, str(end)): equal.rate(name, str(end), len(inner)) for name in inner for end in ends}
    by_name = {name: [rate for (first, _), rate in rates.items() if first == name] for name in inner}
    won = any(all(rate.low > 0.5 + MARGIN for rate in matches) for matches in by_name.values())
    lost = all(any(rate.high < 0.5 - MARGIN for rate in matches) for matches in by_name.values())
    best = max(inner, key=lambda name: min(rate.mean for rate in by_name[name]))
    return _claim("an interior beta beats beta = 0 and beta = 1", won, lost, best, len(inner), rates, equal.level)


def beats_rewards(equal: EqualKL, where: Sequence[int] | None) -> dict[str, Any] | None:
    """Decide claim 2, Nash-MD of all beta < 1, Nash-EMA and IPO-MD against the baseline, on the prompts `where`."""
    rivals = [name for name in equal.names if name in ("nash-ema", "ipo-md") or (beta_of(name) or 0.0) < 1]
    rivals = [name for name in rivals if name not in (BASELINE, "sft")]
    if BASELINE not in equal.names or not rivals:
        return None
    claim = "Nash learning beats the reward baseline" + ("" if where is None else " on prompts whose answers cycle")
    if where is not None and len(where) < 2:
        return {"claim": claim, "verdict": TOO_SMALL, "best": None, "compared": len(rivals), "prompts": len(where),
                "kl": None, "matches": []}  # fmt: skip
    compared = equal if where is None else equal.on(where)
    rates = {(name, BASELINE): compared.rate(name, BASELINE, len(rivals)) for name in rivals}
    won = any(rate.low > 0.5 + MARGIN for rate in rates.values())
    lost = all(rate.high < 0.5 - MARGIN for rate in rates.values())
    best = max(rivals, key=lambda name: rates[name, BASELINE].mean)
    return _claim(claim, won, lost, best, len(rivals), rates, compared.level)


def _claim(
    claim: str,
    won: bool,
    lost: bool,
    best: str,
    compared: int,
    rates: Mapping[tuple[str, str], Estimate],
    kl: float,
) -> dict[str, Any]:
    facts = {
        "claim": claim,
        "verdict": REPRODUCED if won else CONTRADICTED if lost else OPEN,
        "best": label(best),
        "compared": compared,
        "kl": kl,
        "prompts": next(iter(rates.values())).prompts,
        "matches": [{"first": label(a), "second": label(b), **rate.to_dict()} for (a, b), rate in rates.items()],
    }
    return {**facts, "verdict": verdict(facts)}


def by_beta(equal: EqualKL) -> list[dict[str, Any]]:
    """Return win rates of Nash-MD against the baseline, or against the supervised policy if there is none."""
    against = BASELINE if BASELINE in equal.names else "sft"
    points = []
    for name in equal.names:
        beta = beta_of(name)
        if beta is not None:
            rate = equal.rate(name, against)
            points.append({"beta": beta, "against": label(against), **rate.to_dict()})
    return sorted(points, key=lambda point: float(point["beta"]))
