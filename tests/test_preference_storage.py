"""Saved models: loading gives the same probabilities to the last bit, and a failed save leaves no partial model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from nlhf_kernels.core import atomic, manifest
from nlhf_kernels.preference import (
    PairwisePreferenceModel,
    RewardModel,
    load_preference_model,
    save_preference_model,
)
from tests.support.preference import TEMPLATES, comparison_model, shorter_wins
from tests.support.tiny_models import ARCHITECTURES, one_thread, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


COLUMNS = tuple(list(column) for column in zip(*shorter_wins(12), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_models_are_the_saved_ones(architecture, tmp_path) -> None:
    options = {"max_length": 60, "overlong": "truncate"}
    model = comparison_model(PairwisePreferenceModel, architecture, **options)
    save_preference_model(model, tmp_path / "deep" / "model")
    loaded_model = load_preference_model(tmp_path / "deep" / "model")
    assert torch.equal(loaded_model.probabilities(*COLUMNS), model.probabilities(*COLUMNS))
    assert loaded_model.input_format == model.input_format and not loaded_model.training
    files = [path for path in (tmp_path / "deep").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_kind_and_dtype_are_kept(tmp_path) -> None:
    model = comparison_model(RewardModel)
    for weight in model.parameters():  # as `from_pretrained(dtype=...)` does; .to() would round rotary tables too
        weight.data = weight.data.to(torch.bfloat16)
    save_preference_model(model, tmp_path / "model")
    loaded_model = load_preference_model(tmp_path / "model")
    assert isinstance(loaded_model, RewardModel) and loaded_model.body.dtype == torch.bfloat16
    assert torch.equal(loaded_model.rewards(*COLUMNS[:2]), model.rewards(*COLUMNS[:2]))
    assert load_preference_model(tmp_path / "model", dtype=torch.float32).body.dtype == torch.float32


def test_a_base_from_a_folder(tmp_path) -> None:
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path)
    model = PairwisePreferenceModel.from_base(str(tmp_path), template=TEMPLATES[PairwisePreferenceModel])
    direct = comparison_model()
    model.head.weight.data.copy_(direct.head.weight)
    assert torch.equal(model.probabilities(*COLUMNS), direct.probabilities(*COLUMNS))


def test_nothing_is_overwritten_unasked(tmp_path) -> None:
    first, second = comparison_model(), comparison_model(RewardModel)
    save_preference_model(first, tmp_path / "model")
    with pytest.raises(FileExistsError, match="expected a folder that is not there yet"):
        save_preference_model(second, tmp_path / "model")
    save_preference_model(second, tmp_path / "model", overwrite=True)
    assert isinstance(load_preference_model(tmp_path / "model"), RewardModel)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="expected a folder that can be made; .*file cannot be written to"):
        save_preference_model(first, tmp_path / "file" / "model")
    (tmp_path / "file").unlink()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    with pytest.raises(
        FileExistsError, match="expected a preference model that this library wrote; got something else"
    ):
        save_preference_model(second, precious, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


@pytest.mark.parametrize("failing", ["body", "tokenizer", "rename"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_save_that_fails_leaves_what_was_there(failing, error, tmp_path, monkeypatch) -> None:
    model = comparison_model()
    save_preference_model(model, tmp_path / "model")
    before = model.probabilities(*COLUMNS)
    model.head.weight.data.mul_(-1)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        if failing == "rename":
            patched.setattr(atomic, "_exchange", fail)
        else:
            patched.setattr(getattr(model, failing), "save_pretrained", fail)
        for folder in ("model", "other"):
            with pytest.raises(type(error)):
                save_preference_model(model, tmp_path / folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-written is left"
    assert torch.equal(load_preference_model(tmp_path / "model").probabilities(*COLUMNS), before)


def test_what_is_not_a_whole_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with preference_model.json"):
        load_preference_model(tmp_path)
    save_preference_model(comparison_model(), tmp_path / "model")

    def broken(name: str):
        """Make a copy without the manifest, which would detect the damage."""
        return shutil.copytree(tmp_path / "model", tmp_path / name, ignore=shutil.ignore_patterns(manifest.NAME))

    for change, message in (
        ({"format": 3}, "expected format 1 or 2"),
        ({"format": 2}, "there is no such folder: .*adapter"),
        ({"kind": "oracle"}, "a kind of pairwise, reward"),
        ({"temperature": 2}, "expected template, max_length, overlong; got"),
    ):
        folder = broken(str(change))
        description = json.loads((folder / "preference_model.json").read_text())
        (folder / "preference_model.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match=message):
            load_preference_model(folder)
    import safetensors.torch

    folder = broken("fewer weights")
    weights = safetensors.torch.load_file(folder / "body" / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "body" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected every weight of LlamaModel; layers.1.mlp.up_proj.weight is missing"
    ):
        load_preference_model(folder)
