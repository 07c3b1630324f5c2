"""Adapters on the command line: training, further training, sampling and evaluation beside the base, merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("peft", reason="adapters are peft's")

import peft
from safetensors.torch import load_file

from nlhf_kernels.cli.main import main
from nlhf_kernels.core.adapters import merged
from nlhf_kernels.core.loading import load_model
from nlhf_kernels.preference import save_preference_model
from tests.support.preference import comparison_model
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, likes_e, lora, make_trainer, single_thread  # noqa: F401

IDS = torch.tensor([[5, 6, 7, 40, 41]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def write_run(folder: Path, **changes: object) -> str:
    """Write a run file of two updates, large enough to change an adapter visibly."""
    run = {
        "model": str(folder / "base"), "data": {"train": str(folder / "prompts.jsonl")},
        "judge": {"function": f"{folder / 'judge.py'}:likes_e"}, **changes,
        "training": {"output_dir": str(folder / str(changes["name"])), "max_steps": 2, "learning_rate": 0.05, "seed": 3,
                     "per_device_train_batch_size": 4, "max_new_tokens": 4, "use_cpu": True, "report_to": "none",
                     "log_samples": 0, "save_strategy": "no"},
    }  # fmt: skip
    del run["name"]
    path = folder / f"{changes['name']}.yaml"
    path.write_text(yaml.safe_dump(run))
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a base model, and an adapter of it made by `train`."""
    root = tmp_path_factory.mktemp("adapters")
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(root / "base")
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (root / "judge.py").write_text("from tests.support.training import likes_e\n")
    save_preference_model(comparison_model(), root / "judge")
    config = write_run(root, name="first", lora={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    assert main(["train", "--config", config]) == 0
    return root


@pytest.fixture(scope="module")
def adapter(root) -> Path:
    return root / "first" / "policy"


def test_it_is_trained_further(root, adapter) -> None:
    """A second run starts from the adapter's values; its base is unchanged and is the reference."""
    before = load_file(adapter / "adapter_model.safetensors")
    assert main(["train", "--config", write_run(root, name="second", model=str(adapter))]) == 0
    after = load_file(root / "second" / "policy" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and not any(before[name].equal(after[name]) for name in before)
    assert not (root / "second" / "policy" / "model.safetensors").exists()

    model = load_model("test", adapter, dtype=torch.float32, trainable=True)
    trainer = make_trainer(root / "third", model=model, max_steps=1, logging_steps=1)
    values = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all(before[name.replace(".default", "")].equal(value) for name, value in values.items())
    trainer.train()
    assert trainer.state.log_history[0]["kl"] != 0, "already away from its base, which is the reference"


def test_what_cannot_be_trained_further_says_how_it_can(adapter, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"model: expected parameters to train; .* \(is_trainable=True loads an adap"):
        make_trainer(tmp_path, model=load_model("test", adapter))
    with pytest.raises(ValueError, match=r"peft_config: expected with a model without adapters; got one that has some"):
        make_trainer(tmp_path, model=load_model("test", adapter, trainable=True), peft_config=lora())
    with pytest.raises(ValueError, match=r"model: expected peft's own model around an adapter and its base; got an"):
        make_trainer(tmp_path, model=AutoModelForCausalLM.from_pretrained(adapter))


def test_it_is_sampled_beside_its_base(root, adapter, capsys) -> None:
    def document(*options: str) -> dict:
        assert main(["sample", "--prompt", "say", "--max-new-tokens", "4", "--device", "cpu", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    alone = document("--policy", str(adapter))
    beside = document("--policy", str(adapter), "--reference", str(root / "base"), "--beta", "0")
    assert alone["reference"] == str(root / "base")
    assert alone["samples"][0]["text"] == beside["samples"][0]["text"]
    for one, other in zip(alone["samples"][0]["tokens"], beside["samples"][0]["tokens"], strict=True):
        for name in ("policy", "reference", "mixture"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)
        assert one["policy"] != one["reference"]
    of_the_base = document("--policy", str(adapter), "--beta", "1")
    assert of_the_base["samples"][0]["text"] == document("--policy", str(root / "base"))["samples"][0]["text"]
    assert main(["sample", "--policy", str(root / "base"), "--beta", "1", "--prompt", "a"]) == 2
    assert "--reference: expected together with --beta" in capsys.readouterr().err


def test_it_is_compared_with_its_distance_from_its_base(root, adapter, capsys) -> None:
    command = ["evaluate", "--policy", f"base={root / 'base'}", "--policy", f"adapter={adapter}", "--judge",
               str(root / "judge"), "--data", str(root / "prompts.jsonl"), "--max-new-tokens", "4", "--device", "cpu",
               "--json"]  # fmt: skip
    assert main(command) == 0
    base, adapted = json.loads(capsys.readouterr().out)["policies"]
    assert main([*command, "--reference", str(root / "base")]) == 0
    _, beside = json.loads(capsys.readouterr().out)["policies"]
    assert "kl" not in base and adapted["kl"] == pytest.approx(beside["kl"], abs=1e-4) and adapted["kl"] != 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_it_is_a_whole_model(root, adapter, dtype, tmp_path, capsys) -> None:
    assert main(["merge", str(adapter), "--output", str(tmp_path / "whole"), "--dtype", dtype]) == 0
    assert capsys.readouterr().out == f"Saved: {tmp_path / 'whole'}\n"
    whole = load_model("test", tmp_path / "whole", dtype="auto")
    assert type(whole).__name__ == "LlamaForCausalLM" and str(whole.dtype) == f"torch.{dtype}"
    exact = logits(load_model("test", adapter, dtype=torch.float32))
    away = (exact - logits(load_model("test", root / "base", dtype=torch.float32))).abs().max()
    tolerance = {"float32": 1e-4, "bfloat16": 0.15}[dtype]
    assert (logits(whole).float() - exact).abs().max() < tolerance < away / 2
    assert main(["sample", "--policy", str(tmp_path / "whole"), "--prompt", "a", "--device", "cpu"]) == 0


def test_what_cannot_be_merged(root, adapter, tmp_path, capsys) -> None:
    for arguments, message in (
        ([str(root / "base")], "merge: adapter: expected an adapter of peft's; got a whole model"),
        ([str(root / "nowhere")], "merge: adapter: there is no such folder"),
    ):
        assert main(["merge", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    for more in ([], ["--overwrite"]):
        assert main(["merge", str(adapter), "--output", str(root / "base"), *more]) == 2
        assert "merge: --output: " in capsys.readouterr().err
    tied = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"expected an adapter on weights that no other layer shares; got one on .*wt"):
        merged(peft.get_peft_model(tied, lora(target_modules=["wte"])))
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"that can be added to its base's weights, LoRA say; got PROMPT_TUNING"):
        merged(peft.get_peft_model(tiny_model("llama"), prompt))
