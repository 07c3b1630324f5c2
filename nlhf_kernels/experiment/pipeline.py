"""The stages of the experiment in order; each reads the files that earlier ones have written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.terminal import SILENT, Reporter
from ..evaluation import Answers, Sampling, answer_measures, kl_values, play_tournament, sample_answers
from ..preference import PreferenceModelJudge, load_preference_model
from .best_responses import STARTS, make_best_response, measure_exploitability
from .claims import beats_rewards, by_beta, interior_beta
from .corpus import Material, load_corpus, make_corpus
from .equal_kl import EqualKL
from .preferences import count_all_cycles, load_annotators, make_comparison_model, make_preferences
from .presets import START, Preset, as_json, label, policy_name
from .report import write_report
from .runs import Rewards, make_run, stage_name
from .speed import measure
from .staged import StagedExperiment, machine
from .supervised import Setting, make_policy
from .workspace import RUNS, read_json, write_json

FORMAT = 2
SAMPLES = 10  # prompts with their answers side by side in the report


class Experiment(StagedExperiment):
    """The experiment on texts.

    Args:
        folder (Path): of the experiment; an interrupted one goes on.
        preset (Preset): all numbers.
        material (Material): where texts and model come from.
        device (torch.device): of all models.
        reporter (Reporter): progress lines and bars; by default none.
        restart (bool): remove the stages of an experiment that is in the folder.
        folders (sequence of Path or None): of Python sources with docstrings; None: all installed packages.
    """

    def __init__(
        self, folder: Path, preset: Preset, material: Material, device: torch.device, reporter: Reporter = SILENT,
        restart: bool = False, folders: Any = None,
    ) -> None:  # fmt: skip
        check_fits(preset, material)
        identity = {"format": FORMAT, **as_json(preset), **vars(material)}
        super().__init__(folder, identity, preset.threads, device, reporter, restart)
        self.preset, self.material, self.folders = preset, material, folders
        self.policy = self.workspace.path("sft") / "model"

    def make_stages(self) -> None:
        self.stage("corpus", "collecting texts", lambda work: make_corpus(
            work, self.preset, self.material, self.reporter, self.folders))  # fmt: skip
        self.corpus = load_corpus(self.workspace.path("corpus"))
        self.stage("sft", "supervised policy", lambda work: make_policy(
            work, self.corpus, self.preset, self.material, self.device, self.reporter))  # fmt: skip
        self.setting = Setting(self.corpus, self.policy, self.preset, self.device, self.reporter)
        self._learn_preferences()
        self.stage("cycles", "counting cycles", lambda work: count_all_cycles(work, self.judges, self.setting))
        self._train()
        self.stage("tournament", "tournament", self._tournament)
        if self.preset.response_starts:
            self._exploit()
        self.stage("speed", "kernels against the PyTorch oracle", lambda work: measure(
            work, self.judges[self.preset.judge], self.reward, self.setting))  # fmt: skip

    def write_report(self, results: dict[str, Any], folder: Path) -> Path:
        return write_report(results, folder)

    def _learn_preferences(self) -> None:
        self.stage("preferences", "preference pairs", lambda work: make_preferences(work, self.setting))
        pairs = self.workspace.path("preferences")
        kinds = {"preference model": "pairwise", "reward model": "reward"}
        for title, kind in kinds.items():
            make = partial(make_comparison_model, kind=kind, pairs=pairs, setting=self.setting)
            self.stage(title.replace(" ", "-"), title, make)
        annotators = load_annotators(self.corpus, pairs)
        preference_model, reward_model = (
            load_preference_model(self.workspace.path(f"{kind}-model") / "model", device=self.device)
            for kind in ("preference", "reward")
        )
        judge = PreferenceModelJudge(preference_model, self.preset.batch)
        self.judges: dict[str, Any] = {"preference-model": judge}
        if annotators is not None:
            self.judges["annotators"] = annotators
        self.reward = Rewards(reward_model, self.preset.batch)

    def _train(self) -> None:
        shared = {"judge": self.judges[self.preset.judge], "reward": self.reward, "setting": self.setting}
        for contestant, index, seed in self.preset.cells():
            tau = self.preset.grid(contestant)[index]
            title = f"{label(contestant)}, tau {tau:g}, run {seed + 1} of {self.preset.seeds}"
            make = partial(make_run, contestant=contestant, index=index, seed=seed, **shared)
            self.stage(stage_name(contestant, index, seed), title, make)

    def _exploit(self) -> None:
        """Train best responses to every contestant's first run at the tau whose KL is nearest to the tournament's,
        judged by the annotators if there are any."""
        nearest = read_json(self.workspace.path("tournament") / "tournament.json")["nearest"]
        judge = self.judges.get("annotators", self.judges["preference-model"])
        opponents: dict[str, Path] = {}
        responses: dict[str, list[Path]] = {}
        for contestant in self.preset.contestants:
            opponents[contestant] = self.workspace.path(stage_name(contestant, nearest[contestant], 0)) / "policy"
            responses[contestant] = []
            for start in STARTS[: self.preset.response_starts]:
                make = partial(make_best_response, opponent=opponents[contestant], start=start, judge=judge,
                               setting=self.setting)  # fmt: skip
                name = f"{RUNS}/response-{contestant}-{start}"
                self.stage(name, f"best response to {label(contestant)}, from the {start}", make)
                responses[contestant].append(self.workspace.path(name) / "policy")
        self.stage("exploitability", "exploitability", lambda work: measure_exploitability(
            work, opponents, responses, judge, self.setting))  # fmt: skip

    def _tournament(self, work: Path) -> None:
        prompts = [row.prompt for row in self.corpus.test[: self.preset.test_prompts]]
        preset, answers = self.preset, self._answers(prompts)
        pairs = len(answers) * (len(answers) - 1) // 2
        frontiers = {name: [policy_name(name, index) for index in range(len(preset.grid(name)))]
                     for name in preset.contestants}  # fmt: skip
        taus = {policy: (name, tau) for name, each in frontiers.items()
                for policy, tau in zip(each, preset.grid(name), strict=True)}  # fmt: skip
        kl = {name: kl_values(runs) for name, runs in answers.items()}
        compared: dict[str, EqualKL] = {}
        for name, judge in self.judges.items():
            with self.reporter.bar(f"matches judged by {name}", pairs) as advance:
                tournament = play_tournament(judge, prompts, answers, advance)
            compared[name] = EqualKL(tournament, kl, frontiers, START, preset.budget)
        equal = compared["preference-model"]  # the policies' KL does not depend on the judge
        nearest = {name: equal.nearest(name) for name in preset.contestants}
        shown = {START: answers[START][0]}
        shown |= {name: answers[frontiers[name][index]][0] for name, index in nearest.items()}
        cycles = read_json(self.workspace.path("cycles") / "cycles.json")
        write_json(work / "tournament.json", {
            "names": equal.names,
            "labels": [label(name) for name in equal.names],
            "prompts": len(prompts),
            "answers": preset.answers,
            "budget": preset.budget,
            "kl": equal.level,
            "nearest": nearest,
            "policies": [
                {"contestant": taus.get(name, (START, None))[0], "tau": taus.get(name, (START, None))[1],
                 **answer_measures(runs), "runs": len(runs)} for name, runs in answers.items()
            ],
            "samples": _samples(prompts, shown, [row.answer for row in self.corpus.test], self.judges),
            "judges": {name: self._judged(each, cycles[name]["cyclic_prompts"]) for name, each in compared.items()},
        })  # fmt: skip

    def _judged(self, equal: EqualKL, cyclic_prompts: list[int]) -> dict[str, Any]:
        """Return one judge's win rates and the claims decided by them."""
        claims = [interior_beta(equal), beats_rewards(equal, None), beats_rewards(equal, cyclic_prompts)]
        return {
            "matrix": equal.matrix,
            "frontiers": {name: [{"kl": point.kl.to_dict(), "rate": point.rate.to_dict()}
                                 for point in equal.points(name, self.preset.grid(name))]
                          for name in self.preset.contestants},
            "by_beta": by_beta(equal),
            "cycles": [[label(name) for name in cycle] for cycle in equal.cycles()],
            "claims": [claim for claim in claims if claim is not None],
        }  # fmt: skip

    def _answers(self, prompts: list[str]) -> dict[str, list[Answers]]:
        """Sample answers of every policy, one `Answers` for each training run, all with the same noise."""
        preset, reference = self.preset, self.setting.fresh_policy()
        folders = {START: [self.policy]}
        for contestant, index, seed in preset.cells():
            run = self.workspace.path(stage_name(contestant, index, seed))
            folders.setdefault(policy_name(contestant, index), []).append(run / "policy")
        sampling = Sampling(
            preset.answer_tokens, preset.prompt_tokens, preset.answers, seed=preset.seed, batch=preset.batch
        )
        answers: dict[str, list[Answers]] = {name: [] for name in folders}
        policies = [(name, folder) for name, each in folders.items() for folder in each]
        with self.reporter.bar("answers to the test prompts", len(policies)) as advance:
            for done, (name, folder) in enumerate(policies, start=1):
                policy = self.setting.load_policy(folder)
                answers[name].append(sample_answers(policy, reference, self.corpus.tokenizer, prompts, sampling))
                advance(done)
        return answers

    def results(self) -> dict[str, Any]:
        path = self.workspace.path
        annotators = path("preferences") / "annotators.json"
        return {
            "preset": as_json(self.preset),
            "material": vars(self.material),
            "machine": machine(self.device),
            "corpus": {"train": len(self.corpus.train), "test": len(self.corpus.test),
                       "vocabulary": len(self.corpus.tokenizer)},
            "sft": read_json(path("sft") / "measures.json"),
            "annotators": read_json(annotators) if annotators.is_file() else None,
            "preference_model": read_json(path("preference-model") / "measures.json"),
            "reward_model": read_json(path("reward-model") / "measures.json"),
            "cycles": read_json(path("cycles") / "cycles.json"),
            "histories": {f"{name} {index} {seed}": read_json(path(stage_name(name, index, seed)) / "history.json")
                          for name, index, seed in self.preset.cells()},
            "tournament": read_json(path("tournament") / "tournament.json"),
            "exploitability": (read_json(path("exploitability") / "exploitability.json")
                               if self.preset.response_starts else None),
            "speed": read_json(path("speed") / "speed.json"),
            "seconds": self.workspace.seconds(),
        }  # fmt: skip


def check_fits(preset: Preset, material: Material) -> None:
    """Raise before the first stage if the preset does not fit the material."""
    if material.data is not None and preset.judge == "annotators":
        raise ValueError("experiment: judge: expected preference-model with --data, which has no annotators to ask; "
                         "got 'annotators'")  # fmt: skip
    if material.model is None and not preset.sft_steps:
        raise ValueError("experiment: sft_steps: expected at least 1 for a model that starts from nothing; got 0")


def _samples(prompts: list[str], answers: dict[str, Answers], truths: list[str], judges: dict[str, Any]) -> Any:
    """Return each policy's first answer to the first prompts, with each judge's P(answer > SFT's)."""
    samples = []
    for row, (prompt, truth) in enumerate(zip(prompts[:SAMPLES], truths, strict=False)):
        texts = {name: each.texts[row][0] for name, each in answers.items()}
        sides = [prompt] * len(texts), list(texts.values()), [texts[START]] * len(texts)
        chances = {judge: [float(value) for value in ask(*sides)] for judge, ask in judges.items()}
        samples.append({"prompt": prompt, "truth": truth, "answers": texts, "chances": chances})
    return samples
