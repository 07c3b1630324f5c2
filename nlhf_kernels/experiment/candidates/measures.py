"""The report's numbers from log-probabilities: all are exact expectations over answers.

Policies are compared at equal KL, prompt by prompt: of every contestant's frontier over its taus, the policy whose KL
is the budget (`tabular/budget.py`), against opponents with the same budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...evaluation.intervals import Estimate, student
from ...tabular.budget import at_budget, exploitability_within
from ...tabular.cycling import cyclic_triple_share, unrewarded_share
from ...tabular.measures import kl_divergence
from ..claims import CONTRADICTED, OPEN, REPRODUCED
from .exact import equilibrium_within, exact_policies
from .learners import Setting
from .presets import CLAIMED

MARGIN = 0.01  # a negligible difference of win rates or exploitabilities
GRID = 8  # budgets at which a frontier is drawn


def estimate(values: torch.Tensor) -> Estimate:
    """Return the mean over runs and prompts, both samples of larger populations, with its 95 % interval.

    half^2 = (t s_p / sqrt P)^2 + (t s_r / sqrt R)^2: s_p is the deviation of the prompts' means over the runs, s_r that
    of the runs' means over the prompts, t Student's with P - 1 and R - 1 degrees of freedom, as both may be few. With
    one run there is no second term.

    Args:
        values (R, P): one number for each run and prompt.
    """
    runs, prompts = values.shape
    square = (student(prompts - 1, 0.025) * float(values.mean(0).std()) / prompts**0.5) ** 2
    if runs > 1:
        square += (student(runs - 1, 0.025) * float(values.mean(1).std()) / runs**0.5) ** 2
    return Estimate(float(values.mean()), square**0.5, prompts, runs)


@dataclass
class Measures:
    """Measures of the trained policies at the KL budget.

    Args:
        setting (Setting): world, reference, preset.
        tables (mapping of str to tensor (N, R, T, M, A)): log-probabilities of each contestant, by tau, run, mark.
    """

    setting: Setting
    tables: Mapping[str, torch.Tensor]
    _kept: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def policies(self, name: str, mark: int = -1) -> torch.Tensor:
        """Return the contestant's policies at the budget, (R, M, A).

        Args:
            name: of the contestant.
            mark: index of the mark; -1: the finished runs.
        """
        key = name, mark
        if key not in self._kept:
            table = self.tables[name][:, :, mark]
            self._kept[key] = at_budget(table, self.setting.log_reference, self.setting.preset.budget)
        return self._kept[key]

    def mixtures(self, name: str) -> torch.Tensor:
        """Return the mixture of every run's checkpoints, at the budget, (R, M, A).

        Args:
            name: of the contestant.
        """
        mixed = self.tables[name].exp().mean(2).log()
        return at_budget(mixed, self.setting.log_reference, self.setting.preset.budget)

    def exploitability(self, policies: torch.Tensor) -> torch.Tensor:
        """Return the exploitability of policies (R, M, A) by the best opponent of the same budget, (R, M).

        Args:
            policies: log-probabilities.
        """
        setting = self.setting
        return exploitability_within(policies, setting.world.preference, setting.log_reference, setting.preset.budget)

    def frontier(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return KL and exploitability, (1 + GRID, R, M) each, of the finished policies along the contestant's
        frontier: at none to all of the budget, in equal steps; the first is the reference.

        Args:
            name: of the contestant.
        """
        setting, table = self.setting, self.tables[name][:, :, -1]
        budgets = [setting.preset.budget * (step + 1) / GRID for step in range(GRID)]
        policies = torch.stack([setting.log_reference.expand_as(table[0]),
                                *(at_budget(table, setting.log_reference, budget) for budget in budgets)])  # fmt: skip
        return kl_divergence(policies, setting.log_reference), self.exploitability(policies)

    def match(self, first: str, second: str) -> torch.Tensor:
        """Return P(first > second) at the budget over all pairs of runs, as values (R, M): their mean is that of all
        pairs, and their spread over runs includes both sides' (each run's mean over the other side's runs).

        Args:
            first, second: names of contestants.
        """
        preference = self.setting.world.preference
        sides = [self.policies(name).exp() for name in (first, second)]
        pairs = torch.einsum("rma,mab,smb->rsm", sides[0], preference, sides[1])
        return pairs.mean(1) + pairs.mean(0) - pairs.mean((0, 1))


def measure(measures: Measures, judges: Mapping[str, torch.Tensor], responses: Mapping[str, torch.Tensor],
            ) -> dict[str, Any]:  # fmt: skip
    """Return all numbers of the report about the policies, as JSON.

    Args:
        measures: the trained policies.
        judges (name -> (M, A, A)): their preferences are reported for the sample answers.
        responses (contestant -> (starts and taus, M, A)): best responses trained against the first run.
    """
    setting = measures.setting
    world, knobs = setting.world, range(len(setting.world.knobs))
    candidates = world.preference[:, :-1, :-1]
    shares, unrewarded = cyclic_triple_share(candidates), unrewarded_share(candidates)
    groups = [world.of_group(knob) for knob in knobs]
    return {
        "knobs": [
            {"knob": world.knobs[knob], "prompts": len(group), "cyclic": float(shares[group].mean()),
             "unrewarded": float(unrewarded[group].mean())}
            for knob, group in enumerate(groups)
        ],
        "advantages": {name: _advantage(measures, *pair, groups) for name, pair in CLAIMED.items()
                       if all(each in measures.tables for each in pair)},
        "exact_advantages": _exact_advantages(measures, groups),
        "exploitability": {name: _exploitability(measures, name, responses.get(name), groups)
                           for name in measures.tables},
        "matrix": [
            {"knob": world.knobs[knob], "rates": [
                [None if a == b else asdict(estimate(measures.match(a, b)[:, groups[knob]])) for b in measures.tables]
                for a in measures.tables]}
            for knob in (0, len(groups) - 1)
        ],
        "frontiers": {name: _frontier(measures, name, groups[-1]) for name in measures.tables},
        "policies": {name: _spent(measures, name, groups) for name in measures.tables},
        "samples": _samples(measures, judges),
    }  # fmt: skip


def limits(measures: Measures) -> dict[str, Any]:
    """Return what is known without training, by knob, as JSON: the reference's own exploitability, the KL and
    exploitability of the equilibrium within the budget, and the KL of every contestant's exact limit at the budget.

    Args:
        measures: the contestants' names, world and reference.
    """
    setting, world = measures.setting, measures.setting.world
    groups = [world.of_group(knob) for knob in range(len(world.knobs))]

    def by_knob(values: torch.Tensor) -> list[float]:
        return [float(values[group].mean()) for group in groups]

    untrained = measures.exploitability(setting.log_reference.unsqueeze(0))
    star = equilibrium_within(setting)
    exact = {name: exact_policies(name, setting) for name in measures.tables}
    return {
        "reference": [asdict(estimate(untrained[:, group])) for group in groups],
        "equilibrium": {"kl": by_knob(kl_divergence(star, setting.log_reference)),
                        "exploitability": by_knob(measures.exploitability(star.unsqueeze(0))[0])},
        "kl": {name: by_knob(kl_divergence(at_budget(table, setting.log_reference, setting.preset.budget),
                                           setting.log_reference))
               for name, table in exact.items() if table is not None},
    }  # fmt: skip


def claims(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Decide the examined claims by the intervals.

    Args:
        facts: of `measure`.
    """
    decided = []
    for information, rows in facts["advantages"].items():
        (first, first_rate), (last, last_rate) = (
            (row["less_exploitable"], row["win_rate"]) for row in (rows[0], rows[-1])
        )
        grown = {"mean": last["mean"] - first["mean"], "half": math.hypot(first["half"], last["half"])}
        most = "where preferences cycle most, Nash-MD is"
        decided += [
            _decide(f"{most} less exploitable than RLHF ({information})", last, 0.0),
            _decide(
                f"{most} less exploitable than RLHF, each at its best distance ({information})",
                rows[-1]["less_exploitable_at_best"],
                0.0,
            ),
            _decide(f"{most} preferred to RLHF ({information})", last_rate, 0.5),
            _decide(f"the difference of their exploitabilities grows with the cycling ({information})", grown, 0.0),
            _decide_equal(f"where a reward exists, neither is preferred to the other ({information})", first_rate),
        ]
    return decided


def _decide(claim: str, value: Mapping[str, float], level: float) -> dict[str, Any]:
    """Decide whether the whole interval of a value is above a level by more than the margin."""
    low, high = value["mean"] - value["half"] - level, value["mean"] + value["half"] - level
    verdict = REPRODUCED if low > MARGIN else CONTRADICTED if high < -MARGIN else OPEN
    return {"claim": claim, "verdict": verdict, "mean": value["mean"], "half": value["half"]}


def _decide_equal(claim: str, rate: Mapping[str, float]) -> dict[str, Any]:
    """Decide whether a win rate is 1/2, up to twice the margin."""
    lead, half = abs(rate["mean"] - 0.5), rate["half"]
    verdict = REPRODUCED if lead + half < 2 * MARGIN else CONTRADICTED if lead - half > 2 * MARGIN else OPEN
    return {"claim": claim, "verdict": verdict, "mean": rate["mean"], "half": half}


def _advantage(measures: Measures, nash: str, rival: str, groups: list[torch.Tensor]) -> list[dict[str, Any]]:
    wins = measures.match(nash, rival)
    gap = measures.exploitability(measures.policies(rival)) - measures.exploitability(measures.policies(nash))
    least = [least_exploitable(measures, name, groups) for name in (rival, nash)]
    return [{"win_rate": asdict(estimate(wins[:, group])), "less_exploitable": asdict(estimate(gap[:, group])),
             "less_exploitable_at_best": asdict(estimate(theirs - ours))}
            for group, (_, theirs), (_, ours) in zip(groups, *least, strict=True)]  # fmt: skip


def least_exploitable(measures: Measures, name: str, groups: list[torch.Tensor]) -> list[tuple[float, torch.Tensor]]:
    """Return KL and exploitability (R, P) of every group where a contestant's frontier is least exploitable: the best
    choice of its distance, made in hindsight, one for all runs and prompts of a group.

    Args:
        measures: the trained policies.
        name: of the contestant.
        groups: prompts of each group.
    """
    kl, values = measures.frontier(name)
    best = [int(values[:, :, group].mean((1, 2)).argmin()) for group in groups]
    return [(float(kl[at, :, group].mean()), values[at][:, group]) for at, group in zip(best, groups, strict=True)]


def _exact_advantages(measures: Measures, groups: list[torch.Tensor]) -> dict[str, Any]:
    """Return the advantages of the exact limits, as for an infinite sample of pairs."""
    setting = measures.setting
    limits = []
    for name in CLAIMED["pairs"]:
        table = exact_policies(name, setting)
        assert table is not None
        limits.append(at_budget(table, setting.log_reference, setting.preset.budget))
    wins = torch.einsum("ma,mab,mb->m", limits[0].exp(), setting.world.preference, limits[1].exp())
    gap = measures.exploitability(limits[1]) - measures.exploitability(limits[0])
    return {"win_rate": [float(wins[group].mean()) for group in groups],
            "less_exploitable": [float(gap[group].mean()) for group in groups]}  # fmt: skip


def _exploitability(
    measures: Measures, name: str, responses: torch.Tensor | None, groups: list[torch.Tensor]
) -> dict[str, Any]:
    setting, last = measures.setting, groups[-1]
    limit = exact_policies(name, setting)
    marks = setting.preset.marks()
    facts: dict[str, Any] = {
        "by_update": [[mark, asdict(estimate(measures.exploitability(measures.policies(name, index))[:, last]))]
                      for index, mark in enumerate(marks)],
        "by_knob": [asdict(estimate(measures.exploitability(measures.policies(name))[:, group])) for group in groups],
        "mixture": [asdict(estimate(measures.exploitability(measures.mixtures(name))[:, group])) for group in groups],
        "at_best": [{"kl": spent, **asdict(estimate(values))}
                    for spent, values in least_exploitable(measures, name, groups)],
        "limit": None,
        "trained": None,
    }  # fmt: skip
    if limit is not None:
        values = measures.exploitability(at_budget(limit, setting.log_reference, setting.preset.budget))
        facts["limit"] = [float(values[group].mean()) for group in groups]
    if responses is not None:
        opponent = measures.policies(name)[0].exp()
        spent = at_budget(responses.unsqueeze(0), setting.log_reference, setting.preset.budget)
        rates = torch.einsum("sma,mab,mb->sm", spent.exp(), setting.world.preference, opponent) - 0.5
        best = rates.amax(0, keepdim=True)
        exact = measures.exploitability(measures.policies(name))[:1]
        facts["trained"] = [{"best": asdict(estimate(best[:, group])), "exact": float(exact[:, group].mean())}
                            for group in groups]  # fmt: skip
    return facts


def _frontier(measures: Measures, name: str, group: torch.Tensor) -> list[dict[str, Any]]:
    """Return win rates against the reference and the best opponent of equal budget, over budgets, for the most cyclic
    games."""
    setting = measures.setting
    preference, log_reference = setting.world.preference[group], setting.log_reference[group]
    table = measures.tables[name][:, :, -1, group]
    points = []
    for budget in [2 * setting.preset.budget * (index + 1) / GRID for index in range(GRID)]:
        policies = at_budget(table, log_reference, budget)
        wins = torch.einsum("rma,mab,mb->rm", policies.exp(), preference, log_reference.exp())
        worst = 0.5 - exploitability_within(policies, preference, log_reference, budget)
        points.append({"budget": budget, "kl": float(kl_divergence(policies, log_reference).mean()),
                       "reference": asdict(estimate(wins)), "worst": asdict(estimate(worst))})  # fmt: skip
    return points


def _spent(measures: Measures, name: str, groups: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Return the KL of the finished runs, as trained and at the budget."""
    setting = measures.setting
    kl = kl_divergence(measures.tables[name][:, :, -1], setting.log_reference)  # (N, R, M)
    spent = kl_divergence(measures.policies(name), setting.log_reference)
    return [
        {"taus": [float(value) for value in kl[:, :, group].mean((1, 2))], "at_budget": float(spent[:, group].mean())}
        for group in groups
    ]


def _samples(measures: Measures, judges: Mapping[str, torch.Tensor], count: int = 10) -> list[dict[str, Any]]:
    """Return sample prompts of all knobs, with every policy over the candidates and each judge's P(candidate >
    reference)."""
    setting, world = measures.setting, measures.setting.world
    count = min(count, len(world.prompts))
    chosen = torch.linspace(0, len(world.prompts) - 1, count, dtype=torch.float64, device="cpu").long().tolist()
    samples = []
    for row in chosen:
        reference = setting.log_reference[row].exp()
        worth = {name: (table[row] @ reference)[:-1] for name, table in judges.items()}
        policies = {"reference": reference}
        policies |= {name: measures.policies(name)[0, row].exp() for name in measures.tables}
        samples.append({
            "prompt": world.prompts[row],
            "knob": world.knobs[int(world.group[row])],
            "beats_reference": {name: values.tolist() for name, values in worth.items()},
            "answers": {name: policy[:-1].tolist() for name, policy in policies.items()},
        })  # fmt: skip
    return samples
