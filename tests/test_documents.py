"""Documents agree with the code: Python snippets and commands run, the table of ops equals the registry."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nlhf_kernels
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


def sides(diff: str) -> tuple[str, str]:
    """Return the code before and after a diff."""
    before, after = (
        "\n".join(line[1:] for line in diff.splitlines() if line[0] in (" ", sign)) + "\n" for sign in "-+"
    )
    return before, after


def test_the_readmes_diffs_run(tmp_path, monkeypatch) -> None:
    """Both sides of the loss and generate() diffs run with equal loss gradients; of the trainer's, the new side."""
    transformers = pytest.importorskip("transformers", reason="the README trains transformers models")
    from nlhf_kernels.integrations import mixture_generate

    monkeypatch.chdir(tmp_path)
    diffs = [sides(body) for path, body in (entry.values for entry in fenced("diff")) if path == ROOT / "README.md"]
    loss, generation, training = diffs
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.LlamaConfig(vocab_size=384, **sizes, **ends)
    policy, reference = (transformers.LlamaForCausalLM(config) for _ in range(2))
    names = {
        "nlhf_kernels": nlhf_kernels, "NashConfig": nlhf_kernels.NashConfig, "NashTrainer": nlhf_kernels.NashTrainer,
        "mixture_generate": mixture_generate, "policy": policy, "reference": reference, "tau": 0.1,
        "ids": torch.randint(384, (2, 6)), "mask": torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2]),
        "preference": torch.tensor([0.8, 0.3]), "reference_logprobs": torch.randn(2, 5),
        "prompts": {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
        "judge": lambda prompts, first, second: [0.5] * len(prompts), "dataset": [{"prompt": "one word"}] * 8,
        "tokenizer": transformers.ByT5Tokenizer(),
    }  # fmt: skip
    gradients = []
    for code in loss:
        exec(compile(code, "README.md", "exec"), names)
        gradients.append(torch.cat([value.grad.flatten() for value in policy.parameters()]))
        policy.zero_grad()
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    for code in generation:
        exec(compile(code, "README.md", "exec"), names)
        assert names["tokens"].shape[0] == 1 and names["tokens"].shape[1] > 3
    compile(training[0], "README.md", "exec")
    exec(compile(training[1], "README.md", "exec"), names)
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("command", commands("nlhf-kernels"))
def test_shown_commands_run(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.files
def test_every_subcommand_is_shown() -> None:
    """Each appears in a block that runs, or in a ```text block if it needs a model that no test has."""
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
    readme, on_gpus = (ROOT / "README.md").read_text(), headlines.gpu_tables()
    places = [readme.find(table) for table in (*on_gpus, headlines.table())]
    assert min(places) >= 0 and places == sorted(places), "python -m benchmarks.headlines"
    assert ("Nothing has been measured on a GPU yet" in readme) is (not on_gpus)


@pytest.mark.files
def test_table_of_ops_is_the_registrys() -> None:
    assert info.ops_table() in (ROOT / "README.md").read_text(), "nlhf-kernels info --markdown prints the new table"


@pytest.mark.files
@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_named_files_exist(path) -> None:
    """Links and `paths/in/backticks` of a document exist relative to the document's folder or to the root."""
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


@pytest.mark.parametrize("folder", ["core", "engine", "train", "experiment", "preference", "evaluation"])
def test_a_folder_lists_its_modules(folder) -> None:
    listed = (ROOT / "nlhf_kernels" / folder / "README.md").read_text()
    modules = {path.name for path in (ROOT / "nlhf_kernels" / folder).glob("[a-z]*.py")}
    assert {name for name in modules if name not in listed} == set()
