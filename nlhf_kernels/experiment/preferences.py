"""Preference pairs, and the two models learned from them: the pairwise preference model and the reward model.

Both start from the supervised policy and see the same pairs, in the same order, for the same number of steps.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data import Pair
from ..evaluation import Sampling, count_cycles, preference_table, sample_answers
from ..preference import (
    PreferenceTraining,
    save_preference_model,
    train_preference_model,
)
from ..preference.models import KINDS
from .annotators import Annotators, Trigrams, common_scales
from .corpus import Corpus, Example
from .presets import Preset
from .supervised import Setting
from .workspace import read_json, read_rows, write_json, write_rows

PAIRWISE_TEMPLATE = "{prompt}{first}\nOr:{second}\nBetter:"
REWARD_TEMPLATE = "{prompt}{response}\nThis good:"
RESPONSES = 4  # to a prompt
PAIRINGS = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))


def make_preferences(work: Path, setting: Setting) -> None:
    """Sample pairs of answers of the supervised policy and the annotators' votes on them; a user's pairs are copied."""
    corpus, preset, reporter = setting.corpus, setting.preset, setting.reporter
    if corpus.pairs is not None and corpus.test_pairs is not None:
        write_rows(work / "train.jsonl", [pair._asdict() for pair in corpus.pairs])
        write_rows(work / "test.jsonl", [pair._asdict() for pair in corpus.test_pairs])
        return
    model = setting.fresh_policy()
    responses, counts = {}, {"train": preset.pairs, "test": max(2, preset.pairs // 8)}
    for name, rows in (("train", corpus.train), ("test", corpus.test)):
        prompts = [row.prompt for row in rows][: -(-counts[name] // (RESPONSES // 2))]
        with reporter.bar(f"answers to compare, {name}", len(prompts)) as advance:
            sampling = _sampling(preset, RESPONSES, preset.seed + (name == "test"))
            answers = sample_answers(model, None, corpus.tokenizer, prompts, sampling, advance)
        responses[name] = prompts, answers.texts
    prompts, texts = responses["train"]
    unscaled = make_annotators(corpus, (1.0, 1.0, 1.0))
    scores = unscaled.scores([p for p in prompts for _ in range(RESPONSES)], [text for row in texts for text in row])
    scales = common_scales(scores.view(len(prompts), RESPONSES, -1), preset.vote_scale)
    annotators, facts = make_annotators(corpus, scales), {}
    for seed, (name, (prompts, texts)) in enumerate(responses.items()):
        pairs, agreement = _compare(annotators, prompts, texts, counts[name], preset.seed + seed)
        write_rows(work / f"{name}.jsonl", [pair._asdict() for pair in pairs])
        facts[name] = {"pairs": len(pairs), "ceiling": agreement}
    write_json(work / "annotators.json", {"scales": scales, **facts})


def _compare(
    annotators: Annotators, prompts: list[str], texts: list[list[str]], count: int, seed: int
) -> tuple[list[Pair], float]:
    """Return up to `count` pairs of different answers with their votes, and the likelier vote's mean probability."""
    rows = [
        (prompt, row[i], row[j])
        for i, j in PAIRINGS
        for prompt, row in zip(prompts, texts, strict=True)
        if row[i] != row[j]
    ][:count]
    columns = [list(column) for column in zip(*rows, strict=True)]
    votes = annotators.sample_votes(columns[0], columns[1], columns[2], seed).tolist()
    probabilities = annotators(columns[0], columns[1], columns[2])
    pairs = [Pair(p, a, b) if vote else Pair(p, b, a) for (p, a, b), vote in zip(rows, votes, strict=True)]
    return pairs, float(torch.maximum(probabilities, 1 - probabilities).mean())


def make_annotators(corpus: Corpus, scales: Any) -> Annotators:
    examples: list[Example] = [*corpus.train, *corpus.test]
    return Annotators(
        {row.prompt: row.answer for row in examples}, Trigrams(row.answer for row in corpus.train), scales
    )


def load_annotators(corpus: Corpus, folder: Path) -> Annotators | None:
    if not corpus.annotated:
        return None
    return make_annotators(corpus, read_json(folder / "annotators.json")["scales"])


def make_comparison_model(work: Path, kind: str, pairs: Path, setting: Setting) -> None:
    """Train a model of a kind of `preference.KINDS`; save it with its measures on held-out pairs."""
    template = PAIRWISE_TEMPLATE if kind == "pairwise" else REWARD_TEMPLATE
    preset, reporter = setting.preset, setting.reporter
    base = setting.fresh_policy()
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(preset.positions, positions or preset.positions)
    model = KINDS[kind](base, setting.corpus.tokenizer, template=template, max_length=max_length, overlong="truncate")
    settings = PreferenceTraining(
        steps=preset.preference_steps,
        batch_size=preset.preference_batch,
        learning_rate=preset.preference_learning_rate,
        seed=preset.seed,
        bfloat16=preset.bfloat16,
    )
    rows = {name: [Pair(**row) for row in read_rows(pairs / f"{name}.jsonl")] for name in ("train", "test")}
    training = train_preference_model(
        model.to(setting.device), rows["train"], settings, held_out=rows["test"], progress=reporter.shown
    )
    evaluation = training.evaluation
    assert evaluation is not None
    reporter.say(f"  accuracy {evaluation.accuracy:.3f}, log-loss {evaluation.log_loss:.3f} on held-out pairs")
    save_preference_model(model, work / "model")
    write_json(
        work / "measures.json", {"losses": [round(loss, 4) for loss in training.losses], "test": asdict(evaluation)}
    )


def count_all_cycles(work: Path, judges: dict[str, Any], setting: Setting) -> None:
    """Count the cycles of each judge among answers of the supervised policy to the tournament's prompts."""
    corpus, preset, reporter = setting.corpus, setting.preset, setting.reporter
    prompts = [row.prompt for row in corpus.test[: preset.test_prompts]]
    with reporter.bar("answers among which cycles are counted", len(prompts)) as advance:
        sampling = _sampling(preset, preset.cycle_responses, preset.seed + 2)
        answers = sample_answers(setting.fresh_policy(), None, corpus.tokenizer, prompts, sampling, advance)
    facts = {}
    for name, judge in judges.items():
        cycles = count_cycles(preference_table(judge, prompts, answers.texts), answers.texts)
        facts[name] = {**asdict(cycles), "share": cycles.share, "responses": preset.cycle_responses}
        reporter.say(f"  {name}: {cycles.cyclic} of {cycles.triples} triples are cycles ({cycles.share:.1%})")
    write_json(work / "cycles.json", facts)


def _sampling(preset: Preset, samples: int, seed: int) -> Sampling:
    return Sampling(preset.answer_tokens, preset.prompt_tokens, samples, seed=seed, batch=preset.batch)
