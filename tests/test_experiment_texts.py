"""The experiment's texts: docstrings of installed packages, the tokenizer, trigrams, and a user's pairs."""

from __future__ import annotations

import itertools
import json
import math

import pytest

pytest.importorskip("transformers", reason="the experiment needs transformers")
pytest.importorskip("accelerate", reason="the experiment needs accelerate")

from nlhf_kernels.core.loading import load_generation_tokenizer
from nlhf_kernels.core.terminal import SILENT
from nlhf_kernels.experiment.annotators import Trigrams
from nlhf_kernels.experiment.corpus import Material, load_corpus, make_corpus, train_tokenizer
from nlhf_kernels.experiment.docstrings import Collection, collect, cut, installed_folders, share, split_docstring
from nlhf_kernels.experiment.presets import PRESETS
from tests.support.experiment import fake_packages

FEW = Collection(count=60, test_fraction=0.3, text_characters=100)


def test_collected_pairs_are_distinct_and_split_by_module(tmp_path) -> None:
    train, test = collect(FEW, [fake_packages(tmp_path)])
    both = train + test
    assert len(both) == 60
    assert len({row.text for row in both}) == len({row.summary for row in both}) == 60
    assert not {row.module for row in train} & {row.module for row in test}, "a module is on one side only"
    assert all(len(row.text) <= 100 and row.summary.endswith(".") for row in both)
    assert all(share(f"test {row.module}") < 0.3 for row in test)


def test_collection_is_the_same_every_time_and_its_front_mixes_packages(tmp_path) -> None:
    fake_packages(tmp_path)
    first, second = collect(FEW, [tmp_path]), collect(FEW, [tmp_path])
    assert first == second
    assert {row.module.split(".")[0] for row in first[0] + first[1]} == {"package0", "package1", "package2"}


def test_duplicates_under_another_name_count_once(tmp_path) -> None:
    fake_packages(tmp_path / "one")
    fake_packages(tmp_path / "two" / "vendored")
    with pytest.raises(ValueError, match=r"expected 161 .*; got 160 from 40 modules"):
        collect(Collection(161, 0.3, 100), [tmp_path / "one", tmp_path / "two"])
    train, test = collect(Collection(160, 0.3, 100), [tmp_path / "one", tmp_path / "two"])
    assert len(train) + len(test) == 160


def test_one_docstring_to_test_on_is_too_few(tmp_path) -> None:
    """A single test docstring is refused by the collection, before the tournament."""
    packages = fake_packages(tmp_path, modules=80, functions=1)
    train, test = collect(FEW, [packages])
    shares = sorted(share(f"test {item.module}") for item in train + test)
    one = Collection(FEW.count, shares[0] + 1e-9, FEW.text_characters)
    with pytest.raises(ValueError, match=r"2 of them to test on; got .* \(1 to test on\): install .* scikit-learn"):
        collect(one, [packages])


def test_too_few_docstrings_say_what_to_install(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected 60 .* got 0 from 0 modules .*pip install transformers.*--data"):
        collect(FEW, [tmp_path])


def test_sources_that_do_not_parse_are_passed_over(tmp_path) -> None:
    fake_packages(tmp_path)
    (tmp_path / "broken.py").write_text('def (:\n    """Say nothing at all.\n\n    Because."""')
    (tmp_path / "nulls.py").write_bytes(b'"""\x00"""')
    (tmp_path / "latin.py").write_bytes('"""Größe aller Dinge.\n\n    Text."""'.encode("latin-1"))
    train, test = collect(FEW, [tmp_path])
    assert len(train) + len(test) == 60


def test_the_standard_library_is_found() -> None:
    train, test = collect(Collection(count=300, test_fraction=0.3), installed_folders()[:1])
    assert len(train) + len(test) == 300
    assert all("site-packages" not in row.module for row in train + test), "what is installed is not part of it"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of all.\n\n" + "Adds one number to another until no number is left to be added.", True),
        ("Return the sum of all.\n" + "Adds one number to another until no number is left to be added.", False),
        ("Return.\n\n" + "Adds one number to another until no number is left to be added.", False),
        ("Return the sum of all.\n\nShort body.", False),
        ("Arguments are as follows:\n\n" + "Adds one number to another until no number is left to be added.", False),
        ("Return the sum of all.\n\n>>> add(1, 2) is three and this line is no prose at all, so it is out", False),
    ],
)
def test_only_first_lines_of_a_worthy_body_are_summaries(docstring, expected) -> None:
    assert (split_docstring(docstring, Collection(2)) is not None) is expected


def test_texts_end_between_words() -> None:
    assert cut("one two three", 9) == "one two"
    assert cut("one two three", 13) == "one two three"
    assert cut("onetwothree", 5) == "onetw"


def test_trigrams_are_a_distribution_that_knows_its_texts() -> None:
    model = Trigrams(["return the name .", "return the size .", "remove the name ."])
    words = {gram[0] for gram in model.counts[0]}
    for history in itertools.product(["<s>", "the", "unheard"], ["return", "the", "unheard"]):
        known = sum(model._probability([*history, word]) for word in words)
        unknown = model._probability([*history, "zebra"])
        assert known + unknown == pytest.approx(1.0), history
    assert model.mean_log_probability("return the name.") > model.mean_log_probability("name the return.")
    assert math.isfinite(model.mean_log_probability("zebra crossing"))
    with pytest.raises(ValueError, match=r"ngrams: texts: expected at least one"):
        Trigrams([])


def test_tokenizer_is_lossless_and_has_its_marks(tmp_path) -> None:
    tokenizer = train_tokenizer(["Return the name of the thing."] * 5, 300)
    text = " Return übrigens the 名前\n of <it>."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path)
    again = load_generation_tokenizer("test", str(tmp_path))
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    with pytest.raises(ValueError, match=r"vocabulary: size: expected an integer in \[258"):
        train_tokenizer(["x"], 100)


def test_users_pairs_become_a_corpus(tmp_path) -> None:
    rows = [{"prompt": f"question {i % 9}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(18)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = tmp_path / "corpus"
    work.mkdir()
    make_corpus(work, PRESETS["tiny"], Material(data=str(path)), SILENT)
    corpus = load_corpus(work)
    assert not corpus.annotated and corpus.pairs is not None and corpus.test_pairs is not None
    assert len(corpus.pairs) + len(corpus.test_pairs) == 18
    assert not {pair.prompt for pair in corpus.pairs} & {row.prompt for row in corpus.test}
    assert len({row.prompt for row in corpus.test}) == len(corpus.test), "every test prompt once"
    assert all(row.answer.startswith(" yes") for row in corpus.train)


def test_bad_sources_are_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"--split: expected with --data; got 'train' alone"):
        Material(split="train")
    with pytest.raises(ValueError, match=r"nothing.jsonl: there is no such file"):
        make_corpus(tmp_path, PRESETS["tiny"], Material(data=str(tmp_path / "nothing.jsonl")), SILENT)
