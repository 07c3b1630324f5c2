"""The experiment's prompts, one-word answers and annotators, small enough for exact expectations.

A prompt is an occasion and a group of guests: "lunch for the family". Its answer is one word, a dish. The group sets
how cyclic the preferences are (the knob), the occasion which dishes are good and common. One forward pass gives a
policy's distribution over answers, and every number has an exact counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.modes import eval_mode
from ...tabular.cycling import taste_game
from ..presets import OP
from ..workspace import read_json, write_json
from .presets import CandidatePreset

OCCASIONS = (
    *("lunch", "dinner", "supper", "brunch", "breakfast", "picnic", "banquet", "snack", "feast", "barbecue"),
    *("buffet", "tea", "elevenses", "party", "wedding", "birthday", "holiday", "meeting", "camp", "market"),
    *("harvest", "rehearsal", "premiere", "match", "regatta", "exam", "moving-day", "first-snow", "heatwave"),
    *("midnight", "farewell", "reunion"),
)
GUESTS = ("couple", "family", "neighbours", "friends", "team", "class", "choir", "council", "crowd")
DISHES = ("soup", "pasta", "curry", "salad", "pizza", "rice", "stew", "noodles", "pie", "tacos", "omelette")
QUALITY, QUALITY_NOISE, COMMON_NOISE = 0.75, 0.15, 0.2
PADDING, END, LINK, OTHER = "<pad>", "<end>", "for", "or"


@dataclass(frozen=True)
class World:
    """M prompts with A = k + 1 actions each: the k candidates, and any other answer, which loses to all of them.

    Args:
        prompts (list of str): M, grouped by knob.
        candidates (list of str): k answers.
        knobs (list of float): the settings.
        group (tensor (M,)): index of each prompt's setting.
        preference (tensor (M, A, A)): the annotators' P(a > b), float64.
        common (tensor (M, k)): frequency of each candidate among the answers that the reference is trained on.
    """

    prompts: list[str]
    candidates: list[str]
    knobs: list[float]
    group: torch.Tensor
    preference: torch.Tensor
    common: torch.Tensor

    def index(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and columns of prompts and answers in tables (M, A); the last column is for non-candidates.

        Args:
            prompts (sequence of str): N.
            answers (sequence of str): N.
        """
        places = {prompt: row for row, prompt in enumerate(self.prompts)}
        columns = {answer: column for column, answer in enumerate(self.candidates)}
        rows = [places[prompt] for prompt in prompts]
        chosen = [columns.get(answer.strip(), len(self.candidates)) for answer in answers]
        return _integers(rows), _integers(chosen)

    def of_group(self, knob: int) -> torch.Tensor:
        """Return the indices of one setting's prompts, (games,).

        Args:
            knob (int): index of the setting.
        """
        return (self.group == knob).nonzero().squeeze(1)


def make_world(preset: CandidatePreset) -> World:
    """Draw the games: a function of the preset alone.

    In every game the dishes are placed in a random order at even distances on the circle of angles. The most common
    dishes are the worst, so that the reference can be improved on; noise makes the games differ, so that no dish is
    good or common in all of them.

    Args:
        preset: knobs, games, candidates, strength, reference_spread and seed are read.
    """
    for name, words, needed in (("games", OCCASIONS, preset.games), ("candidates", DISHES, preset.candidates),
                                ("knobs", GUESTS, len(preset.knobs))):  # fmt: skip
        if needed > len(words):
            raise ValueError(f"{OP}: {name}: expected at most {len(words)}; got {needed}")
    generator = torch.Generator().manual_seed(preset.seed)
    shape = preset.games, preset.candidates

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def order() -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").argsort(-1)

    preference, common, prompts = [], [], []
    for guests, knob in zip(GUESTS, preset.knobs, strict=False):
        angle = order() * (2 * math.pi / preset.candidates)
        quality = -QUALITY * angle.cos() + QUALITY_NOISE * normal()
        preference.append(taste_game(quality, angle, knob, preset.strength))
        common.append((preset.reference_spread * angle.cos() + COMMON_NOISE * normal()).softmax(-1))
        prompts += [f"{occasion} {LINK} {guests}" for occasion in OCCASIONS[: preset.games]]
    group = torch.arange(len(preset.knobs), dtype=torch.int64, device="cpu").repeat_interleave(preset.games)
    games = _with_anything_else(torch.cat(preference))
    return World(prompts, list(DISHES[: preset.candidates]), list(preset.knobs), group, games, torch.cat(common))


def _with_anything_else(preference: torch.Tensor) -> torch.Tensor:
    """Append an action that loses to all others, (M, k, k) -> (M, k + 1, k + 1)."""
    whole = torch.nn.functional.pad(preference, (0, 1, 0, 1))
    whole[:, :-1, -1], whole[:, -1, -1] = 1.0, 0.5
    return whole


def word_tokenizer(world: World) -> Any:
    """Return a tokenizer whose tokens are the world's words.

    Args:
        world: its prompts and candidates.
    """
    import tokenizers
    import transformers

    words = {word: None for text in [*world.prompts, *world.candidates] for word in text.split()}
    vocabulary = {word: index for index, word in enumerate([PADDING, END, OTHER, *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=PADDING))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=plain, pad_token=PADDING, eos_token=END)


def candidate_log_probs(model: Any, tokenizer: Any, world: World) -> torch.Tensor:
    """Return a policy's log-probabilities of the candidates and of all other answers, (M, A) float64 on the CPU, exact.

    Args:
        model: a causal language model.
        tokenizer: of `word_tokenizer`.
        world: its prompts and candidates.
    """
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in world.prompts],
                       dtype=torch.int64, device=model.device)  # fmt: skip
    chosen = tokenizer.convert_tokens_to_ids(world.candidates)
    with torch.no_grad(), eval_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
    every = logits.double().cpu().log_softmax(-1)
    others = torch.ones(every.shape[-1], dtype=torch.bool, device="cpu")
    others[chosen] = False
    return torch.cat([every[:, chosen], every[:, others].logsumexp(-1, keepdim=True)], -1)


def save_world(world: World, path: Path) -> None:
    """Write the world as JSON.

    Args:
        world: the prompts, candidates and annotators.
        path: the file.
    """
    tables = {name: getattr(world, name).tolist() for name in ("group", "preference", "common")}
    write_json(path, {"prompts": world.prompts, "candidates": world.candidates, "knobs": world.knobs, **tables})


def load_world(path: Path) -> World:
    """Read a file of `save_world`; Python's decimal digits restore every float64 exactly.

    Args:
        path: the file.
    """
    facts = read_json(path)
    tables = {name: torch.tensor(facts[name], dtype=torch.float64, device="cpu") for name in ("preference", "common")}
    return World(facts["prompts"], facts["candidates"], facts["knobs"], _integers(facts["group"]), **tables)


def _integers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
