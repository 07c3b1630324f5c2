"""The experiment end to end at a tiny size: stages and their files, resuming after interruptions, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the experiment needs transformers")
pytest.importorskip("accelerate", reason="the experiment needs accelerate")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from nlhf_kernels.core.loading import load_model
from nlhf_kernels.core.terminal import SILENT
from nlhf_kernels.evaluation import Sampling, sample_answers
from nlhf_kernels.experiment import pipeline, preferences
from nlhf_kernels.experiment.best_responses import STARTS, OpponentReward
from nlhf_kernels.experiment.corpus import Material, load_corpus
from nlhf_kernels.experiment.pipeline import Experiment
from nlhf_kernels.experiment.preferences import make_comparison_model
from nlhf_kernels.experiment.presets import CONTESTANTS, PRESETS, Preset, overridden
from nlhf_kernels.experiment.runs import configuration
from nlhf_kernels.experiment.supervised import Setting, answer_loss, encode_examples
from nlhf_kernels.experiment.training import new_model
from nlhf_kernels.experiment.workspace import Workspace
from nlhf_kernels.preference import train_preference_model
from tests.support.attention import cudnn_while_learning
from tests.support.experiment import fake_packages
from tests.support.tiny_models import one_thread

TINY = overridden(PRESETS["tiny"], ["contestants=rlhf,nash-md-0,nash-md-0.5,nash-md-1", "seeds=2",
                                    "updates=1", "speed_updates=2", "response_starts=2"])  # fmt: skip


def experiment(folder: Path, packages: Path, preset: Preset = TINY, restart: bool = False) -> Experiment:
    return Experiment(folder, preset, Material(), torch.device("cpu"), SILENT, restart, [packages])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A finished experiment: its folder, its sources, its results."""
    packages = fake_packages(tmp_path_factory.mktemp("packages"))
    folder = tmp_path_factory.mktemp("experiments") / "out"
    with one_thread(), cudnn_while_learning() as allowed:
        first = experiment(folder, packages)
        results = first.run()
        first.write(results)
    assert allowed == {False}, "supervised, preference and policy training: cuDNN's attention may return NaN gradients"
    return folder, packages, results


def marks(folder: Path) -> dict[str, int]:
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("stage.json")}


def test_every_stage_leaves_its_part(done) -> None:
    folder, _, results = done
    assert {"corpus", "sft", "preferences", "preference-model", "reward-model", "cycles", "tournament", "speed"} <= set(
        marks(folder)
    )
    runs = [name for name in marks(folder) if name.startswith("runs/")]
    assert len(runs) == (2 * 2 + 2) * len(TINY.contestants), "two seeds at two tau, and two best responses"
    assert not list(folder.rglob("*.nlhf-*")) and not list(folder.rglob("trainer"))
    assert results["tournament"]["names"] == ["sft", *TINY.contestants]
    assert set(results["seconds"]) == set(marks(folder))


def test_the_better_best_response_counts(done) -> None:
    folder, _, results = done
    assert set(results["exploitability"]) == set(TINY.contestants)
    for each in results["exploitability"].values():
        assert each["start"] in STARTS and 0 <= each["mean"] <= 1 and each["prompts"] == TINY.test_prompts
    assert "its best response wins" in (folder / "report" / "report.html").read_text()


def test_best_responses_play_the_policies_nearest_to_the_level(done, tmp_path, monkeypatch) -> None:
    folder, packages, _ = done
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    for path in (copy / "exploitability", *(copy / "runs").glob("response-*")):
        shutil.rmtree(path)
    facts = json.loads((copy / "tournament" / "tournament.json").read_text())
    asked = {}

    def seen(work: Path, opponent: Path, start: str, **_: object) -> None:
        asked[opponent.parent.name, start] = None
        shutil.copytree(opponent, work / "policy")

    monkeypatch.setattr(pipeline, "make_best_response", seen)
    with one_thread():
        experiment(copy, packages).run()
    assert list(asked) == [
        (f"{name}-tau{facts['nearest'][name]}-seed0", start) for name in TINY.contestants for start in STARTS
    ]


def test_a_best_response_is_rewarded_for_what_it_wins_against_fresh_answers(done) -> None:
    folder, _, _ = done
    corpus = load_corpus(folder / "corpus")
    setting = Setting(corpus, folder / "sft" / "model", TINY, torch.device("cpu"), SILENT)
    asked = []

    def longer(prompts, first, second):
        asked.append(second)
        return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]

    reward = OpponentReward(setting.fresh_policy(), longer, setting, seed=1)
    prompts = [corpus.train[0].prompt] * 2 + [corpus.train[1].prompt]
    with one_thread():
        assert reward(prompts, ["x" * 1000, "", "x" * 1000]).tolist() == [1.0, pytest.approx(0.0, abs=0.5), 1.0]
        reward(prompts, ["a", "b", "c"])
    assert len(asked) == 4, "two answers of the opponent to every prompt, at every call"
    assert all(rivals[0] == rivals[1] for rivals in asked), "the same opponent's answer for both answers to a prompt"
    assert asked[:2] != asked[2:], "and other ones the next time"


def test_the_numbers_are_whole(done) -> None:
    _, _, results = done
    facts = results["tournament"]
    for judge in ("preference-model", "annotators"):
        matrix = facts["judges"][judge]["matrix"]
        for i, row in enumerate(matrix):
            assert row[i] is None
            for j, cell in enumerate(row):
                if cell is not None:
                    assert 0 <= cell["mean"] <= 1 and cell["prompts"] == TINY.test_prompts and cell["seeds"] == 2
                    assert cell["mean"] + matrix[j][i]["mean"] == pytest.approx(1.0)
        assert len(facts["judges"][judge]["claims"]) == 3
        assert [point["beta"] for point in facts["judges"][judge]["by_beta"]] == [0.0, 0.5, 1.0]
    first, *others = facts["policies"]
    assert first["contestant"] == "sft" and first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert [(each["contestant"], each["tau"], each["runs"]) for each in others] == [
        (name, tau, 2) for name in TINY.contestants for tau in TINY.grid(name)
    ]
    reached = [max(each["kl"] for each in facts["policies"] if each["contestant"] in ("sft", name))
               for name in TINY.contestants]  # fmt: skip
    assert facts["kl"] == pytest.approx(min(TINY.budget, *reached)), "the budget, or as far as all of them come"
    for name, index in facts["nearest"].items():
        kls = [each["kl"] for each in others if each["contestant"] == name]
        assert abs(kls[index] - facts["kl"]) == min(abs(kl - facts["kl"]) for kl in kls)
    for judge in ("preference-model", "annotators"):
        for points in facts["judges"][judge]["frontiers"].values():
            assert len(points) == 3 and points[0]["rate"]["mean"] <= 1, "the reference and two tau"
        for sample in facts["samples"]:
            assert sample["chances"][judge][0] == pytest.approx(0.5) and len(sample["chances"][judge]) == 5
    assert results["cycles"]["annotators"]["responses"] == TINY.cycle_responses
    assert results["speed"]["update"]["speedup"] > 0
    assert {each["name"] for each in results["speed"]["operations"]} == {"mixture_sample", "linear_nash_pg_loss"}


def test_histories_hold_what_the_figures_show(done) -> None:
    _, _, results = done
    assert len(results["histories"]) == 2 * 2 * len(TINY.contestants)
    for run, history in results["histories"].items():
        logged = {name for entry in history for name in entry}
        assert {"loss", "length", "eval_win_rate_reference", "eval_kl"} <= logged, run


def test_the_report_is_one_file_and_nothing_is_fetched(done) -> None:
    folder, _, results = done
    page = (folder / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 5
    assert "http://" not in page and "https://" not in page.replace("https://docs", ""), "self-contained"
    assert json.loads((folder / "report" / "results.json").read_text()) == json.loads(json.dumps(results))


def test_a_finished_experiment_is_kept_and_gives_the_same_results(done) -> None:
    folder, packages, results = done
    before = marks(folder)
    again = experiment(folder, packages).run()
    assert marks(folder) == before
    assert again == json.loads(json.dumps(results))


def test_an_interrupted_stage_is_absent_and_the_next_start_goes_on(done, tmp_path, monkeypatch) -> None:
    folder, packages, results = done
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    for name in ("runs/nash-md-1-tau1-seed1", "tournament"):
        shutil.rmtree(copy / name)
    times = marks(copy)

    def interrupted(work: Path, **_: object) -> None:
        (work / "half").write_text("done")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment(copy, packages).run()
    assert not (copy / "runs" / "nash-md-1-tau1-seed1").exists()
    (copy / "runs" / ".nash-md-1-tau1-seed1.abcd1234.nlhf-unfinished").mkdir()  # what kill -9 leaves
    with one_thread():
        again = experiment(copy, packages).run()
    assert {name: mark for name, mark in marks(copy).items() if name in times} == times, "finished stages stay"
    assert not list(copy.rglob("*.nlhf-*"))
    assert again["tournament"] == json.loads(json.dumps(results["tournament"])), "a run made again is the same run"


def test_folders_of_others_are_refused_and_restart_clears_only_its_own(done, tmp_path) -> None:
    _, packages, _ = done
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"--out: expected an empty folder.*holds other things"):
        experiment(tmp_path, packages)
    with pytest.raises(FileExistsError, match=r"--out: expected an empty folder"):
        experiment(tmp_path, packages, restart=True)
    with pytest.raises(FileExistsError, match=r"--out: expected a folder; got the file"):
        experiment(tmp_path / "thesis.tex", packages)
    own = tmp_path / "own"
    experiment(own, packages, overridden(TINY, ["taus=0.7"]))
    same = experiment(own, packages)  # nothing was made under the other settings: no reason to refuse
    same.workspace.stage("corpus", lambda work: None)
    (own / "notes.txt").write_text("mine")
    changed = overridden(TINY, ["taus=0.5,0.4"])
    with pytest.raises(
        ValueError, match=r"whose taus is \[0.3, 0.03\]; this one's is \[0.5, 0.4\] \(--restart starts over"
    ):
        experiment(own, packages, changed)
    experiment(own, packages, changed, restart=True)
    assert not (own / "corpus").exists() and (own / "notes.txt").read_text() == "mine"
    (own / "experiment.json").write_text("{")
    same.workspace.stage("corpus", lambda work: None)
    with pytest.raises(ValueError, match=r"experiment.json: expected JSON; got .* \(--restart starts over\)"):
        experiment(own, packages, changed)


def test_what_has_a_stages_name_but_is_none_stays_and_damage_is_named(done, tmp_path) -> None:
    folder, packages, _ = done
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    for name in ("cycles", "runs/rlhf-tau0-seed0"):
        (copy / name / "stage.json").rename(copy / "kept.json")
        (copy / name / "nlhf_manifest.json").rename(copy / "manifest.json")
        for restart in (False, True):
            with pytest.raises(
                FileExistsError, match=f"expected a stage of the experiment under the name .*{name}; got"
            ):
                experiment(copy, packages, restart=restart)
        (copy / "kept.json").rename(copy / name / "stage.json")
        (copy / "manifest.json").rename(copy / name / "nlhf_manifest.json")
    (copy / "report" / "thoughts.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"report: overwrite: expected only what this library wrote; got thoughts"
    ):
        experiment(copy, packages)
    (copy / "report" / "thoughts.txt").unlink()
    weights = copy / "sft" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"sft/model/model.safetensors: expected the CRC-32 .*; without .*sft and the st"
    ):
        experiment(copy, packages)


def test_a_stage_is_made_once(tmp_path) -> None:
    space, calls = Workspace(tmp_path / "w", {"a": (1, 2)}), []

    def make(work: Path) -> None:
        calls.append(work)
        (work / "x").write_text("y")

    for _ in range(2):
        place = space.stage("sft", make)
    assert len(calls) == 1 and (place / "x").read_text() == "y"
    assert list(Workspace(tmp_path / "w", {"a": [1, 2]}).seconds()) == ["sft"]


def test_users_pairs_and_model_take_the_same_way(done, tmp_path) -> None:
    folder, _, _ = done
    rows = [{"prompt": f"say {word} {i}", "chosen": " yes indeed", "rejected": f" no {i}"}
            for i in range(12) for word in ("this", "that")]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    material = Material(data=str(data), model=str(folder / "sft" / "model"))
    preset = overridden(TINY, ["contestants=rlhf,nash-ema,ipo-md", "seeds=1", "sft_steps=0"])
    with one_thread():
        results = Experiment(tmp_path / "out", preset, material, torch.device("cpu"), SILENT).run()
    assert results["annotators"] is None and list(results["tournament"]["judges"]) == ["preference-model"]
    assert results["sft"]["losses"] == [], "the given model is the reference as it is"
    assert results["tournament"]["names"] == ["sft", "rlhf", "nash-ema", "ipo-md"]
    with pytest.raises(ValueError, match=r"judge: expected preference-model with --data"):
        Experiment(tmp_path / "x", overridden(preset, ["judge=annotators"]), material, torch.device("cpu"), SILENT)
    with pytest.raises(ValueError, match=r"sft_steps: expected at least 1 for a model that starts from nothing; got 0"):
        Experiment(tmp_path / "x", preset, Material(data=str(data)), torch.device("cpu"), SILENT)
    assert not (tmp_path / "x").exists(), "refused before anything is written"


def test_answers_depend_on_prompt_and_seed_not_on_the_batch(done) -> None:
    folder, _, _ = done
    model, corpus = load_model("test", folder / "sft" / "model"), load_corpus(folder / "corpus")
    prompts = [row.prompt for row in corpus.test[:5]]
    ask = lambda batch, seed=0: sample_answers(  # noqa: E731
        model, None, corpus.tokenizer, prompts, Sampling(6, 48, 3, seed=seed, batch=batch)
    )
    whole, parts = ask(64), ask(2)
    assert whole.texts == parts.texts and torch.equal(whole.lengths, parts.lengths)
    assert ask(64, seed=1).texts != whole.texts
    assert len(whole.texts) == 5 and all(len(row) == 3 for row in whole.texts) and whole.kl is None
    with pytest.raises(ValueError, match=r"answers: samples: expected an integer in \[1"):
        Sampling(6, 48, 0)


def test_the_supervised_loss_counts_answers_only(done) -> None:
    folder, _, _ = done
    corpus = load_corpus(folder / "corpus")
    rows = encode_examples(corpus.tokenizer, corpus.test[:7], TINY, whole=False)
    model = new_model(corpus.tokenizer, TINY, TINY.positions).eval().requires_grad_(False)
    expected, count = 0.0, 0
    for row in rows:
        logs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                expected, count = expected - float(logs[place - 1, label]), count + 1
    assert answer_loss(model, rows, corpus.tokenizer.pad_token_id, 3) == pytest.approx(expected / count, rel=1e-4)
    assert all(row["input_ids"][-1] == corpus.tokenizer.eos_token_id for row in rows)


def test_preference_and_reward_model_are_told_the_same(done, tmp_path, monkeypatch) -> None:
    """Both models start from the same weights, and see the same pairs with the same settings."""
    folder, _, _ = done
    setting = Setting(load_corpus(folder / "corpus"), folder / "sft" / "model", TINY, torch.device("cpu"), SILENT)
    told = []

    def recorded(model, pairs, settings, held_out, progress):
        weights = {name: value.clone() for name, value in model.body.state_dict().items()}
        told.append((weights, list(pairs), settings, list(held_out)))
        return train_preference_model(model, pairs, settings, held_out=held_out, progress=progress)

    monkeypatch.setattr(preferences, "train_preference_model", recorded)
    for kind in ("pairwise", "reward"):
        (tmp_path / kind).mkdir()
        with one_thread():
            make_comparison_model(tmp_path / kind, kind, folder / "preferences", setting)
    (first, *pairwise), (second, *reward) = told
    assert pairwise == reward and len(pairwise[0]) > 10
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    losses = [json.loads((tmp_path / kind / "measures.json").read_text())["losses"] for kind in ("pairwise", "reward")]
    assert len(losses[0]) == len(losses[1]) == TINY.preference_steps


def test_budgets_are_equal_and_algorithms_differ(tmp_path) -> None:
    small = PRESETS["small"]
    configs = {name: configuration(name, 1, 1, small, tmp_path, torch.device("cpu")) for name in CONTESTANTS}
    assert {name: config.tau for name, config in configs.items()} == {
        name: {"rlhf": small.reward_taus, "ipo-md": small.ipo_taus}.get(name, small.taus)[1] for name in CONTESTANTS
    }
    for name in ("max_steps", "per_device_train_batch_size", "samples_per_prompt", "learning_rate", "seed"):
        assert len({getattr(config, name) for config in configs.values()}) == 1, name
    assert {config.algorithm for config in configs.values()} == {"rlhf", "nash-md", "nash-ema", "ipo-md"}
    assert [configs[f"nash-md-{beta}"].beta for beta in ("0", "0.125", "0.25", "0.5", "1")] == [0, 0.125, 0.25, 0.5, 1]


def test_presets_are_changed_by_name() -> None:
    small = PRESETS["small"]
    changed = overridden(
        small, ["updates=7", "taus=0.5, 0.1", "bfloat16=true", "contestants=rlhf, nash-ema", "judge=annotators"]
    )
    assert (changed.updates, changed.taus, changed.bfloat16, changed.judge) == (7, (0.5, 0.1), True, "annotators")
    assert changed.contestants == ("rlhf", "nash-ema") and changed.examples == small.examples
    for setting, message in {
        "upates=7": r"expected NAME=VALUE .* got 'upates=7' \(is updates meant\?\)",
        "updates": r"expected NAME=VALUE",
        "updates=many": r"--set: updates: expected a whole number; got 'many'",
        "answers=1": r"experiment: answers: expected an integer in \[2",
        "updates=0": r"experiment: updates: expected an integer in \[1",
        "bfloat16=yes": r"bfloat16: expected one of true, false; got 'yes'",
        "contestants=rlhf,dpo": r"contestants: expected one of rlhf, .*; got 'dpo'",
        "contestants=": r"contestants: expected at least one",
        "taus=0.1,0.2": r"taus: expected one or more falling numbers; got \(0.1, 0.2\)",
        "reward_taus=": r"reward_taus: expected one or more falling numbers; got \(\)",
        "ipo_taus=1,0": r"ipo_taus: expected a finite number in \(0.0",
        "budget=0": r"budget: expected a finite number in \(0.0",
        "judge=me": r"judge: expected one of preference-model, annotators; got 'me'",
        "positions=100": r"positions: expected more than prompt_tokens \+ 2 answer_tokens = \d+; got 100",
    }.items():
        with pytest.raises(ValueError, match=message):
            overridden(small, [setting])
