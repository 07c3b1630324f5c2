"""The texts of the experiment: prompts with a target answer, from docstrings or from a user's preference pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.checks import check_integer
from ..core.loading import load_generation_tokenizer, load_tokenizer
from ..core.terminal import Reporter
from ..data import Pair, load_pairs, split_by_prompt
from .docstrings import Collection, collect
from .presets import Preset
from .workspace import read_rows, write_rows

PAD, END = "<pad>", "<end>"
_BYTES = 256
PROMPT = "{text}\nIn one line:"


class Example(NamedTuple):
    prompt: str
    answer: str  # the true first line, or a pair's chosen response


@dataclass(frozen=True)
class Material:
    """Sources of the texts and the model.

    Args:
        data (str or None): preference pairs: a file, a folder or a hub name; None: docstrings.
        split (str or None): of a hub data set.
        model (str or None): a causal language model, a folder or a hub name; None: a small one with random weights.
    """

    data: str | None = None
    split: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.split is not None and self.data is None:
            raise ValueError(f"experiment: --split: expected with --data; got {self.split!r} alone")


@dataclass(frozen=True)
class Corpus:
    """Examples to train and test on, the user's pairs where there are some, and the tokenizer."""

    train: list[Example]
    test: list[Example]
    pairs: list[Pair] | None  # the user's, of the training prompts; None: the annotators compare sampled answers
    test_pairs: list[Pair] | None
    tokenizer: Any

    @property
    def annotated(self) -> bool:
        """Whether there are annotators."""
        return self.pairs is None


def make_corpus(work: Path, preset: Preset, material: Material, reporter: Reporter, folders: Any = None) -> None:
    """Collect the texts, split them, train a tokenizer where no model brings one; write them into `work`."""
    tokenizer = None if material.model is None else load_generation_tokenizer("experiment: --model", material.model)
    if material.data is None:
        train, test = _docstrings(preset, reporter, folders)
    else:
        pairs, test_pairs = _pairs(preset, material, tokenizer)
        train, test = ([Example(pair.prompt, pair.chosen) for pair in rows] for rows in (pairs, test_pairs))
        write_rows(work / "pairs-train.jsonl", [pair._asdict() for pair in pairs])
        write_rows(work / "pairs-test.jsonl", [pair._asdict() for pair in test_pairs])
    test = _distinct(test)  # intervals are over prompts
    if len(test) < 2:  # raised here, before hours of training
        raise ValueError(
            "experiment: --data: expected 2 different prompts to test on, as intervals are over prompts; got "
            f"{len(test)} beside {len(_distinct(train))} to train on (more pairs, or a larger share of them: --set "
            "test_fraction=0.5)"
        )
    if tokenizer is None:
        tokenizer = train_tokenizer([text for row in train for text in row], preset.vocabulary)
    write_rows(work / "train.jsonl", [row._asdict() for row in train])
    write_rows(work / "test.jsonl", [row._asdict() for row in test])
    tokenizer.save_pretrained(work / "tokenizer")


def load_corpus(folder: Path) -> Corpus:
    """Read what `make_corpus` wrote."""
    rows = {name: [Example(**row) for row in read_rows(folder / f"{name}.jsonl")] for name in ("train", "test")}
    pairs: list[list[Pair] | None] = [
        [Pair(**row) for row in read_rows(path)] if path.is_file() else None
        for path in (folder / "pairs-train.jsonl", folder / "pairs-test.jsonl")
    ]
    tokenizer = load_tokenizer("experiment: corpus", folder / "tokenizer")
    return Corpus(rows["train"], rows["test"], pairs[0], pairs[1], tokenizer)


def _docstrings(preset: Preset, reporter: Reporter, folders: Any) -> tuple[list[Example], list[Example]]:
    settings = Collection(preset.examples, preset.test_fraction, preset.text_characters, preset.summary_characters)
    with reporter.bar("reading docstrings", preset.examples) as advance:
        train, test = collect(settings, folders, advance)
    examples = [[Example(PROMPT.format(text=row.text), f" {row.summary}") for row in rows] for rows in (train, test)]
    return examples[0], examples[1]


def _pairs(preset: Preset, material: Material, tokenizer: Any) -> tuple[list[Pair], list[Pair]]:
    assert material.data is not None
    try:
        pairs = load_pairs(material.data, tokenizer, split=material.split)
    except (TypeError, ValueError) as error:
        raise ValueError(f"experiment: --data: {str(error).removeprefix('data: ')}") from error
    shuffled = sorted(pairs, key=lambda pair: hashlib.sha256(pair.prompt.encode()).digest())  # data may be sorted
    return split_by_prompt(shuffled[: preset.examples], preset.test_fraction, preset.seed)


def _distinct(rows: list[Example]) -> list[Example]:
    """Return the first example of each prompt."""
    return list({row.prompt: row for row in reversed(rows)}.values())[::-1]


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Train a byte-level BPE tokenizer, a `PreTrainedTokenizerFast` with a padding and an end token.

    Args:
        texts (iterable of texts): what it is trained on.
        size (int): number of tokens, at most.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_integer("vocabulary", "size", size, _BYTES + 2, 10**6)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    wrapper: Any = transformers.PreTrainedTokenizerFast
    return wrapper(tokenizer_object=bpe, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False)
