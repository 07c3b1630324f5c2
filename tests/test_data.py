"""Data: rows from every source give the same texts, and errors name the row and its source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlhf_kernels.data import (
    Comparison,
    Pair,
    encode_prompts,
    load_comparisons,
    load_pairs,
    load_prompts,
    prompt_batch,
    read_rows,
    split_by_prompt,
)
from tests.support.tiny_models import tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": "What?", "chosen": 'That, "so"', "rejected": ""},
    {"prompt": "Two\nlines", "chosen": "é\u2028x", "rejected": "NA"},
]
PAIRS = [Pair(**row) for row in ROWS]


def write(path, rows) -> str:
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    elif path.suffix == ".json":
        text = json.dumps(rows)
    else:
        quoted = [[json.dumps(cell, ensure_ascii=False).replace('\\"', '""') for cell in row.values()] for row in rows]
        text = (
            "\ufeff" + ",".join(rows[0]) + "\n" + "".join(",".join(row) + "\n" for row in quoted).replace("\\n", "\n")
        )
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_files_and_memory_hold_the_same(suffix, tmp_path) -> None:
    path = write(tmp_path / f"pairs{suffix}", ROWS)
    assert load_pairs(path) == load_pairs(tmp_path / f"pairs{suffix}") == load_pairs(ROWS) == PAIRS
    assert load_prompts(path) == ["What?", "Two\nlines"]
    assert load_comparisons([{"prompt": "a", "first": "b", "second": "c"}]) == [Comparison("a", "b", "c")]


def test_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    assert load_pairs(rows) == PAIRS
    rows.to_parquet(str(tmp_path / "pairs.parquet"))
    assert load_pairs(tmp_path / "pairs.parquet") == PAIRS
    both = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    with pytest.raises(TypeError, match="expected rows; got a mapping of train, test"):
        load_pairs(both)
    both.save_to_disk(str(tmp_path / "folder"))
    assert load_pairs(str(tmp_path / "folder")) == PAIRS
    assert load_pairs(str(tmp_path / "folder"), split="test") == PAIRS[1:]
    with pytest.raises(ValueError, match="split: expected one of train, test of .*; got 'dev'"):
        load_pairs(str(tmp_path / "folder"), split="dev")
    talk = datasets.Dataset.from_list(CONVERSATION)
    assert load_pairs(talk, tiny_tokenizer(chat=True)) == load_pairs(CONVERSATION, tiny_tokenizer(chat=True))


def test_without_datasets_it_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'someone/pairs: this needs datasets: pip install "nlhf-kernels\[train\]"'):
        load_pairs("someone/pairs")


WRONG_ROWS = {
    r"row 1: expected columns prompt, chosen, rejected; rejected is not among \['prompt', 'chosen', 'other'\]": {
        "prompt": "a", "chosen": "b", "other": "c"
    },
    r"row 1: prompt: expected some text; got ' \\n'": {"prompt": " \n", "chosen": "b", "rejected": "c"},
    "row 1: chosen: expected a string or a list of messages; got int": {"prompt": "a", "chosen": 1, "rejected": "c"},
    "row 1: rejected: expected a string or a list of messages; got nothing \\(null\\)": {
        "prompt": "a", "chosen": "b", "rejected": None
    },
    "row 1: prompt: expected at least one message; got none": {"prompt": [], "chosen": "b", "rejected": "c"},
    "row 1: chosen: expected messages of the form .*got {'role': 'user'}": {
        "prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"
    },
    "row 1: expected all of prompt, chosen, rejected as strings, or all as lists": {
        "prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"
    },
    "row 1: prompt: expected some text": {
        name: [{"role": name, "content": ""}] for name in ("prompt", "chosen", "rejected")
    },
    "row 1: expected a tokenizer with a chat template": {
        name: [{"role": name, "content": "x"}] for name in ("prompt", "chosen", "rejected")
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_ROWS)
def test_wrong_rows_are_named(message) -> None:
    with pytest.raises((ValueError, TypeError), match=f"data: {message}"):
        load_pairs([ROWS[0], WRONG_ROWS[message]])


WRONG_FILES = {
    "a.jsonl": ('{"prompt": "x"}\n\n{"prompt": \n', "a.jsonl, line 3: expected JSON; got '{\"prompt\":'"),
    "b.jsonl": ('{"prompt": "x"}\n\n{"prompt": ""}\n', "b.jsonl, line 3: prompt: expected some text"),
    "c.jsonl": ('["x"]\n', "c.jsonl, line 1: expected a dict of columns; got list"),
    "n.jsonl": ('{"prompt": "x", "prompt": "y"}\n', "n.jsonl, line 1: expected JSON; got .* is there twice"),
    "o.json": ('[{"prompt": "x", "a": {"b": 1, "b": 2}}]', "o.json: expected JSON: the key 'b' is there twice"),
    "p.jsonl": ("[" * 100_000, "p.jsonl, line 1: expected JSON; got .*: nested too deeply"),
    "q.jsonl": ('{"prompt": null}\n', "q.jsonl, line 1: prompt: expected a string or a list of messages; got nothing"),
    "r.jsonl": ("\ufeffnonsense\n", "r.jsonl, line 1: expected JSON; got 'nonsense'"),
    "d.json": ("{}", "d.json: expected a list of rows; got dict"),
    "e.json": ("[", "e.json: expected JSON"),
    "f.csv": ("prompt,other\na,b\n\na,b,c\n", "f.csv, line 4: expected 2 cells, as the first line has; got 3"),
    "g.csv": ("prompt,other\na\n", "g.csv, line 2: expected 2 cells, as the first line has; got 1"),
    "h.csv": ('prompt\n"a"b\n', "h.csv, line 2: "),
    "m.csv": ("prompt,prompt\na,b\n", "m.csv, line 1: expected columns of different names; got prompt, prompt"),
    "i.csv": ("", "i.csv: expected at least one row; got none"),
    "j.jsonl": (b"\xff\xfe", "j.jsonl: expected a text file in UTF-8"),
    "k.txt": ("a", "k.txt: expected a file that ends in .jsonl, .json, .csv or .parquet"),
    "l.jsonl": (None, "l.jsonl: there is no such file"),
    "no/where": (None, "there is no such folder: "),
}


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_named(name, kind, tmp_path) -> None:
    content, message = WRONG_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, TypeError)) as error:
        load_prompts(kind(tmp_path / name))
    for part in message.split(".*"):
        assert part in str(error.value)


def test_a_split_where_there_are_no_parts_is_refused(tmp_path) -> None:
    for source in (ROWS, write(tmp_path / "pairs.jsonl", ROWS)):
        with pytest.raises(ValueError, match="split: expected none"):
            load_pairs(source, split="test")
    with pytest.raises(TypeError, match="expected a path, a data set or dicts; got int"):
        read_rows(3)  # type: ignore[arg-type]


CONVERSATION = [
    {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "That"}],
        "rejected": [{"role": "assistant", "content": "This"}],
    }
]


def test_conversations_are_rendered_by_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '@' + m.role + ':' + m.content + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}@assistant:{% endif %}"
    )
    assert load_pairs(CONVERSATION, tokenizer) == [Pair("@user:What?;@assistant:", "That;", "This;")]
    assert load_prompts(CONVERSATION, tokenizer) == ["@user:What?;@assistant:"]
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="row 0: expected a chat template that begins a conversation as it begins"):
        load_pairs(CONVERSATION, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no assistants here') }}"
    with pytest.raises(ValueError, match="row 0: the chat template refuses the messages: no assistants here"):
        load_pairs(CONVERSATION, tokenizer)


def test_the_mark_that_ends_a_turn_is_no_part_of_the_response() -> None:
    """Responses exclude the end-of-turn mark, as in rollouts. Pairs without a prompt are split at the common prefix."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content + '<eos>\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    expected = [Pair("uWhat?<eos>\na", "That", "This")]
    assert load_pairs(CONVERSATION, tokenizer) == expected
    (row,) = CONVERSATION
    whole = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    assert load_pairs([whole], tokenizer) == expected
    answers = [{"role": "assistant", "content": text} for text in ("", "x \n")]
    spoken = load_pairs([row | {"chosen": answers[:1], "rejected": answers[1:]}], tokenizer)
    assert spoken == [Pair("uWhat?<eos>\na", "", "x \n")]
    assert load_pairs([row | whole], tokenizer) == expected
    with pytest.raises(ValueError, match="row 0: expected both responses to begin with the prompt's messages, or none"):
        load_pairs([row | {"chosen": whole["chosen"]}], tokenizer)
    for same in (whole["chosen"], row["rejected"], row["prompt"]):
        with pytest.raises(ValueError, match="row 0: expected a prompt, or conversations that begin alike"):
            load_pairs([whole | {"rejected": same}], tokenizer)


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content + '<eos>' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    return tokenizer


def said(*texts: str) -> list[dict[str, str]]:
    """Return a conversation of alternating turns, starting with the user."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be."}
#: name -> a row of a conversation that is asked "Why?" and answered "So." or "No."
LAYOUTS = {
    "ultrafeedback": {
        "prompt": "Why?", "prompt_id": "7f", "chosen": said("Why?", "So."), "rejected": said("Why?", "No."),
        "messages": said("Why?", "So."), "score_chosen": 8.5, "score_rejected": 4.0,
    },
    "implicit prompt": {"chosen": said("Why?", "So."), "rejected": said("Why?", "No.")},
    "messages": {"prompt": said("Why?"), "chosen": said("Why?", "So.")[1:], "rejected": said("Why?", "No.")[1:]},
    "messages that repeat": {
        "prompt": said("Why?"), "chosen": said("Why?", "So."), "rejected": said("Why?", "No."),
    },
    "string and answers": {"prompt": "Why?", "chosen": said("", "So.")[1:], "rejected": said("", "No.")[1:]},
    "null": {"prompt": None, "chosen": said("Why?", "So."), "rejected": said("Why?", "No.")},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_conversations(layout, tmp_path) -> None:
    """With a chat template, every layout of a file gives preference model and policy the same prompts."""
    path, tokenizer = write(tmp_path / "rows.jsonl", [LAYOUTS[layout]]), chat_tokenizer()
    assert load_pairs(path, tokenizer) == [Pair("uWhy?<eos>a", "So.", "No.")]
    assert load_prompts(path, tokenizer) == ["uWhy?<eos>a"]
    names = {"prompt": "prompt", "chosen": "first", "rejected": "second"}
    renamed = {names[name]: value for name, value in LAYOUTS[layout].items() if name in names}
    assert load_comparisons([renamed], tokenizer) == [Comparison("uWhy?<eos>a", "So.", "No.")]
    assert load_prompts([renamed], tokenizer) == ["uWhy?<eos>a"]
    with pytest.raises(ValueError, match="line 1: expected a tokenizer with a chat template"):
        load_prompts(path, tiny_tokenizer())


def test_string_prompts_of_longer_conversations() -> None:
    tokenizer = chat_tokenizer()
    row = {"prompt": "Why?", "chosen": [SYSTEM, *said("Why?", "So.", "Oh?", "Yes.")]}
    row["rejected"] = [*row["chosen"][:-1], {"role": "assistant", "content": "No."}]
    expected = Pair("sBe.<eos>uWhy?<eos>a", "So.<eos>uOh?<eos>aYes.", "So.<eos>uOh?<eos>aNo.")
    assert load_pairs([row], tokenizer) == [expected]
    assert load_prompts([row], tokenizer) == [expected.prompt]
    assert load_pairs([row | {"rejected": row["chosen"]}], tokenizer)[0].rejected == expected.chosen
    later = load_pairs([row | {"prompt": " Oh?\n"}], tokenizer)[0]
    assert later == Pair("sBe.<eos>uWhy?<eos>aSo.<eos>uOh?<eos>a", "Yes.", "No.")
    spoken = {"prompt": "Why?", "messages": said("Why?", "So.")}
    assert load_prompts([spoken], tokenizer) == ["uWhy?<eos>a"]
    assert load_prompts([spoken | {"prompt": "another"}], tokenizer) == ["another"]
    for changes, message in (
        ({"prompt": "What?"}, "row 0: chosen: expected a user's message that is the prompt, 'What\\?'; got"),
        ({"rejected": said("Why?", "No.")}, "row 0: expected the same messages up to the prompt in chosen and"),
        ({"rejected": row["chosen"][:2]}, "row 0: rejected: expected at least one message; got none"),
        ({"rejected": "No."}, "row 0: expected all of prompt, chosen, rejected as strings, or all as lists"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            load_pairs([row | changes], tokenizer)


def test_split_keeps_prompts_together_whatever_the_order() -> None:
    pairs = [Pair(f"prompt {index % 50}", str(index), "") for index in range(200)]
    train, test = split_by_prompt(pairs, 0.2, seed=3)
    assert len(test) == 40 and sorted(train + test) == sorted(pairs)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    again = split_by_prompt(pairs[::-1], 0.2, seed=3)
    assert (again[0][::-1], again[1][::-1]) == (train, test)
    assert split_by_prompt(pairs, 0.2, seed=4)[1] != test
    prompts = [pair.prompt for pair in pairs]
    assert split_by_prompt(prompts, 0.2, seed=3)[1] == [pair.prompt for pair in test]
    assert len(split_by_prompt(prompts[:4], 0.01)[1]) == 1, "a test set is never empty"


def test_split_refuses_what_leaves_a_side_empty() -> None:
    for rows, fraction in ((["a", "a"], 0.5), (["a", "b"], 0.9), (["a", "b"], 1.0)):
        with pytest.raises(ValueError, match="expected prompts for both sides; got"):
            split_by_prompt(rows, fraction)
    with pytest.raises(ValueError, match="fraction: expected a finite number"):
        split_by_prompt(["a", "b"], 0.0)


def with_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def test_prompts_are_cut_from_the_left_and_keep_their_first_mark() -> None:
    plain, bos_tokenizer = tiny_tokenizer(), with_bos()
    ids = plain("hello")["input_ids"]
    assert encode_prompts(plain, ["hello", "a"], max_length=3) == [ids[-3:], plain("a")["input_ids"]]
    assert encode_prompts(bos_tokenizer, ["hello"]) == [[1, *ids]] == encode_prompts(bos_tokenizer, ["<bos>hello"])
    assert encode_prompts(bos_tokenizer, ["hello"], max_length=3) == [[1, *ids[-2:]]]
    assert encode_prompts(bos_tokenizer, ["hello"], max_length=6) == [[1, *ids]]
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at least one token"):
        encode_prompts(plain, ["a", ""])
    with pytest.raises(ValueError, match="max_length: expected an integer in"):
        encode_prompts(plain, ["a"], max_length=1)


def test_prompt_batches_are_padded_on_the_left_and_generate() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    batch = prompt_batch(tokenizer, ["hello", "a"])
    assert batch["attention_mask"].tolist() == [[1] * 5, [0] * 4 + [1]]
    assert batch["input_ids"][1].tolist() == [0, 0, 0, 0, *tokenizer("a")["input_ids"]]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(**prompt_batch(tokenizer, ["a"]), **options)[0, 1:]
    together = model.generate(**batch, **options)[1, 5:]
    assert torch.equal(alone, together)
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        prompt_batch(tokenizer, [])


def test_importing_the_folders_imports_no_transformers() -> None:
    code = (
        "import sys, nlhf_kernels.data, nlhf_kernels.preference\n"
        "assert not {'transformers', 'datasets', 'rich'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
