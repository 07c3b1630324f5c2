"""The report's numbers from log-probabilities: all are exact expectations over answers.

Policies are compared at equal KL, prompt by prompt: of every contestant's frontier over its taus, the policy whose KL
is the budget (`tabular/budget.py`), against opponents with the same budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
            self._kept[key] = self.at_budget(self.tables[name][:, :, mark])
        return self._kept[key]

    def mixtures(self, name: str) -> torch.Tensor:
        """Return the mixture of every run's checkpoints, at the budget, (R, M, A).

        Args:
            name: of the contestant.
        """
        return self.at_budget(self.tables[name].exp().mean(2).log())

    def at_budget(self, table: torch.Tensor) -> torch.Tensor:
        """Return the policies at the budget of frontiers over N taus, (..., M, A).

        Args:
            table (N, ..., M, A): log-probabilities.
        """
        return at_budget(table, self.setting.log_reference, self.setting.preset.budget)

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

    @cached_property
    def groups(self) -> list[torch.Tensor]:
        """The prompts of each setting of the knob."""
        return [self.setting.world.of_group(knob) for knob in range(len(self.setting.world.knobs))]

    def by_group(self, values: torch.Tensor) -> list[dict[str, Any]]:
        """Return the estimate of each group, as JSON.

        Args:
            values (R, M): one number for each run and prompt.
        """
        return [asdict(estimate(values[:, group])) for group in self.groups]

    def means(self, values: torch.Tensor) -> list[float]:
        """Return the mean of each group.

        Args:
            values (..., M): numbers for each prompt.
        """
        return [float(values[..., group].mean()) for group in self.groups]


def measure(measures: Measures, judges: Mapping[str, torch.Tensor], responses: Mapping[str, torch.Tensor],
            ) -> dict[str, Any]:  # fmt: skip
    """Return all numbers of the report about the policies, as JSON.

    Args:
        measures: the trained policies.
        judges (name -> (M, A, A)): their preferences are reported for the sample answers.
        responses (contestant -> (starts and taus, M, A)): best responses trained against the first run.
    """
    world, groups, names = measures.setting.world, measures.groups, measures.tables
    candidates = world.preference[:, :-1, :-1]
    shares, unrewarded = (measures.means(of(candidates)) for of in (cyclic_triple_share, unrewarded_share))
    return {
        "knobs": [
            {"knob": knob, "prompts": len(group), "cyclic": cyclic, "unrewarded": rest}
            for knob, group, cyclic, rest in zip(world.knobs, groups, shares, unrewarded, strict=True)
        ],
        "advantages": {name: _advantage(measures, *pair) for name, pair in CLAIMED.items()
                       if all(each in names for each in pair)},
        "exact_advantages": _exact_advantages(measures),
        "exploitability": {name: _exploitability(measures, name, responses.get(name)) for name in names},
        "matrix": [
            {"knob": world.knobs[knob], "rates": [
                [None if a == b else asdict(estimate(measures.match(a, b)[:, groups[knob]])) for b in names]
                for a in names]}
            for knob in (0, len(groups) - 1)
        ],
        "frontiers": {name: _frontier(measures, name) for name in names},
        "policies": {name: _spent(measures, name) for name in names},
        "samples": _samples(measures, judges),
    }  # fmt: skip


def limits(measures: Measures) -> dict[str, Any]:
    """Return what is known without training, by knob, as JSON: the reference's own exploitability, the KL and
    exploitability of the equilibrium within the budget, and the KL of every contestant's exact limit at the budget.

    Args:
        measures: the contestants' names, world and reference.
    """
    setting, reference = measures.setting, measures.setting.log_reference
    star = equilibrium_within(setting)
    exact = {name: exact_policies(name, setting) for name in measures.tables}
    return {
        "reference": measures.by_group(measures.exploitability(reference.unsqueeze(0))),
        "equilibrium": {"kl": measures.means(kl_divergence(star, reference)),
                        "exploitability": measures.means(measures.exploitability(star.unsqueeze(0)))},
        "kl": {name: measures.means(kl_divergence(measures.at_budget(table), reference))
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


def _advantage(measures: Measures, nash: str, rival: str) -> list[dict[str, Any]]:
    gap = measures.exploitability(measures.policies(rival)) - measures.exploitability(measures.policies(nash))
    least = [least_exploitable(measures, name, measures.groups) for name in (rival, nash)]
    at_best = [asdict(estimate(theirs - ours)) for (_, theirs), (_, ours) in zip(*least, strict=True)]
    columns = measures.by_group(measures.match(nash, rival)), measures.by_group(gap), at_best
    names = "win_rate", "less_exploitable", "less_exploitable_at_best"
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


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


def _exact_advantages(measures: Measures) -> dict[str, Any]:
    """Return the advantages of the exact limits, as for an infinite sample of pairs."""
    setting = measures.setting
    limits = []
    for name in CLAIMED["pairs"]:
        table = exact_policies(name, setting)
        assert table is not None
        limits.append(measures.at_budget(table))
    wins = torch.einsum("ma,mab,mb->m", limits[0].exp(), setting.world.preference, limits[1].exp())
    gap = measures.exploitability(limits[1]) - measures.exploitability(limits[0])
    return {"win_rate": measures.means(wins), "less_exploitable": measures.means(gap)}


def _exploitability(measures: Measures, name: str, responses: torch.Tensor | None) -> dict[str, Any]:
    setting, last = measures.setting, measures.groups[-1]
    finished = measures.exploitability(measures.policies(name))
    limit = exact_policies(name, setting)
    facts: dict[str, Any] = {
        "by_update": [[mark, asdict(estimate(measures.exploitability(measures.policies(name, index))[:, last]))]
                      for index, mark in enumerate(setting.preset.marks())],
        "by_knob": measures.by_group(finished),
        "mixture": measures.by_group(measures.exploitability(measures.mixtures(name))),
        "at_best": [{"kl": spent, **asdict(estimate(values))}
                    for spent, values in least_exploitable(measures, name, measures.groups)],
        "limit": None if limit is None else measures.means(measures.exploitability(measures.at_budget(limit))),
        "trained": None,
    }  # fmt: skip
    if responses is not None:
        opponent = measures.policies(name)[0].exp()
        spent = measures.at_budget(responses.unsqueeze(0))
        rates = torch.einsum("sma,mab,mb->sm", spent.exp(), setting.world.preference, opponent) - 0.5
        columns = measures.by_group(rates.amax(0, keepdim=True)), measures.means(finished[:1])
        facts["trained"] = [{"best": best, "exact": exact} for best, exact in zip(*columns, strict=True)]
    return facts


def _frontier(measures: Measures, name: str) -> list[dict[str, Any]]:
    """Return win rates against the reference and the best opponent of equal budget, over budgets, for the most cyclic
    games."""
    setting, group = measures.setting, measures.groups[-1]
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


def _spent(measures: Measures, name: str) -> list[dict[str, Any]]:
    """Return the KL of the finished runs, as trained and at the budget."""
    reference = measures.setting.log_reference
    by_tau = [measures.means(kl) for kl in kl_divergence(measures.tables[name][:, :, -1], reference)]
    spent = measures.means(kl_divergence(measures.policies(name), reference))
    return [{"taus": list(kl), "at_budget": at} for *kl, at in zip(*by_tau, spent, strict=True)]


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
