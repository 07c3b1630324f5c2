"""`nlhf-kernels sample`: text from saved models, and one-line errors for bad input."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest
import torch

from nlhf_kernels.cli import sample
from nlhf_kernels.cli.main import main
from nlhf_kernels.core.terminal import new_console
from nlhf_kernels.integrations import generate_mixture
from tests.support.tiny_models import VOCABULARY, one_thread, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two models of one vocabulary, and folders that are invalid in various ways."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str, *parts) -> None:
        for part in parts:
            part.save_pretrained(root / name)

    save("policy", tiny_model("gpt2", seed=1), tiny_tokenizer(chat=True))
    save("reference", tiny_model("llama", seed=2, hidden=48), tiny_tokenizer())
    save("weights_only", tiny_model("llama", seed=2, hidden=48))
    wider = tiny_model("gpt2", seed=3)
    wider.resize_token_embeddings(VOCABULARY + 7)
    save("padded_head", wider, tiny_tokenizer())
    save("wider_weights_only", wider)
    save("other_tokenizer", tiny_model("gpt2", seed=4), tiny_tokenizer(first="!"))
    longer = tiny_tokenizer()
    longer.add_tokens(["<new>"])
    save("longer_tokenizer", tiny_model("gpt2", seed=4), longer)
    broken = tiny_model("gpt2", seed=5)
    torch.nn.init.constant_(broken.transformer.ln_f.weight, torch.nan)
    save("broken", broken, tiny_tokenizer())
    torch.save(tiny_model().state_dict(), root / "pickle.bin")
    save("pickled", tiny_tokenizer(), tiny_model().config)
    (root / "pickle.bin").rename(root / "pickled" / "pytorch_model.bin")
    (root / "empty").mkdir()
    return {path.name: str(path) for path in root.iterdir()}


def run(capsys, *options: str) -> tuple[int, str, str]:
    code = main(["sample", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def documents(capsys, folders, *options: str) -> dict:
    code, out, _ = run(capsys, "--policy", folders["policy"], "--device", "cpu", "--json", *options)
    assert code == 0
    return json.loads(out)


def mixed(folders, *options: str) -> list[str]:
    return ["--reference", folders["reference"], "--beta", "0.3", "--max-new-tokens", "6", *options]


def test_json_holds_every_token_and_its_logprobs(folders, capsys) -> None:
    options = mixed(folders, "--prompt", "hello", "--prompt", "a", "--num-samples", "2", "--seed", "5")
    document = documents(capsys, folders, *options)
    assert [(entry["prompt"], entry["index"]) for entry in document["samples"]] == [
        ("hello", 0), ("hello", 1), ("a", 0), ("a", 1)
    ]  # fmt: skip
    assert document["beta"] == 0.3 and document["seed"] == 5
    tokenizer = tiny_tokenizer()
    result = generate_mixture(
        tiny_model("gpt2", seed=1), tiny_model("llama", seed=2, hidden=48),
        torch.tensor(tokenizer("hello")["input_ids"])[None], beta=0.3, max_new_tokens=6, seed=5, num_return_sequences=2,
    )  # fmt: skip
    for row, entry in enumerate(document["samples"][:2]):
        count = int(result.mask[row].sum())
        assert [token["id"] for token in entry["tokens"]] == result.tokens[row, :count].tolist()
        for name in ("policy", "reference", "mixture"):
            got = torch.tensor([token[name] for token in entry["tokens"]])
            torch.testing.assert_close(got, getattr(result, f"{name}_logprobs")[row, :count], rtol=0, atol=1e-4)
        assert entry["text"] == tokenizer.decode(result.tokens[row, :count], skip_special_tokens=True)


def test_batch_size_and_seed(folders, capsys) -> None:
    options = mixed(folders, "--prompt", "hello", "--prompt", "a", "--num-samples", "2")
    first = documents(capsys, folders, *options)["samples"]
    again = documents(capsys, folders, *options, "--batch-size", "1")["samples"]
    assert [entry["text"] for entry in first] == [entry["text"] for entry in again]
    other = documents(capsys, folders, *options, "--seed", "1")["samples"]
    assert [entry["text"] for entry in first] != [entry["text"] for entry in other]


def test_tables(folders, capsys) -> None:
    prompts = ["--prompt", "hello", "--num-samples", "2"]
    code, out, err = run(capsys, "--policy", folders["policy"], "--device", "cpu", *mixed(folders, *prompts))
    assert code == 0 and "Traceback" not in err
    for word in ("hello", "sample 2 of 2", "policy - reference", "mixture"):
        assert word in out


def test_policy_alone(folders, capsys) -> None:
    options = ["--policy", folders["policy"], "--prompt", "hi", "--max-new-tokens", "3", "--temperature", "0"]
    code, out, _ = run(capsys, *options)
    assert code == 0 and "reference" not in out
    entry = documents(capsys, folders, *options[2:])["samples"][0]
    assert all(token["reference"] is None and token["mixture"] == 0 for token in entry["tokens"])
    ids = torch.tensor(tiny_tokenizer()("hi")["input_ids"])[None]
    expected = tiny_model("gpt2", seed=1).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 2:]
    assert [token["id"] for token in entry["tokens"]] == expected.tolist()


def test_prompts_file_and_chat(folders, capsys, tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\ntwo\u2028lines\n".encode())
    document = documents(capsys, folders, *mixed(folders, "--prompts-file", str(path)))
    assert [entry["prompt"] for entry in document["samples"]] == ["one", "two\u2028lines"]
    chat = documents(capsys, folders, *mixed(folders, "--prompt", "one", "--chat"))
    assert chat["samples"][0]["prompt"] == "one"
    assert chat["samples"][0]["tokens"] != document["samples"][0]["tokens"]


def test_prompts_are_looked_at_before_models_are_loaded(folders, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sample, "load_model", None)
    (tmp_path / "lines.txt").write_text("\n \n")
    for words in (
        [],
        ["--prompt", ""],
        ["--prompts-file", "/no/file"],
        ["--prompts-file", str(tmp_path / "lines.txt")],
    ):
        code, _, err = run(capsys, "--policy", folders["policy"], *words)
        assert code == 2 and "sample: --prompt" in err


def test_rows_of_prompts_are_read_as_for_training(folders, capsys, tmp_path) -> None:
    """JSON lines, JSON and CSV are read; conversations use the chat template, as do texts with --chat."""
    rows = [{"prompt": "one", "other": 1}, {"prompt": [{"role": "user", "content": "two"}]}]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "one.csv").write_text("prompt\none\n")
    for name, expected in (("rows.jsonl", ["one", "<bos>[two]"]), ("rows.json", ["one", "<bos>[two]"])):
        document = documents(capsys, folders, *mixed(folders, "--prompts-file", str(tmp_path / name)))
        assert [entry["prompt"] for entry in document["samples"]] == expected
    (entry,) = documents(capsys, folders, *mixed(folders, "--prompt", "one", "--chat"))["samples"]
    path = str(tmp_path / "one.csv")
    (read,) = documents(capsys, folders, *mixed(folders, "--prompts-file", path, "--chat"))["samples"]
    assert read["prompt"] == "<bos>[one]" and read["tokens"] == entry["tokens"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": null}\n')
    code, _, err = run(capsys, "--policy", folders["policy"], "--prompts-file", str(tmp_path / "bad.jsonl"))
    assert code == 2 and "sample: --prompts-file: " in err and "bad.jsonl, line 1: prompt: expected a string" in err


def test_text_alone_and_as_it_is_sampled(folders, capsys) -> None:
    options = mixed(folders, "--prompt", "hello", "--prompt", "a", "--num-samples", "2")
    expected = [entry["text"] for entry in documents(capsys, folders, *options)["samples"]]
    for output in ("--text", "--stream"):
        code, out, _ = run(capsys, "--policy", folders["policy"], "--device", "cpu", *options, output)
        assert code == 0 and out.split("\n") == [*expected, ""]


def test_a_stream_prints_whole_characters() -> None:
    """A character of three tokens, one byte each, is printed after the third."""

    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(id for id in ids if id).decode(errors="replace")

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        stream, printed = sample._Stream(Bytes()), []
        for token in (97, 0xE2, 0x82, 0xAC, 0, 98, 0xE2):
            stream.put(torch.tensor([token]))
            printed.append(out.getvalue())
        stream.end()
    assert printed == ["a", "a", "a", "a\u20ac", "a\u20ac", "a\u20acb", "a\u20acb"]
    assert out.getvalue() == "a\u20acb\ufffd\n"


def test_of_a_long_prompt_two_lines_are_shown(folders, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    prompt = "first line\n" + "x" * 60 + "\nthe end"
    code, out, _ = run(capsys, "--policy", folders["policy"], "--prompt", prompt, "--max-new-tokens", "1")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "..." + "x" * 17 and lines[1].startswith("the end")


def test_heads_padded_to_different_sizes(folders, capsys) -> None:
    options = ["--reference", folders["padded_head"], "--beta", "0.5", "--prompt", "abc", "--max-new-tokens", "3"]
    assert len(documents(capsys, folders, *options)["samples"]) == 1
    for name in ("weights_only", "longer_tokenizer"):
        options[1] = folders[name]
        assert len(documents(capsys, folders, *options)["samples"]) == 1


BAD = {
    "no folder": ({"--policy": "/no/such/folder"}, "--policy: there is no such folder"),
    "empty folder": ({"--policy": "@empty"}, "expected tokenizer files; got a folder without"),
    "no tokenizer": ({"--policy": "@weights_only"}, "expected tokenizer files; got a folder without"),
    "not weights": ({"--reference": "@empty"}, "--reference: cannot load a model from"),
    "pickled weights": ({"--policy": "@pickled"}, "--policy: cannot load a model from"),
    "other tokenizer": (
        {"--reference": "@other_tokenizer"},
        "expected the policy's vocabulary, 97 tokens; got another one, 97 tokens: token 3 is '!', the policy's ' '",
    ),
    "other head": ({"--reference": "@wider_weights_only"}, "of one vocabulary; got 97 tokens and 104"),
    "beta nan": ({"--beta": "nan"}, "--beta: expected a finite number; got nan"),
    "no beta": ({"--beta": None}, "--beta: expected together with --reference; got --reference alone"),
    "no reference": ({"--reference": None}, "--reference: expected together with --beta; got --beta alone"),
    "temperature": ({"--temperature": "-1"}, "--temperature: expected a finite number in [0.0, inf); got -1.0"),
    "top-p": ({"--top-p": "0"}, "--top-p: expected a finite number in (0.0, 1.0]; got 0.0"),
    "lengths": ({"--max-new-tokens": "0"}, "--max-new-tokens: expected an integer in [1, 1000000]; got 0"),
    "device": ({"--device": "nonsense"}, "--device: expected a device PyTorch can use here; got 'nonsense'"),
    "too long": ({"--prompt": "a" * 127}, "expected prompt and new tokens within 128 positions of GPT2LMHeadModel"),
    "no prompt": ({"--prompt": None}, "--prompt: expected at least one, or --prompts-file; got none"),
    "empty prompt": ({"--prompt": ""}, "--prompt: expected at least one token; got none in ''"),
    "no file": ({"--prompts-file": "/no/file"}, "--prompts-file: /no/file: there is no such file"),
    "no template": ({"--policy": "@reference", "--chat": True}, "--chat: expected a tokenizer with a chat template"),
    "nan weights": ({"--reference": "@broken"}, "--reference: expected finite weights; got NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, folders, capsys) -> None:
    changes, message = BAD[case]
    options = {"--policy": "@policy", "--reference": "@reference", "--beta": "0.3", "--prompt": "hello",
               "--max-new-tokens": "2", "--device": "cpu"} | changes  # fmt: skip
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            words += [name] if value is True else [name, folders[value[1:]] if value.startswith("@") else value]
    code, out, err = run(capsys, *words)
    assert code == 2 and not out
    lines = [line for line in err.splitlines() if line.startswith("nlhf-kernels: error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_missing_transformers_says_what_to_install(folders, capsys, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nlhf_kernels.engine")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("transformers", "transformers.generation.configuration_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run(capsys, "--policy", folders["policy"], "--prompt", "a")
    assert code == 2
    assert err.count("\n") == 1 and 'pip install "nlhf-kernels[transformers]"' in err


def test_tokens_are_coloured_by_the_log_ratio_and_cannot_drive_the_terminal() -> None:
    tokens = [
        sample.Token(5, "liked", -1.0, -4.0, -2.0),
        sample.Token(6, "[red]\x1b[31m", -4.0, -1.0, -2.0),
        sample.Token(7, "\n", None, None, None),
    ]
    console = new_console(record=True, force_terminal=True, color_system="truecolor", width=100)
    with console.capture() as capture:
        sample._print(console, sample.Sample("prompt", 0, "", tokens), 1)
    printed = capture.get()
    assert "38;2;15;255;15mliked" in printed and "38;2;255;15;15m[red]\\x1b[31m" in printed
    assert "\\n" in printed
    with (plain := new_console(width=100, no_color=True)).capture() as capture:
        sample._print(plain, sample.Sample("prompt", 0, "", tokens), 1)
    assert "\x1b[31m" not in capture.get() and "liked" in capture.get()
