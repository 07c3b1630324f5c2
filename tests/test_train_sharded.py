"""Sharded models learn as whole ones do: tensor parallelism, FSDP2, both, and adapters over FSDP2; checkpoints of all
processes resume on the same or another number. Two launches over gloo, of many small runs each.

accelerate leaves its FSDP plugin out on a CPU; `sharded_runs.accelerate_fsdp` puts it in, and all after that is
accelerate's own code.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.core.upstream import distributed_config_class
from tests.support import sharded_runs
from tests.support.tiny_models import random_model
from tests.support.training import history, lora, make_trainer, single_thread  # noqa: F401

pytestmark = pytest.mark.skipif(distributed_config_class() is None, reason="transformers is too old for split models")
SHAPE: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RUN: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "samples_per_prompt": 2, "tau": 0.1,
    "adam_epsilon": 1e-3, "baseline": "batch", "ddp_backend": "gloo",
}  # fmt: skip
EMA = {"algorithm": "nash-ema", "ema_decay": 0.5}
SAVED = {**EMA, "save_strategy": "steps", "save_steps": 1}
EVALUATED = {
    "eval_dataset": [{"prompt": f"say {letter}"} for letter in "abcde"], "eval_strategy": "steps", "eval_steps": 3,
    "per_device_eval_batch_size": 2,
}  # fmt: skip
SNAPSHOTS = {"algorithm": "nash-mp", "refresh_steps": 1}
ADAPTERS = {"lora": {}, "kl": "exact", "baseline": 0.5}
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_ADAPTED = {**ADAPTERS, "lora": {"target_modules": MATRICES}}
PLUGIN = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FIRST_LOADS = {**PLUGIN, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # the default of accelerate launch
TWO = {
    "tp": {"tp_size": 2, "per_device_train_batch_size": 8, **EMA, **EVALUATED},
    "fsdp": {"fsdp_size": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **EMA, **EVALUATED},
    "ddp": {"per_device_train_batch_size": 4, **EMA, **EVALUATED},
    "snapshots": {"fsdp_size": 2, "per_device_train_batch_size": 4, **SNAPSHOTS},
    "adapters": {"fsdp_size": 2, "per_device_train_batch_size": 4, **ADAPTERS},
    "tp_adapters_begun": {
        "tp_size": 2, "per_device_train_batch_size": 8, **SAVED, **ALL_ADAPTED, "max_steps": 2,
    },
    "tp_adapters": {
        "tp_size": 2, "per_device_train_batch_size": 8, **SAVED, **ALL_ADAPTED, "resume": True,
        "of": "tp_adapters_begun", "saves": True,
    },
    "tp_mixtral": {"tp_size": 2, "per_device_train_batch_size": 8, "model": "mixtral"},
    "fsdp_mixtral": {"fsdp_size": 2, "per_device_train_batch_size": 4, "model": "mixtral"},
    "half": {"fsdp_size": 2, "per_device_train_batch_size": 4, "bf16": True},
    "straight": {"fsdp_size": 2, "per_device_train_batch_size": 4, **EMA},
    "begun": {"fsdp_size": 2, "per_device_train_batch_size": 4, **SAVED, "max_steps": 2},
    "resumed": {"fsdp_size": 2, "per_device_train_batch_size": 4, **SAVED, "resume": True, "of": "begun"},
    "other": {"tp_size": 2, "per_device_train_batch_size": 8, **SAVED, "resume": "checkpoint-2", "of": "begun"},
    "plugin": {
        "plugin": FIRST_LOADS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **EMA, **EVALUATED,
        "reference_model": "llama", "saves": True,
    },
    "plugin_snapshots": {"plugin": PLUGIN, "per_device_train_batch_size": 4, **SNAPSHOTS},
    "plugin_adapters": {"plugin": FIRST_LOADS, "per_device_train_batch_size": 4, **ADAPTERS, "saves": True},
    "plugin_tied": {"plugin": FIRST_LOADS, "per_device_train_batch_size": 4, "model": "tied", "saves": True},
    "plugin_half": {"plugin": PLUGIN, "per_device_train_batch_size": 4, "bf16": True},
    "plugin_begun": {"plugin": PLUGIN, "per_device_train_batch_size": 4, **SAVED, "max_steps": 2},
    "plugin_resumed": {
        "plugin": PLUGIN, "per_device_train_batch_size": 4, **SAVED, "resume": True, "of": "plugin_begun",
    },
    "plugin_other": {
        "fsdp_size": 2, "per_device_train_batch_size": 4, **SAVED, "resume": "checkpoint-2", "of": "plugin_begun",
    },
}  # fmt: skip
FOUR = {
    "both": {"tp_size": 2, "fsdp_size": 2, "per_device_train_batch_size": 4, **EMA, **EVALUATED},
    "replicas": {"tp_size": 2, "dp_replicate_size": 2, "per_device_train_batch_size": 4, **EMA},
    "tied": {"tp_size": 2, "fsdp_size": 2, "per_device_train_batch_size": 4, "model": "tied"},
    "both_adapters": {"tp_size": 2, "fsdp_size": 2, "per_device_train_batch_size": 4, **ALL_ADAPTED},
    "begun": {"tp_size": 2, "fsdp_size": 2, "per_device_train_batch_size": 4, **SAVED, "max_steps": 2},
    "resumed": {
        "tp_size": 2, "fsdp_size": 2, "per_device_train_batch_size": 4, **SAVED, "resume": True, "of": "begun",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    random_model(transformers.LlamaConfig(**SHAPE), 0).save_pretrained(root / "llama")
    random_model(transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True), 1).save_pretrained(root / "tied")
    experts = transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    random_model(experts, 2).save_pretrained(root / "mixtral")
    return root


def launch(models: Path, folder: Path, processes: int, runs: dict[str, Any]) -> SimpleNamespace:
    placed = {}
    for name, options in runs.items():
        options = {**RUN, "model": "llama", **options}
        options["output"] = str(folder / options.pop("of", name))  # "of": the run that this one goes on with
        options |= {role: str(models / options[role]) for role in ("model", "reference_model") if role in options}
        if str(options.get("resume", "")).startswith("checkpoint"):
            options["resume"] = f"{options['output']}/{options['resume']}"
        placed[name] = options
    launcher = sharded_runs.start(folder, processes, placed)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*-0.error")))
    assert launcher.returncode == 0, errors or launcher.stderr
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in runs}
    return SimpleNamespace(folder=folder, results=results)


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> SimpleNamespace:
    return launch(models, tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="module")
def four(models, tmp_path_factory) -> SimpleNamespace:
    return launch(models, tmp_path_factory.mktemp("four"), 4, FOUR)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """A function that returns what one process learns, run by run."""
    known: dict[str, dict[str, Any]] = {}

    def learn(options: dict[str, Any], model: str = "llama") -> dict[str, Any]:
        key = json.dumps([options, model])
        if key not in known:
            options = dict(options)
            if (adapters := options.pop("lora", None)) is not None:
                options["peft_config"] = lora(**adapters)
            whole = transformers.AutoModelForCausalLM.from_pretrained(models / model)
            folder = tmp_path_factory.mktemp("alone")
            options = {**RUN, **options, "ddp_backend": None, "per_device_train_batch_size": 8}
            trainer = make_trainer(folder, **options, model=whole)
            trainer.train()
            known[key] = sharded_runs.outcome(trainer)
        return known[key]

    return learn


def assert_same(result: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-3) -> None:
    learned, known = torch.tensor(result["history"]), torch.tensor(expected["history"])
    assert torch.allclose(learned, known, rtol=rtol, atol=1e-4), (learned, known)
    assert expected["history"][-1][2] != expected["history"][0][2], "the policy has learned"
    assert result["weights"].keys() == expected["weights"].keys()
    for name, sums in expected["weights"].items():
        assert result["weights"][name] == pytest.approx(sums, rel=rtol, abs=1e-2), name
    for there, here in zip(result["evaluations"], expected["evaluations"], strict=True):
        names = [name for name in here if name.startswith("eval_")]
        assert len(names) > 4
        assert {name: there[name] for name in names} == pytest.approx({name: here[name] for name in names}, rel=1e-2)


def assert_saved(folder: Path, result: dict[str, Any]) -> None:
    """Assert that a folder holds the run's weights, or its adapter beside the base."""
    saved = dict(transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    weights = {key.removeprefix("base_model.model."): value for key, value in result["weights"].items()}
    assert saved.keys() == weights.keys()
    for key, value in saved.items():
        value = value.detach().double()
        assert [float(value.sum()), float(value.square().sum())] == pytest.approx(weights[key], rel=1e-6), key


@pytest.mark.parametrize("name", ["tp", "fsdp", "ddp"])
def test_two_processes_learn_what_one_does(name, two, alone) -> None:
    """Any layout learns the same, with an averaged opponent, a baseline over the batch, evaluations of an odd number of
    prompts, and accumulated gradients."""
    assert_same(two.results[name], alone({**EMA, **EVALUATED}))


def test_snapshots_act_on_parts(two, alone) -> None:
    assert_same(two.results["snapshots"], alone(SNAPSHOTS))


def test_adapters_over_a_split_base(two, alone) -> None:
    """Adapters over a sharded base learn the same, with the exact KL from the base."""
    assert_same(two.results["adapters"], alone(ADAPTERS))


@pytest.mark.parametrize("name", ["tp_mixtral", "fsdp_mixtral"])
def test_a_mixture_of_experts(name, two, alone) -> None:
    """Tensor parallelism splits every expert, FSDP2 the tensors that hold all of them."""
    assert_same(two.results[name], alone({}, "mixtral"))


def test_adapters_on_split_matrices(two, alone) -> None:
    """Tensor parallelism splits adapters as their layers. They begin with the weights of whole ones, learn the same,
    and are resumed and saved."""
    result = two.results["tp_adapters"]
    assert_same(result, alone({**EMA, **ALL_ADAPTED}))
    assert_saved(two.folder / "tp_adapters-saved", result)


def test_split_adapters_over_groups(four, alone) -> None:
    """Groups of processes average the gradients of split adapters."""
    assert_same(four.results["both_adapters"], alone(ALL_ADAPTED))


@pytest.mark.parametrize(
    ("name", "options", "model"),
    [
        ("plugin", {**EMA, **EVALUATED}, "llama"),
        ("plugin_snapshots", SNAPSHOTS, "llama"),
        ("plugin_adapters", ADAPTERS, "llama"),
        ("plugin_tied", {}, "tied"),
    ],
)
def test_models_that_accelerate_shards(name, options, model, two, alone) -> None:
    """accelerate's FSDP2 plugin learns what one process does, with a reference that it shards too, where only the first
    process has loaded weights; the saved model or adapter is that of the run."""
    result = two.results[name]
    assert_same(result, alone(options, model))
    if "saves" in TWO[name]:
        assert_saved(two.folder / f"{name}-saved", result)


def test_checkpoints_of_accelerates_plugin(two, alone) -> None:
    """A run goes on from them to the last bit, with the plugin and with fsdp_size."""
    for name in ("plugin_resumed", "plugin_other"):
        assert two.results[name]["weights"] == two.results["straight"]["weights"], name
    assert two.results["plugin_resumed"]["history"] == two.results["straight"]["history"]


@pytest.mark.parametrize("name", ["half", "plugin_half"])
def test_rollouts_in_bfloat16(name, two) -> None:
    """The losses are finite and the policy moves; FSDP2's mixed precision is not autocast's, so curves differ."""
    losses = torch.tensor(two.results[name]["history"])
    assert losses.isfinite().all() and losses[-1, 2] != 0


@pytest.mark.parametrize("name", ["both", "replicas"])
def test_four_processes_learn_what_one_does(name, four, alone) -> None:
    """Tensor parallelism with FSDP2 or replicas across it learns the same."""
    assert_same(four.results[name], alone({**EMA, **EVALUATED} if name == "both" else EMA))


def test_a_tied_head(four, alone) -> None:
    assert_same(four.results["tied"], alone({}, "tied"))


def test_a_judge_is_asked_once_per_group(two, four) -> None:
    """The first process of each group asks the judge; every pair that one process would ask about is asked once."""
    calls = {path.name: path.read_text().split() for path in two.folder.glob("*.calls")}
    assert calls["snapshots-0.calls"] == calls["snapshots-1.calls"] == ["8"] * 3
    assert len(calls["tp-0.calls"]) >= 3 and "tp-1.calls" not in calls
    assert {path.name for path in four.folder.glob("both-*.calls")} == {"both-0.calls", "both-2.calls"}


@pytest.mark.parametrize("launched", ["two", "four"])
def test_a_resumed_run_is_the_same_run(launched, request, alone) -> None:
    """With the same number of processes, logs and sums of weights are equal to the last bit."""
    results = request.getfixturevalue(launched).results
    assert results["resumed"]["history"][:2] == results["begun"]["history"]
    assert_same(results["resumed"], alone(EMA))
    if launched == "two":
        assert results["resumed"] == results["straight"]


def test_another_layout_goes_on(two, models, alone, tmp_path) -> None:
    """A checkpoint of FSDP2 is resumed by tensor parallelism, and by one process with the whole model."""
    assert_same(two.results["other"], alone(EMA))
    whole = transformers.AutoModelForCausalLM.from_pretrained(models / "llama")
    checkpoint = str(two.folder / "begun" / "checkpoint-2")
    options = {**RUN, **SAVED, "ddp_backend": None, "resume_changes": ["judge"], "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, **options, model=whole)
    trainer.train(resume_from_checkpoint=checkpoint)
    learned = torch.tensor(history(trainer, *sharded_runs.LOGGED))
    assert torch.allclose(learned, torch.tensor(alone(EMA)["history"]), rtol=1e-3, atol=1e-4)


def read_weights(folder):
    """Return the trained weights of a checkpoint whole, on one process."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    parts = {name: part for name, part in metadata.items() if name.startswith("model/")}
    weights = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in parts.items()}
    dcp.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix("model/"): value for name, value in weights.items()}


def test_a_checkpoint_has_every_part(four) -> None:
    folder = four.folder / "begun" / "checkpoint-3"
    parts = {path.name for path in (folder / "sharded").iterdir()}
    assert ".metadata" in parts and {f"__{rank}_0.distcp" for rank in range(4)} <= parts
    listed = json.loads((folder / "nlhf_manifest.json").read_text())["files"]
    assert {f"sharded/{name}" for name in parts} <= listed.keys()
    sums = four.results["resumed"]["weights"]
    for name, value in read_weights(folder / "sharded").items():
        value = value.double()
        assert [float(value.sum()), float(value.square().sum())] == pytest.approx(sums[name], rel=1e-6)
