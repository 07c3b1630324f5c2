"""Documents do not drift: every Python snippet and command shown runs, the table of ops is the registry's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import headlines
from nlhf_kernels.cli import info
from nlhf_kernels.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "node_modules", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(*languages: str) -> list:
    return [
        pytest.param(path, body, id=f"{_name(path)}:{index}")
        for path in DOCUMENTS
        for index, (language, body) in enumerate(FENCE.findall(path.read_text()))
        if language in languages
    ]


SHELLS = ("bash", "console", "sh")


def commands(program: str, languages: tuple[str, ...] = SHELLS) -> list:
    lines = {
        line.strip().removeprefix("$ ").partition("#")[0].strip()
        for parameter in fenced(*languages)
        for line in parameter.values[1].splitlines()
    }
    return sorted(line for line in lines if line == program or line.startswith(program + " "))


@pytest.mark.parametrize(("path", "code"), fenced("python"))
def test_python_snippets_run(path, code, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__snippet__"}
    exec(compile(code, _name(path), "exec"), names)
    assert len(names) > 2, "a snippet shows something: at the least it imports it"


@pytest.mark.parametrize("command", commands("nlhf-kernels"))
def test_shown_commands_run(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.files
def test_every_subcommand_is_shown() -> None:
    """In a block that runs, or, where it needs what no test has (a model's folder), in a ```text block."""
    documented = {shlex.split(command, posix=False)[1] for command in commands("nlhf-kernels", (*SHELLS, "text"))}
    assert documented == set(COMMANDS)


@pytest.mark.files
def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    documented = {word for command in commands("make") for word in shlex.split(command)[1:2]}
    assert documented, "the README shows how to start"
    assert documented <= targets


@pytest.mark.parametrize("command", [line for line in commands("python") if "-m benchmarks" in line])
def test_shown_benchmark_commands_are_understood(command) -> None:
    arguments = shlex.split(command)[1:]
    result = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.files
def test_the_speed_table_is_what_was_measured() -> None:
    assert headlines.table() in (ROOT / "README.md").read_text(), "python -m benchmarks.headlines"


@pytest.mark.files
def test_table_of_ops_is_the_registrys() -> None:
    assert info.markdown_table() in (ROOT / "README.md").read_text(), (
        "nlhf-kernels info --markdown prints the new table"
    )


@pytest.mark.files
@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_named_files_exist(path) -> None:
    """Links and `paths/in/backticks` of a document lead somewhere, from the document's folder or from the root."""
    text = FENCE.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) if "://" not in link]
    ticked = [word for word in re.findall(r"`([\w./]+)`", text) if "/" in word and re.search(r"\.\w{1,5}$|/$", word)]
    for name in links + ticked:
        here = (path.parent / name).exists() or (ROOT / name).exists() or (ROOT / "nlhf_kernels" / name).exists()
        assert here, f"{_name(path)} names {name}"


def test_cli_refuses_bad_input(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["no-such-command"])
    assert "invalid choice" in capsys.readouterr().err
