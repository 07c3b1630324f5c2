"""The stages of the experiment in order; each reads the files that earlier ones have written."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ...core.terminal import SILENT, Reporter
from ...data import Pair
from ..best_responses import STARTS
from ..staged import StagedExperiment, machine
from ..workspace import RUNS, read_json, write_json
from .learners import (
    POLICY,
    load_setting,
    load_table,
    make_comparison_model,
    make_pairs,
    make_response,
    make_run,
    make_start,
)
from .measures import Measures, claims, limits, measure
from .presets import CONTESTANTS, CandidatePreset, full_label
from .report import write_report
from .world import make_world

FORMAT = 1


class CandidateExperiment(StagedExperiment):
    """The experiment whose answers are a few candidates.

    Args:
        folder (Path): the experiment's.
        preset (CandidatePreset): its numbers; a folder with another experiment is refused.
        device (torch.device): where models are trained.
        reporter (Reporter): progress lines and bars.
        restart (bool): start over.
    """

    def __init__(
        self, folder: Path, preset: CandidatePreset, device: torch.device, reporter: Reporter = SILENT,
        restart: bool = False,
    ) -> None:  # fmt: skip
        identity = {"experiment": "candidates", "format": FORMAT, **asdict(preset)}
        super().__init__(folder, identity, preset.threads, device, reporter, restart)
        self.preset = preset

    def write_report(self, results: dict[str, Any], folder: Path) -> Path:
        return write_report(results, folder)

    def make_stages(self) -> None:
        preset, path = self.preset, self.workspace.path
        self.stage("sft", "reference policy", lambda work: make_start(work, make_world(preset), preset, self.device))
        self.setting = load_setting(path("sft"), preset, self.device, self.reporter)
        self.stage("preferences", "human pairs", lambda work: make_pairs(work, self.setting))
        for title, kind in (("preference model", "pairwise"), ("reward model", "reward")):
            make = partial(make_comparison_model, kind=kind, pairs=self._pairs, setting=self.setting)
            self.stage(title.replace(" ", "-"), title, make)
        tables = {"preference": load_table(path("preference-model")), "reward": load_table(path("reward-model"))}
        for name, index, run in preset.cells():
            title = f"{full_label(name)}, tau {preset.grid(name)[index]:g}, run {run + 1} of {preset.runs}"
            make = partial(make_run, contestant=name, index=index, run=run, tables=tables, setting=self.setting)
            self.stage(run_name(name, index, run), title, make)
        trained = {name: self._tables(name) for name in preset.contestants}
        measures = Measures(self.setting, trained)
        responses = {name: self._responses(name, measures) for name in preset.contestants}
        differences = tables["reward"].unsqueeze(-1) - tables["reward"].unsqueeze(-2)
        judges = {"annotators": self.setting.world.preference, "preference model": tables["preference"],
                  "reward model": differences.sigmoid()}  # fmt: skip
        self.stage("tournament", "measuring", lambda work: write_json(
            work / "measures.json", measure(measures, judges, responses)))  # fmt: skip
        self.stage("limits", "exact limits", lambda work: write_json(work / "limits.json", limits(measures)))

    @cached_property
    def _pairs(self) -> dict[str, list[Pair]]:
        parts = read_json(self.workspace.path("preferences") / "pairs.json")
        return {name: [Pair(**row) for row in rows] for name, rows in parts.items()}

    def _tables(self, name: str) -> torch.Tensor:
        """Return a contestant's log-probabilities, (N, R, T, M, A)."""
        runs = range(self.preset.runs)
        return torch.stack([
            torch.stack([load_table(self.workspace.path(run_name(name, index, run))) for run in runs])
            for index in range(len(self.preset.grid(name)))
        ])  # fmt: skip

    def _responses(self, name: str, measures: Measures) -> torch.Tensor:
        """Train best responses to the contestant's first run at the budget, from every start at every tau."""
        opponent, tables = measures.policies(name)[0], []
        middle = run_name(name, len(self.preset.grid(name)) // 2, 0)
        starts = {"reference": None, "opponent": self.workspace.path(middle) / POLICY}
        for number, tau in enumerate(self.preset.response_taus):
            for start in STARTS[: self.preset.response_starts]:
                stage = f"{RUNS}/response-{name}-{number}-{start}"
                make = partial(make_response, opponent=opponent, start=starts[start], tau=tau,
                               seed=1000 * self.preset.seed + 500 + number, setting=self.setting)  # fmt: skip
                self.stage(stage, f"best response to {full_label(name)}, tau {tau:g}, from the {start}", make)
                tables.append(load_table(self.workspace.path(stage)))
        return torch.stack(tables)

    def results(self) -> dict[str, Any]:
        path, preset = self.workspace.path, self.preset
        facts = read_json(path("tournament") / "measures.json")
        votes = {name: read_json(path(run_name(name, 0, 0)) / "measures.json") for name in preset.contestants}
        results = {
            "experiment": "candidates",
            "preset": asdict(preset),
            "machine": machine(self.device),
            "labels": {name: {"label": CONTESTANTS[name].label, "information": CONTESTANTS[name].information,
                              "algorithm": CONTESTANTS[name].algorithm} for name in preset.contestants},
            "candidates": self.setting.world.candidates,
            "start": read_json(path("sft") / "measures.json"),
            "comparison_models": {name: read_json(path(name) / "measures.json")
                                  for name in ("preference-model", "reward-model")},
            "budgets": votes,
            "claims": claims(facts),
            **facts,
            "limits": read_json(path("limits") / "limits.json"),
            "seconds": self.workspace.seconds(),
        }  # fmt: skip
        return dict(json.loads(json.dumps(results)))  # as they will be read again: lists instead of tuples


def run_name(contestant: str, index: int, run: int) -> str:
    """Return the name of a training run's stage.

    Args:
        contestant: a key of CONTESTANTS.
        index: which tau of its grid.
        run: number of the run.
    """
    return f"{RUNS}/{contestant}-tau{index}-run{run}"
