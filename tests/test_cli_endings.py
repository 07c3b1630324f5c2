"""Ends of commands: exit codes, one line on stderr, silence on a closed pipe, resume hints that are true."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlhf_kernels.cli import errors, train
from nlhf_kernels.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent


def command(*words: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "nlhf_kernels", *words], env=environment, **pipes, **options)


def test_the_package_runs_as_a_module() -> None:
    process = command("--version")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.startswith("nlhf-kernels ") and not err


def test_help_lists_commands_and_exit_codes(capsys) -> None:
    assert main([]) == 2
    output = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in output
    for code, meaning in errors.CODES.items():
        assert f" {code} {meaning} " in f"{' '.join(output.split())} "
    documented = (ROOT / "docs" / "command_line.md").read_text()
    assert all(f"| {code} | {meaning} |" in documented for code, meaning in errors.CODES.items())


COMMAND_LINES = [[], *([name] for name in COMMANDS), *(["prefer", action] for action in ("train", "evaluate", "score"))]


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_help_fits_80_columns(words, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and max(map(len, lines)) <= 80


def test_a_reader_that_leaves_is_no_error() -> None:
    """A command that prints more than a pipe's buffer to a reader of one line ends without an error message."""
    process = command("tabular", "--game", "random", "--steps", "3000", "--json")
    assert process.stdout.readline() == "{\n"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == errors.CLOSED
    assert "Error" not in err and "Exception" not in err


def test_a_reader_that_leaves_before_a_table_is_no_error() -> None:
    process = command("info")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == errors.CLOSED
    assert not err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nlhf_kernels", "tabular", "--steps", "10", "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == errors.FAILED
    assert result.stderr.count("\n") == 1 and "tabular: the disk is full: [Errno 28] No space left" in result.stderr


def ending(error: BaseException, capsys, names=(), **options) -> tuple[int, str]:
    def work() -> int:
        raise error

    arguments = argparse.Namespace(command="train", traceback=False, **options)
    code = errors.finish(work, arguments, lambda _: "nothing was written", dict(names))
    return code, capsys.readouterr().err


class SafetensorError(Exception):
    """An error with the name of safetensors' own, which is not a ValueError."""


ENDINGS = [
    (ValueError("train: beta: expected a number"), 2, "train: beta: expected a number"),
    (
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        1,
        "disk is full: [Errno 28] No space left on device",
    ),
    (SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "x" })'), 1, "the disk is full"),
    (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), 1, "the disk is full"),
    (MemoryError(), 1, "out of memory: MemoryError: smaller batches or shorter texts need less"),
    (MemoryError("expected 1 GiB\nlower batch"), 1, "out of memory: expected 1 GiB lower batch"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "out of memory: CUDA out of memory. Tried to"),
    (EOFError("Ran out of input"), 2, "a damaged file: EOFError: Ran out of input"),
    (SafetensorError("header too large"), 2, "a damaged file: SafetensorError: header too large"),
    (PermissionError(13, "Permission denied", "/data/x"), 2, "train: Permission denied: /data/x"),
    (SystemExit(0), 1, "sys.exit(0) was called during the work, which is not finished"),
    (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDINGS, ids=lambda value: type(value).__name__)
def test_errors_become_one_line(error, code, message, capsys) -> None:
    result, output = ending(error, capsys)
    assert result == code and message in output
    assert output.count("\n") == 1 and output.startswith("nlhf-kernels: ")


def test_what_was_not_foreseen_shows_where_it_arose(capsys) -> None:
    code, output = ending(KeyError("x"), capsys)
    assert code == 1 and "Traceback" in output and "unexpected KeyError: 'x' (please report it" in output


def test_arguments_of_the_library_are_named_as_options(capsys) -> None:
    names = {"max_length": "--max-length", "overwrite": "--overwrite", "data": "--data"}
    for text, expected in {
        "preference: max_length: expected at most 8": "error: train: --max-length: expected at most 8\n",
        "preference: other: expected at most 8": "error: preference: other: expected at most 8\n",
        "data: data.jsonl, line 3: expected": "error: data: data.jsonl, line 3: expected\n",
        "x: it is there (overwrite=True replaces it)": "error: x: it is there (--overwrite replaces it)\n",
        "x: train(overwrite=True) replaces it": "error: x: --overwrite replaces it\n",
        "x: a (max_length=128) b (data='c') d": "error: x: a (--max-length 128) b (--data c) d\n",
        "x: other=True, --set max_length=8, a.data='c'": "error: x: other=True, --set --max-length 8, a.data='c'\n",
        "x: " + "long" * 1000: "error: x: " + ("long" * 1000)[:1497] + "...\n",
    }.items():
        assert ending(ValueError(text), capsys, names)[1] == f"nlhf-kernels: {expected}"


def test_an_interrupted_training_promises_what_exists(tmp_path) -> None:
    arguments = argparse.Namespace(output=None)
    assert train.resume_hint(arguments) == "no checkpoint was written"
    arguments.output = str(tmp_path)
    assert train.resume_hint(arguments) == "no checkpoint was written"
    (tmp_path / "checkpoint-2").mkdir()
    assert train.resume_hint(arguments) == f"--resume goes on from {tmp_path / 'checkpoint-2'}"


def test_missing_packages_are_one_error_that_names_their_extra(monkeypatch, capsys) -> None:
    for name in ("accelerate", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "--keys"]) == 2
    assert capsys.readouterr().err == (
        'nlhf-kernels: error: nlhf-kernels train needs accelerate, pyyaml: pip install "nlhf-kernels[train]"\n'
    )


def test_traceback_on_request(capsys) -> None:
    assert main(["--traceback", "tabular", "--steps", "0"]) == 2
    assert "Traceback" in (output := capsys.readouterr().err) and output.endswith(
        "--steps: expected at least 1; got 0\n"
    )
