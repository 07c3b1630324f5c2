"""The scripts in examples/ run unmodified on their tiny local model."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
needs_trl = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("trl", "requests")), reason="TRL or requests is not installed"
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    def example(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    return example


def test_sample_mixture(run, capsys) -> None:
    run("sample_mixture.py", "--max-new-tokens", "4", "--beta", "0", "0.5")
    assert capsys.readouterr().out.count("nats") == 4, "two prompts, two betas"


def test_sample_mixture_wants_both_models_or_neither(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("sample_mixture.py", "--policy", "mine")
    assert "expected both or neither" in capsys.readouterr().err


def test_train_tldr(run, capsys, tmp_path) -> None:
    run("train_tldr.py", "--judge-steps", "1", "--steps", "1", "--max-new-tokens", "2")
    assert "preferred to the reference" in capsys.readouterr().out
    folders = {path.name for path in (tmp_path / "runs" / "example").iterdir()}
    assert {"judge", "policy"} <= folders
    with pytest.raises(SystemExit, match="a folder that is not there yet"):
        run("train_tldr.py")


@needs_trl
def test_accelerate_trl(run, capsys) -> None:
    run("accelerate_trl.py", "--steps", "1", "--max-new-tokens", "2")
    assert "train_loss" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_accelerate_trl_says_what_is_missing(run) -> None:
    with pytest.raises(ImportError, match=r"pip install 'trl>=1.0,<1.14'"):
        run("accelerate_trl.py")
