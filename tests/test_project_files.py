"""Project files agree with the repository: one version, hooks and workflows that run existing commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import nlhf_kernels

ROOT = Path(__file__).resolve().parent.parent
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


def test_there_is_one_version() -> None:
    """The metadata reads the version from the package, and the citation file has the same."""
    assert version("nlhf-kernels") == nlhf_kernels.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == nlhf_kernels.__version__
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hooks_run(hook) -> None:
    """The hooks pass on a correct file of the package, with the tools of this environment."""
    interpreter, *command = shlex.split(hook["entry"])
    assert interpreter == ".venv/bin/python"
    command = [sys.executable, *command, "nlhf_kernels/core/optional.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_workflow_runs_what_ci_runs() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": "bash .ci/run"}
    assert (ROOT / ".ci" / "run").exists()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_templates_ask_for_info(path) -> None:
    labels = [entry["attributes"]["label"] for entry in yaml.safe_load(path.read_text())["body"]]
    assert any("nlhf-kernels info" in label for label in labels)


def test_lint_compiles_nothing() -> None:
    rules = re.findall(r"^(lint|format-check):(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert len(rules) == 2 and not any("READY" in needs for _, needs in rules)
