"""Model loading, common to all commands: weights are complete and finite, or a one-line error names the weight."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="models are transformers'")

from nlhf_kernels.cli.main import main
from nlhf_kernels.core.adapters import is_adapter
from nlhf_kernels.core.loading import load_model, load_tokenizer
from nlhf_kernels.preference import save_preference_model
from tests.support.damaged import damaged, lacking, nan
from tests.support.preference import comparison_model, shorter_wins
from tests.support.tiny_models import ARCHITECTURES, one_thread, tiny_model, tiny_tokenizer

PACKAGE = Path(__file__).resolve().parent.parent / "nlhf_kernels"
WRONG = {"lacking": r"layers.1.\S+ is missing", "nan": r"expected finite weights; got NaN or infinity in \S*layers.1."}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Write a complete model, one without a weight, one with a NaN, a preference model, prompts and pairs."""
    root = tmp_path_factory.mktemp("models")
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(root / "whole")
    for name, change in (("lacking", lacking), ("nan", nan)):
        damaged(root / "whole", root / name, change)
    save_preference_model(comparison_model(), root / "judge")
    (root / "prompts.jsonl").write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in shorter_wins(90)))
    return root


def commands(root: Path, broken: Path, out: Path) -> dict[str, list[str]]:
    """Return the arguments of every command, for each option that names a model."""
    whole, cpu = str(root / "whole"), ["--device", "cpu"]
    evaluate = ["evaluate", "--policy", f"a={whole}", "--judge", str(root / "judge"), "--data",
                str(root / "prompts.jsonl"), "--max-new-tokens", "2", *cpu]  # fmt: skip
    train = ["train", "--check", "--config", str(out / "run.yaml"), "--set"]
    return {
        "sample --policy": ["sample", "--policy", str(broken), "--prompt", "a", *cpu],
        "sample --reference": ["sample", "--policy", whole, "--reference", str(broken), "--beta", "1", "--prompt", "a",
                               *cpu],
        "evaluate --policy": [*evaluate, "--policy", f"b={broken}"],
        "evaluate --reference": [*evaluate, "--policy", f"b={whole}", "--reference", str(broken)],
        "train model": [*train, f"model={broken}"],
        "train reference_model": [*train, f"reference_model={broken}"],
        "train eval_opponent": [*train, f"eval_opponent={broken}"],
        "prefer --base": ["prefer", "train", "--base", str(broken), "--data", str(root / "pairs.jsonl"), "--output",
                          str(out / "judge"), *cpu],
        "demo --model": ["demo", "--preset", "tiny", "--out", str(out / "demo"), "--model", str(broken), "--data",
                         str(root / "pairs.jsonl"), *cpu],
    }  # fmt: skip


DAMAGES = {
    "model.safetensors is damaged or incomplete (": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "model.safetensors is damaged or incomplete": ("model.safetensors", lambda data: b""),
    "tokenizer.json is damaged or incomplete": ("tokenizer.json", lambda data: b""),
    "tokenizer.json is damaged or incomplete (": ("tokenizer.json", lambda data: data[:-100]),
    "config.json is damaged or incomplete": ("config.json", lambda data: b"\xff" + data),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_named_with_what_helps(message, root, tmp_path, capsys) -> None:
    name, change = DAMAGES[message]
    shutil.copytree(root / "whole", tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(change(path.read_bytes()))
    assert main(["sample", "--policy", str(tmp_path / "model"), "--prompt", "a", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'model'}/{message}" in line and line.endswith("copy or download it again")


def test_pickled_weights_are_refused_by_name(root, tmp_path, capsys) -> None:
    shutil.copytree(root / "whole", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert main(["sample", "--policy", str(tmp_path / "model"), "--prompt", "a", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pytorch_model.bin is a pickle, which can run code when it is read: expected weights as safetensors" in line


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", commands(Path(), Path(), Path()))
def test_no_command_takes_made_up_or_broken_weights(command, wrong, root, tmp_path, capsys) -> None:
    if command.startswith(("train", "demo")):
        pytest.importorskip("accelerate", reason="training needs accelerate")
    (tmp_path / "judge.py").write_text("def even(prompts, first, second):\n    return [0.5] * len(prompts)\n")
    run = {"model": str(root / "whole"), "data": {"train": str(root / "prompts.jsonl")},
           "judge": {"function": f"{tmp_path / 'judge.py'}:even"},
           "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"}}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(commands(root, root / wrong, tmp_path)[command]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    option = command.partition(" ")[2]
    assert line.startswith("nlhf-kernels: error: ") and option in line and str(root / wrong) in line
    assert re.search(WRONG[wrong], line), line


def test_nothing_else_loads_models() -> None:
    """Only core/loading.py loads weights, since transformers randomly initializes missing ones."""
    load = re.compile(r"(?<!Config)\.from_pretrained")
    callers = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if load.search(path.read_text())}
    assert callers == {"core/loading.py"}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_classifier_is_no_policy(architecture, tmp_path) -> None:
    """A classifier's checkpoint is refused as a policy, also where a tied head would replace the missing one."""
    from transformers import AutoModelForSequenceClassification

    config = ARCHITECTURES[architecture](32)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"test: cannot load .*ForSequenceClassification|lm_head.weight is missing"):
        load_model("test", tmp_path)


def test_names_that_lead_nowhere(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(ValueError, match=r"test: there is no such folder: '.*nowhere'"):
        load_model("test", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"test: cannot load a tokenizer from .* expected tokenizer files; got a fold"):
        load_tokenizer("test", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"test: there is no such folder: 'nobody/no-such-model', and no model"):
            load("test", "nobody/no-such-model")


@pytest.fixture(scope="class")
def folders(root, tmp_path_factory) -> Path:
    """Write adapters: complete, without a weight, with a NaN, of another base."""
    peft = pytest.importorskip("peft")
    folders = tmp_path_factory.mktemp("adapters")
    base = load_model("test", root / "whole", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folders / "whole")
    for name, change in (("lacking", lacking), ("nan", nan)):
        damaged(folders / "whole", folders / name, change)
    damaged(folders / "whole", folders / "deeper", deepen)
    return folders


def deepen(weights) -> None:
    """Add a weight of a layer that the base lacks, which peft silently drops."""
    weights["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)


def test_an_adapter_is_loaded_around_its_base(root, folders) -> None:
    ids = torch.tensor([[5, 6, 7]])
    base, adapted = (load_model("test", place, dtype=torch.float32) for place in (root / "whole", folders / "whole"))
    assert is_adapter(str(folders / "whole")) and not is_adapter(str(root / "whole"))
    assert not any(value.requires_grad for value in adapted.parameters()) and not adapted.training
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        assert not torch.allclose(logits, base(input_ids=ids).logits, atol=1e-2)
        with adapted.disable_adapter():
            assert adapted(input_ids=ids).logits.equal(base(input_ids=ids).logits)
        merged = load_model("test", folders / "whole", merge=True, dtype=torch.float32)
        assert type(merged) is type(base)
        assert torch.allclose(merged(input_ids=ids).logits, logits, atol=1e-4)
    adapted_model = load_model("test", folders / "whole", trainable=True)
    assert {"lora_" in name for name, value in adapted_model.named_parameters() if value.requires_grad} == {True}


def test_an_adapters_tokenizer_is_its_bases_unless_it_has_one(folders, tmp_path) -> None:
    assert load_tokenizer("test", folders / "whole")("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    own = damaged(folders / "whole", tmp_path / "own", lambda weights: None)
    tiny_tokenizer(first="!").save_pretrained(own)
    assert load_tokenizer("test", own)("ab")["input_ids"] == tiny_tokenizer(first="!")("ab")["input_ids"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [*WRONG.items(), ("deeper", r"layers.7.self_attn.q_proj.lora_A\S* is of another model")],
)
def test_an_adapter_is_whole_and_finite(wrong, message, folders) -> None:
    with pytest.raises(ValueError, match=f"^test: .*{message}"):
        load_model("test", folders / wrong)


def test_an_adapters_base_is_whole(root, folders, tmp_path) -> None:
    for base, message in (
        (root / "lacking", r"its base, '.*lacking': expected every weight of Llama.* is missing"),
        (root / "nowhere", r"its base, base_model_name_or_path in \S+ there is no such folder: '.*nowhere'"),
        (folders / "whole", r"expected a whole model as its base; got an adapter"),
    ):
        place = damaged(folders / "whole", tmp_path / base.name, lambda weights: None)
        path = Path(place) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
        with pytest.raises(ValueError, match=message):
            load_model("test", place)
