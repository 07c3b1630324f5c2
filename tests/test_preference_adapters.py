"""LoRA for judges: the adapter and the head are trained, the base is frozen; saving and loading are exact."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

pytest.importorskip("peft", reason="adapters are peft's")

from safetensors.torch import load_file

from nlhf_kernels.cli.main import main
from nlhf_kernels.preference import (
    PairwisePreferenceModel,
    PreferenceTraining,
    RewardModel,
    load_preference_model,
    save_preference_model,
    train_preference_model,
)
from tests.support.damaged import damaged, lacking, nan
from tests.support.preference import comparison_model, shorter_wins, untrained
from tests.support.tiny_models import one_thread, tiny_model, tiny_tokenizer
from tests.support.training import lora

SETTINGS = PreferenceTraining(steps=60, batch_size=16, learning_rate=1e-2)
PAIRS = shorter_wins(200)
ASK = (["abc"] * 3, ["ab", "a", "hgf"], ["abcdef", "ab", "hgf"])


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize("kind", [PairwisePreferenceModel, RewardModel])
def test_it_learns_while_its_base_stays(kind, tmp_path) -> None:
    model = untrained(kind).add_adapter(lora(r=8, target_modules="all-linear"))
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    losses = train_preference_model(model, PAIRS, SETTINGS, progress=False).losses
    assert sum(losses[-5:]) / 5 < 0.5 < 0.65 < losses[0]
    after = dict(model.named_parameters())
    assert len(base) > 10 and all(after[name].equal(value) for name, value in base.items())

    save_preference_model(model, tmp_path / "judge")
    again = load_preference_model(tmp_path / "judge")
    assert again.probabilities(*ASK).equal(model.probabilities(*ASK))
    assert (tmp_path / "judge" / "adapter" / "adapter_model.safetensors").exists()
    stored, whole = load_file(tmp_path / "judge" / "body" / "model.safetensors"), tiny_model("llama").model.state_dict()
    assert all(stored[name].equal(whole[name]) for name in stored) and stored.keys() == whole.keys()
    trainable_names = {name for name, value in again.named_parameters() if value.requires_grad}
    assert trainable_names == {name for name, value in model.named_parameters() if value.requires_grad}, (
        "it can be trained on"
    )


def test_its_first_values_depend_on_the_seed_alone() -> None:
    def values(seed: int, noise: int) -> list[torch.Tensor]:
        torch.manual_seed(noise)
        model = comparison_model().add_adapter(lora(), seed)
        return [value for name, value in model.named_parameters() if "lora_A" in name]

    first, again, other = values(1, 5), values(1, 6), values(2, 5)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


def test_a_base_in_bfloat16_is_kept_as_it_is(tmp_path) -> None:
    """Frozen weights stay in bfloat16; trained ones are in float32."""
    base, template = tiny_model("llama").bfloat16(), "{prompt}|{first}|{second}="
    model = PairwisePreferenceModel(base, tiny_tokenizer(), template=template).add_adapter(lora())
    train_preference_model(model, PAIRS[:16], PreferenceTraining(steps=2, learning_rate=1e-2), progress=False)
    save_preference_model(model, tmp_path / "judge")
    again = load_preference_model(tmp_path / "judge")
    dtypes = {name: value.dtype for name, value in again.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name or "head" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "base_layer" in name} == {torch.bfloat16}
    assert torch.allclose(again.probabilities(*ASK), model.probabilities(*ASK), atol=1e-2)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = comparison_model()
        if recompute:
            model.body.gradient_checkpointing_enable()
        model.add_adapter(lora()).train()
        a, b = model(model.encode(*ASK))
        model.pair_losses(a, b).sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    plain, recomputed = gradients
    assert any(value.abs().max() > 0 for name, value in plain.items() if "lora_B" in name)
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)


def test_a_training_that_was_cut_off_goes_on(tmp_path) -> None:
    def trained(steps: int, **keeping: object) -> list[float]:
        model = untrained().add_adapter(lora())
        settings = PreferenceTraining(steps=8, batch_size=4, learning_rate=1e-2)
        stop = steps < settings.steps
        pairs = PAIRS[:32]
        if not stop:
            return train_preference_model(model, pairs, settings, progress=False, **keeping).losses
        calls, losses = [0], model.pair_losses

        def cut_off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > steps:
                raise KeyboardInterrupt
            return losses(a, b)

        model.pair_losses = cut_off
        with pytest.raises(KeyboardInterrupt):
            train_preference_model(model, pairs, settings, progress=False, **keeping)
        return []

    keeping = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    trained(5, **keeping)
    assert trained(8, **keeping) == trained(8)


def test_what_is_wrong_with_a_folder_is_said(tmp_path) -> None:
    model = comparison_model().add_adapter(lora())
    save_preference_model(model, tmp_path / "judge")
    for name, change, message in (
        ("lacking", lacking, r"adapter.* is missing"),
        ("nan", nan, r"expected finite weights; got NaN or infinity in .*lora_"),
    ):
        shutil.copytree(tmp_path / "judge", tmp_path / name)
        shutil.rmtree(tmp_path / name / "adapter")
        (tmp_path / name / "nlhf_manifest.json").unlink()  # it would detect the damage first
        damaged(tmp_path / "judge" / "adapter", tmp_path / name / "adapter", change)
        with pytest.raises(ValueError, match=f"preference: .*{message}"):
            load_preference_model(tmp_path / name)
    shutil.rmtree(tmp_path / "judge" / "adapter")
    (tmp_path / "judge" / "nlhf_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"preference: there is no such folder: .*adapter"):
        load_preference_model(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"add_adapter: expected a model without an adapter; got one that has one"):
        model.add_adapter(lora())
    assert copy.deepcopy(model).probabilities(*ASK).equal(model.probabilities(*ASK))


def test_the_command_line(tmp_path, capsys) -> None:
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS))
    command = ["prefer", "train", "--base", str(tmp_path / "base"), "--data", str(data), "--overlong", "truncate",
               "--device", "cpu", "--steps", "2", "--gradient-checkpointing", "--output"]  # fmt: skip
    for option in (["--lora-alpha", "8"], ["--lora-targets", "q_proj"]):
        assert main([*command, str(tmp_path / "none"), *option]) == 2
        assert f"prefer: {option[0]}: expected with --lora-rank; got it alone" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none"), "--lora-rank", "0"]) == 2
    assert main([*command, str(tmp_path / "judge"), "--lora-rank", "4", "--lora-targets", "q_proj, v_proj"]) == 0
    configuration = json.loads((tmp_path / "judge" / "adapter" / "adapter_config.json").read_text())
    assert (configuration["r"], configuration["lora_alpha"]) == (4, 8)
    assert set(configuration["target_modules"]) == {"q_proj", "v_proj"}
    capsys.readouterr()
    pair = ["--prompt", "a", "--first", "b", "--second", "cc", "--device", "cpu"]
    assert main(["prefer", "score", "--model", str(tmp_path / "judge"), *pair]) == 0
    assert capsys.readouterr().out.startswith("P(first > second) = 0.")
