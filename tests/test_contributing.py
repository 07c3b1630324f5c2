"""CONTRIBUTING.md and docs/adding_an_op.md: the op from the page is added to a copy, and its tests pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding_an_op.md"
NEW_OP = "row_entropy"
COPIED = ("nlhf_kernels", "tests", "benchmarks", "csrc", "pyproject.toml", "README.md")


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the page's diffs")
def test_the_page_adds_an_op(tmp_path) -> None:
    """The op's own tests pass, and so do the tests that cover every op: examples, operands, architecture."""
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, target)
    patch = "".join(re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    applied = subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    files = [f"tests/test_{name}.py" for name in (NEW_OP, "operators", "operator_boundary", "architecture")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", NEW_OP],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 15
    built = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--list"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert NEW_OP in built.stdout, built.stdout + built.stderr
