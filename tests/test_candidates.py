"""The experiment on candidates: the world, the contestants' data, sampled training against exact numbers, and the
whole pipeline at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the experiment needs transformers")
pytest.importorskip("accelerate", reason="the experiment needs accelerate")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from nlhf_kernels.cli.main import main
from nlhf_kernels.core.plots import PALETTE
from nlhf_kernels.core.terminal import Reporter
from nlhf_kernels.evaluation import plus_minus
from nlhf_kernels.experiment import overridden
from nlhf_kernels.experiment.__main__ import main as redraw
from nlhf_kernels.experiment.candidates import CANDIDATE_PRESETS, CandidateExperiment, CandidatePreset, pipeline
from nlhf_kernels.experiment.candidates.exact import equilibrium_within, exact_policies, exact_rewards
from nlhf_kernels.experiment.candidates.judges import OnlineReward, TableJudge, Votes, fit_rewards
from nlhf_kernels.experiment.candidates.learners import (
    Setting,
    load_setting,
    load_table,
    make_response,
    make_run,
    make_start,
    save_table,
)
from nlhf_kernels.experiment.candidates.measures import Measures, claims, estimate, least_exploitable, limits
from nlhf_kernels.experiment.candidates.presets import CONTESTANTS
from nlhf_kernels.experiment.candidates.report import all_figures, answer, describe_distance, page, tables
from nlhf_kernels.experiment.candidates.world import load_world, make_world, save_world
from nlhf_kernels.tabular import PreferenceGame, at_budget, exploitability, exploitability_within
from nlhf_kernels.tabular.baselines import bradley_terry_fit
from nlhf_kernels.tabular.cycling import cyclic_triple_share
from nlhf_kernels.tabular.measures import kl_divergence
from tests.support.tiny_models import one_thread

TINY = CANDIDATE_PRESETS["tiny"]
#: Large enough to learn, small enough for a test.
LEARNING = CandidatePreset(knobs=(0.0, 1.0), games=2, candidates=4, hidden=32, start_steps=150, updates=120,
                           samples_per_prompt=48, learning_rate=1e-2)  # fmt: skip
SILENT = Reporter(None)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("start")
    with one_thread():
        make_start(folder, make_world(LEARNING), LEARNING, torch.device("cpu"))
    return load_setting(folder, LEARNING, torch.device("cpu"), SILENT)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("candidates") / "out"
    with one_thread():
        experiment = CandidateExperiment(folder, TINY, torch.device("cpu"), SILENT)
        results = experiment.run()
        experiment.write(results)
    return folder, results


def test_the_small_world_has_a_reward_at_one_end_and_circles_at_the_other() -> None:
    world = make_world(CANDIDATE_PRESETS["small"])
    PreferenceGame(world.preference)
    shares = [float(cyclic_triple_share(world.preference[world.of_group(knob), :-1, :-1]).mean()) for knob in range(5)]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == 0.5
    assert len(set(world.prompts)) == 5 * CANDIDATE_PRESETS["small"].games
    assert (world.preference[:, :-1, -1] == 1).all(), "anything else loses to every candidate"


def untrained(games: int) -> Setting:
    """The small preset's world, with a reference that answers as often as the world says."""
    preset = replace(CANDIDATE_PRESETS["small"], games=games)
    world = make_world(preset)
    others = torch.full((5 * games, 1), 0.001, dtype=torch.float64)
    log_reference = torch.cat([world.common * 0.999, others], -1).log()
    return Setting(world, None, Path(), log_reference, preset, torch.device("cpu"), SILENT)


def test_the_effects_of_the_power_calculation() -> None:
    """The exact limits differ at the knobs 0, 0.5 and 1, and from game to game, as docs/experiment.md states."""
    setting = untrained(16)
    world, preset, log_reference = setting.world, setting.preset, setting.log_reference
    measures = Measures(setting, {})
    tables = [exact_policies(name, setting) for name in ("rlhf-pairs", "nash-md-pairs")]
    policies = [at_budget(table, log_reference, preset.budget) for table in tables]
    values = measures.exploitability(policies[0]) - measures.exploitability(policies[1])
    gaps = [values[world.of_group(knob)] for knob in (0, 2, 4)]
    assert [round(float(gap.mean()), 1) for gap in gaps] == [0.0, 0.1, 0.2]
    assert float(gaps[0].abs().max()) < 0.01 and all(0.01 < float(gap.std()) < 0.04 for gap in gaps[1:])


def test_the_equilibrium_within_the_budget_spends_all_of_it_only_where_a_reward_exists() -> None:
    setting = untrained(2)
    names = ("nash-md-pairs", "rlhf-pairs", "rlhf-queries")
    measures = Measures(setting, dict.fromkeys(names, torch.empty(0)))
    star, facts = equilibrium_within(setting), limits(measures)
    lost = exploitability_within(star, setting.world.preference, setting.log_reference, 1.0)
    assert float(lost.max()) < 1e-3, "no opponent within the budget beats it"
    spent = kl_divergence(star, setting.log_reference)
    assert float(spent.max()) <= 1 + 1e-9 and float(spent[:4].min()) > 0.999 and float(spent[-2:].max()) < 0.5
    assert facts["equilibrium"]["kl"] == pytest.approx([float(each.mean()) for each in spent.split(2)])
    assert facts["equilibrium"]["exploitability"] == pytest.approx([float(each.mean()) for each in lost.split(2)])
    start = exploitability_within(setting.log_reference, setting.world.preference, setting.log_reference, 1.0)
    assert [each["mean"] for each in facts["reference"]] == pytest.approx([float(v.mean()) for v in start.split(2)])
    assert set(facts["kl"]) == {"nash-md-pairs", "rlhf-pairs"}, "the limit with votes during training is not known"
    assert facts["kl"]["rlhf-pairs"][-1] > 0.9 > facts["kl"]["nash-md-pairs"][-1] > facts["equilibrium"]["kl"][-1]


def test_the_world_is_read_as_it_was_written(tmp_path) -> None:
    world = make_world(TINY)
    save_world(world, tmp_path / "world.json")
    again = load_world(tmp_path / "world.json")
    assert again.prompts == world.prompts and again.knobs == world.knobs
    assert torch.equal(again.preference, world.preference) and torch.equal(again.common, world.common)


def test_the_reference_answers_as_often_as_the_world_says(setting) -> None:
    torch.testing.assert_close(setting.log_reference[:, :-1].exp(), setting.world.common, rtol=0, atol=0.02)
    torch.testing.assert_close(setting.log_reference.exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_votes_are_drawn_from_the_annotators_probabilities(setting) -> None:
    world = setting.world
    count = 20_000
    asked = [world.prompts[2]] * count, [world.candidates[0]] * count, [f" {world.candidates[1]}"] * count
    votes = Votes(TableJudge(world, world.preference), seed=1)
    share, chance = float(votes(*asked).mean()), float(world.preference[2, 0, 1])
    assert abs(share - chance) < 5 * (chance * (1 - chance) / count) ** 0.5  # false alarm: 6e-7
    assert votes.asked == count
    assert float(TableJudge(world, world.preference)([world.prompts[0]], ["no dish"], [world.candidates[0]])) == 0


def test_refitted_rewards_are_those_of_all_votes_and_cost_one_vote_an_answer(setting) -> None:
    world = setting.world
    reward = OnlineReward(Votes(TableJudge(world, world.preference), seed=2), setting.log_reference)
    prompts = [prompt for prompt in world.prompts[:2] for _ in range(300)]
    answers = [world.candidates[number % 4] if number % 5 else "anything" for number in range(600)]
    for _ in range(3):
        rewards = reward(prompts, answers)
    assert reward.votes.asked == 1800 and float(reward.wins.sum()) == 2 * 1800 / 2
    table = reward.rewards[:2]
    torch.testing.assert_close(
        fit_rewards(reward.wins[:2], torch.zeros_like(table), steps=200), table, rtol=0, atol=0.02
    )
    reference = setting.log_reference.exp()[0]
    centred = table[0] - (reference * table[0]).sum()
    assert rewards[1] == centred[1] and rewards[0] == centred[4]


def test_fitted_rewards_are_the_bradley_terry_fit_of_many_votes(setting) -> None:
    fitted = exact_rewards(setting.world.preference, setting.log_reference)[:, :-1]
    for row in range(4):
        chance = setting.log_reference[row, :-1].softmax(-1)
        expected = bradley_terry_fit(setting.world.preference[row, :-1, :-1], chance)
        torch.testing.assert_close(fitted[row] - fitted[row].mean(), expected, rtol=0, atol=2e-3)


def test_a_trained_best_response_finds_the_exact_exploitability(setting, tmp_path) -> None:
    """Training a language model on sampled answers reaches the exploitability computed exactly."""
    tau = 0.2
    game = PreferenceGame(setting.world.preference, setting.log_reference.exp(), tau)
    generator = torch.Generator().manual_seed(0)
    opponent = (setting.log_reference + torch.randn(4, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    exact = exploitability(opponent, game)
    with one_thread():
        make_response(tmp_path, opponent, None, tau, 0, setting)
    response = load_table(tmp_path)
    wins = torch.einsum("ma,mab,mb->m", response.exp(), setting.world.preference, opponent.exp())
    price = kl_divergence(opponent, setting.log_reference) - kl_divergence(response, setting.log_reference)
    trained = wins + tau * price - 0.5
    assert (trained <= exact + 1e-12).all(), "no response is better than the best"
    assert float((exact - trained).max()) < 0.01
    assert float((exact - 0.05).min()) > 0, "there was something to find"


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name not in TINY.contestants])
def test_every_other_contestant_trains_and_is_measured(name, setting, tmp_path) -> None:
    """Contestants of the larger presets run two updates, count their votes and record policies at both marks."""
    brief = replace(setting, preset=replace(LEARNING, updates=2, checkpoints=2, samples_per_prompt=2))
    with one_thread():
        make_run(tmp_path, name, 1, 0, {"preference": setting.world.preference, "reward": setting.log_reference}, brief)
    table = load_table(tmp_path)
    assert table.shape == (2, 4, 5) and float(table.exp().sum(-1).sub(1).abs().max()) < 1e-9
    assert not torch.equal(table[0], table[1])
    assert json.loads((tmp_path / "measures.json").read_text()) == {"updates": 2, "votes": 2 * 2 * 4}
    assert exact_policies(name, setting) is not None


def test_limits_at_the_knobs_ends(setting) -> None:
    """Self-play converges to the equilibrium, Nash-MD's mixture to that of a larger tau."""
    star = exact_policies("self-play-queries", setting)
    assert star is not None
    for index, tau in enumerate(LEARNING.taus):
        game = PreferenceGame(setting.world.preference, setting.log_reference.exp(), tau)
        assert float(exploitability(star[index], game).max()) < 1e-9
    nash = exact_policies("nash-md-queries", setting)
    assert nash is not None
    mixture = (0.75 * nash[0] + 0.25 * setting.log_reference).log_softmax(-1)
    game = PreferenceGame(setting.world.preference, setting.log_reference.exp(), LEARNING.taus[0] / 0.75)
    assert float(exploitability(mixture, game).max()) < 1e-9
    assert exact_policies("rlhf-queries", setting) is None


def test_matches_count_all_pairs_of_runs_and_the_noise_of_both_sides(setting) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 1, 4, 5)  # taus, runs, marks, prompts, actions
    tables = {name: torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
              for name in ("nash-md-queries", "rlhf-queries")}  # fmt: skip
    measures = Measures(setting, tables)
    first, second = (measures.policies(name).exp() for name in tables)
    values = measures.match(*tables)
    every = [
        first[r, m] @ setting.world.preference[m] @ second[s, m] for r in range(3) for s in range(3) for m in range(4)
    ]
    assert float(values.mean()) == pytest.approx(float(sum(every)) / 36, abs=1e-12)
    back = measures.match("rlhf-queries", "nash-md-queries")
    torch.testing.assert_close(values.mean(0) + back.mean(0), torch.ones(4, dtype=torch.float64))
    spent = kl_divergence(first.log(), setting.log_reference)
    assert float(spent.max()) <= LEARNING.budget + 1e-9


def test_a_contestant_may_stop_where_it_is_least_exploitable(setting) -> None:
    """A frontier that only makes its policies easier to beat is left at its beginning, the reference."""
    world, log_reference = setting.world, setting.log_reference
    losing = (log_reference - 8 * (world.preference @ log_reference.exp().unsqueeze(-1)).squeeze(-1)).log_softmax(-1)
    winning = (log_reference + 2 * (world.preference @ log_reference.exp().unsqueeze(-1)).squeeze(-1)).log_softmax(-1)
    groups = [torch.arange(len(world.prompts))]
    facts = {}
    for name, policy in {"nash-md-pairs": losing, "rlhf-pairs": winning}.items():
        measures = Measures(setting, {name: policy.expand(2, 3, 1, *policy.shape)})
        kl, values = measures.frontier(name)
        assert float(kl[0].abs().max()) < 1e-9 and (kl.diff(dim=0) >= -1e-9).all()
        assert float(kl.max()) <= LEARNING.budget + 1e-9
        torch.testing.assert_close(values[0, 0], measures.exploitability(log_reference.unsqueeze(0))[0])
        torch.testing.assert_close(values[-1], measures.exploitability(measures.policies(name)))
        ((spent, least),) = least_exploitable(measures, name, groups)
        torch.testing.assert_close(least.mean(), values.mean((1, 2)).min())
        facts[name] = spent
    assert facts["nash-md-pairs"] < 1e-9 < 0.05 < facts["rlhf-pairs"]


def test_an_interval_covers_runs_and_prompts() -> None:
    alike = torch.full((3, 4), 0.6, dtype=torch.float64)
    assert estimate(alike).half == pytest.approx(0, abs=1e-12)
    runs = alike + torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)[:, None]
    assert estimate(runs).half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3)
    assert estimate(runs.T).half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [(0.1, 0.05, "reproduced"), (0.1, 0.095, "not resolved"), (-0.1, 0.05, "contradicted"), (0.0, 0.3, "not resolved")],
)
def test_verdicts_take_the_whole_interval(mean, half, verdict) -> None:
    gap = {"mean": mean, "half": half}
    row = {"less_exploitable": gap, "less_exploitable_at_best": gap, "win_rate": {"mean": 0.5 + mean, "half": half}}
    even = {"less_exploitable": {"mean": 0.0, "half": 0.01}, "win_rate": {"mean": 0.505, "half": 0.01}}
    decided = claims({"advantages": {"pairs": [even, row]}})
    assert [claim["verdict"] for claim in decided] == [verdict, verdict, verdict, verdict, "reproduced"]


def test_every_stage_leaves_its_part_and_the_results_are_numbers(done) -> None:
    folder, results = done
    assert (folder / "runs" / "rlhf-queries-tau0-run0" / "policy" / "model.safetensors").is_file()
    assert json.loads((folder / "report" / "results.json").read_text()) == json.loads(json.dumps(results))
    votes = {name: each["votes"] for name, each in results["budgets"].items()}
    assert votes == {"rlhf-pairs": 0, "nash-md-pairs": 0, "rlhf-queries": 2 * 2 * 4, "nash-md-queries": 2 * 2 * 4}
    assert [knob["cyclic"] for knob in results["knobs"]] == [0.0, 1.0]
    for facts in results["exploitability"].values():
        for least, compared in zip(facts["at_best"], facts["by_knob"], strict=True):
            assert least["mean"] <= compared["mean"] + 1e-9 and 0 <= least["kl"] <= 1 + 1e-9
        for each in facts["trained"]:
            assert each["best"]["mean"] <= each["exact"] + 1e-9


def test_the_report_begins_with_the_answer_holds_four_figures_and_escapes_texts(done) -> None:
    folder, results = done
    text = (folder / "report" / "report.html").read_text()
    parts = ["Where preferences cycle most (100% of triples)", "<img", "The claims", "<h2>Answers", "<h2>Numbers"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and text.rindex("<img") < places[2], "the answer, four figures, then the rest"
    assert "annotators prefer<" in text and "@media print{" in text and ".scroll{overflow:visible}" in text
    assert text.count("<img") == len(list((folder / "report" / "figures").glob("*.svg"))) == 4
    assert "http://" not in text.replace("http://www.w3.org", "") and 'src="data:' in text
    changed = {**results, "candidates": ["<script>", *results["candidates"][1:]]}
    assert "<script>" not in page(changed, [])


def test_the_report_says_what_training_bought_and_how_far_an_equilibrium_is(done) -> None:
    _, results = done
    named = {title: rows for title, _, rows in tables(results)}
    exploited = {row[0]: row[1:] for row in named["Exploitability at equal KL"]}
    reference = results["limits"]["reference"]
    assert exploited["untrained reference"] == [plus_minus(each["mean"], each["half"]) for each in reference]
    assert exploited["equilibrium within 1 nat"] == ["0.000", "0.000"]
    spent = {row[0]: row[1:] for row in named["KL at which they are compared, nats"]}
    assert {"RLHF, pairs", "RLHF, pairs, exact limit", "Nash-MD 0.25, queries", "equilibrium within 1 nat"} <= set(
        spent
    )
    assert spent["RLHF, queries"] == [f"{each['at_budget']:.2f}" for each in results["policies"]["rlhf-queries"]]
    (axes,) = next(figure for name, _, figure in all_figures(results) if name == "exploitability").axes
    line = next(line for line, *_ in axes.containers if line.get_ydata()[0] == reference[-1]["mean"])
    assert len(set(line.get_ydata())) == 1 and line.get_xdata()[-1] >= TINY.updates, "a level over the whole width"
    assert f"{reference[-1]['mean'] + 0.5:.2f}" in answer(results)[0]
    for kl, said in ((0.3, "not held back"), (0.95, "nearly all of the budget")):
        changed = {**results, "limits": {**results["limits"], "equilibrium": {"kl": [1.0, kl]}}}
        assert said in describe_distance(changed) and f"spends 1.00, {kl:.2f} of it" in describe_distance(changed)


def test_no_more_lines_are_drawn_than_colours_tell_apart(done) -> None:
    _, results = done
    more = json.loads(json.dumps(results))
    for name in CONTESTANTS:
        for part in ("exploitability", "frontiers"):
            more[part].setdefault(name, results[part]["rlhf-pairs"])
        facts = CONTESTANTS[name]
        more["labels"].setdefault(name, {"label": facts.label, "information": facts.information,
                                         "algorithm": facts.algorithm})  # fmt: skip
    more["matrix"][-1]["rates"] = [[None] * len(CONTESTANTS) for _ in CONTESTANTS]
    for name, caption, figure in all_figures(more):
        lines = [line for line, *_ in figure.axes[0].containers]
        colours = [line.get_color() for line in lines]
        assert len(set(colours)) == len(colours) <= len(PALETTE), name
        if name in ("exploitability", "frontier"):
            assert len(lines) >= 6 and "6 of 10 contestants, the others are in the tables" in caption
    assert all("in the tables" not in caption for _, caption, _ in all_figures(results))


def test_the_report_is_drawn_again_from_its_numbers(done, tmp_path, capsys) -> None:
    folder, _ = done
    assert redraw([str(folder / "report" / "results.json"), "--out", str(tmp_path / "again"), "--markdown"]) == 0
    assert "| The annotators" not in capsys.readouterr().out
    assert (tmp_path / "again" / "report.html").read_bytes() == (folder / "report" / "report.html").read_bytes()


def test_it_goes_on_after_an_interruption_and_gets_the_same(done, tmp_path, monkeypatch) -> None:
    _, results = done
    calls = []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make_run(*arguments, **options)

    with one_thread():
        monkeypatch.setattr(pipeline, "make_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            CandidateExperiment(tmp_path / "out", TINY, torch.device("cpu"), SILENT).run()
        monkeypatch.setattr(pipeline, "make_run", make_run)
        again = CandidateExperiment(tmp_path / "out", TINY, torch.device("cpu"), SILENT).run()
    for part in ("advantages", "exploitability", "frontiers"):
        assert again[part] == results[part]
    with pytest.raises(ValueError, match="whose games is 2; this one's is 3"):
        CandidateExperiment(tmp_path / "out", replace(TINY, games=3), torch.device("cpu"), SILENT)


def test_the_demo_shows_the_answer(done, capsys) -> None:
    folder, _ = done
    assert main(["demo", "--preset", "tiny", "--out", str(folder), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "Where preferences cycle most" in captured.out and "Report: " in captured.out
    assert "reference policy (kept)" in captured.err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("knobs=0.5,0.1", "knobs: expected rising numbers"),
        ("knobs=2", r"knobs: expected a finite number in \[0"),
        ("taus=0.1,0.2", "taus: expected one or more falling numbers"),
        ("contestants=dpo", "contestants: expected one of"),
        ("checkpoints=9", "checkpoints: expected an integer in"),
        ("hidden=10", "hidden: expected a multiple of 2 heads"),
    ],
)
def test_numbers_that_make_no_experiment_are_refused(setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        overridden(TINY, [setting])


def test_more_games_than_there_are_words_for_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates: expected at most 11; got 12"):
        make_world(replace(TINY, candidates=12))


def test_tables_come_back(tmp_path) -> None:
    table = torch.rand(2, 3, dtype=torch.float64)
    save_table(table, tmp_path)
    assert torch.equal(load_table(tmp_path), table)
