"""Bad layouts are refused in one sentence by the first process, before a model is loaded; and a run file is trained
to a policy by `torchrun -m nlhf_kernels train`, or `-m nlhf_kernels.cli`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
import yaml

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.cli import train
from nlhf_kernels.cli.errors import BadInput, SaidByFirst
from nlhf_kernels.cli.main import main
from nlhf_kernels.core import upstream
from nlhf_kernels.core.split_adapters import check_splittable
from nlhf_kernels.preference import save_preference_model
from nlhf_kernels.train.accelerate_fsdp import shard
from nlhf_kernels.train.run_file import read_run_file
from nlhf_kernels.train.setup import check_layout
from tests.support.preference import comparison_model
from tests.support.sharded_kills import kill
from tests.support.sharded_runs import accelerate_fsdp
from tests.support.tiny_models import random_model, tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, lora, make_trainer, single_thread  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
needs_splitting = pytest.mark.skipif(
    upstream.distributed_config_class() is None, reason="transformers is too old for split models"
)
SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    for name, seed in (("model", 0), ("other", 4)):
        random_model(transformers.LlamaConfig(**SHAPE), seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    save_preference_model(comparison_model(), root / "preference")
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    training = {
        "output_dir": str(root / "run"), "max_steps": 2, "per_device_train_batch_size": 4, "max_new_tokens": 4,
        "learning_rate": 0.01, "use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "log_samples": 0, "seed": 3,
    }  # fmt: skip
    content = {
        "model": "model", "reference_model": "other", "judge": {"preference_model": "preference"},
        "data": {"train": "prompts.jsonl", "evaluation": "prompts.jsonl"}, "training": training,
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    return root


@needs_splitting
def test_a_run_file_and_torchrun_are_all_it_takes(root) -> None:
    """Tensor parallelism trains with a sharded reference and preference model as the judge, and saves ordinary
    safetensors."""
    finished = torchrun(root, "training.tp_size=2", module="nlhf_kernels.cli")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "eval_win_rate_reference" in finished.stdout and finished.stdout.count("Saved: ") == 1
    policy, before = (
        transformers.AutoModelForCausalLM.from_pretrained(root / name) for name in ("run/policy", "model")
    )
    assert (policy.lm_head.weight - before.lm_head.weight).abs().max() > 1e-4


@needs_splitting
def test_killed_processes_lose_nothing(root) -> None:
    """After kill -9 of one process or of all, between checkpoints, while one is written and while the run starts, every
    checkpoint is whole, and the next launch resumes the last. Two launches at least; six where they take 15 seconds."""
    assert len(kill(root, 6, 1, "fsdp_size=2", seconds=90)) >= 2


@needs_splitting
def test_a_refusal_is_said_once_and_ends_all(root) -> None:
    finished = torchrun(root, "training.tp_size=2", "training.fsdp_size=2", f"training.output_dir={root / 'none'}")
    assert finished.returncode != 0
    said = [line for line in finished.stderr.splitlines() if line.startswith("nlhf-kernels: error")]
    assert len(said) == 1 and "training.tp_size: expected a multiple of 4 processes" in said[0]


def torchrun(root: Path, *changes: str, module: str = "nlhf_kernels") -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module, "train"]
    options = [word for change in changes for word in ("--set", change)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *launch, "--config", "run.yaml", *options]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("changes", "sizes", "expected"),
    [
        ({}, {"tp_size": 4, "world_size": 4}, "divisor of the num_key_value_heads of model, 2; got 4"),
        ({}, {"tp_size": 2, "world_size": 3}, "expected a multiple of 2 processes"),
        ({}, {"fsdp_size": 2, "dp_replicate_size": 2, "world_size": 2}, "expected 4 processes"),
        ({}, {"fsdp_size": 2, "world_size": 2, "optim": "adafactor"}, "optim: expected .* got adafactor"),
        ({"reference_model": "planless"}, {"tp_size": 2, "world_size": 2}, "reference_model: expected .* got gpt2"),
        ({"reference_model": "odd"}, {"tp_size": 2, "world_size": 2}, "vocab_size of reference_model, 97; got 2"),
    ],
)
@needs_splitting
def test_a_bad_layout_is_refused_before_models_are_loaded(changes, sizes, expected, root, monkeypatch) -> None:
    monkeypatch.chdir(root)
    transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2).save_pretrained(root / "planless")
    transformers.LlamaConfig(**{**SHAPE, "vocab_size": 97}).save_pretrained(root / "odd")  # no weights
    run_file = read_run_file(root / "run.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    args = {
        "tp_size": 1,
        "fsdp_size": 1,
        "dp_replicate_size": None,
        "bf16": False,
        "process_index": 0,
        "optim": "adamw_torch",
        **sizes,
    }
    with pytest.raises((BadInput, ValueError), match=expected):
        train._split(run_file, SimpleNamespace(**args))
    with pytest.raises(SaidByFirst):
        train._split(run_file, SimpleNamespace(**{**args, "process_index": 1}))


def test_a_bad_run_file_is_reported_once(root, monkeypatch, capsys) -> None:
    """Of a machine's processes the first one reports it; all end with the same exit code."""
    monkeypatch.chdir(root)
    reports = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        changes = ["--set", "training.beta=2", "--set", "training.output_dir=once"]
        assert main(["train", "--config", "run.yaml", *changes]) == 2
        reports.append(capsys.readouterr().err)
    assert "training.beta: expected" in reports[0] and not reports[1]


def test_a_transformers_that_is_too_old(root, monkeypatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(upstream, "distributed_config_class", lambda: None)
    sizes = {"tp_size": 2, "fsdp_size": 1, "dp_replicate_size": None, "world_size": 2}
    args = SimpleNamespace(**sizes, bf16=False, process_index=0, optim="adamw_torch")
    with pytest.raises(BadInput, match="expected a newer transformers"):
        train._split(read_run_file(root / "run.yaml"), args)


def test_models_of_two_layouts() -> None:
    def split(**sizes: int) -> object:
        model = tiny_model("llama")
        model.config.distributed_config = SimpleNamespace(
            **{"tp_size": 1, "fsdp_size": 1, "dp_replicate_size": 1, **sizes}
        )
        model._is_distributed_loading_by_transformers = True
        return model

    args = SimpleNamespace(tp_size=1, fsdp_size=1, world_size=2, optim="adamw_torch")
    policy = split(tp_size=2)
    assert check_layout(args, policy, reference_model=split(tp_size=2), eval_opponent=None).tp_size == 2
    with pytest.raises(ValueError, match="reference_model: expected .* of tp_size, .*; got ep_size 2"):
        check_layout(args, policy, reference_model=split(tp_size=2, ep_size=2))
    for other in (tiny_model("llama"), split(fsdp_size=2)):
        with pytest.raises(ValueError, match="reference_model: expected a model that is split as the policy, tp 2"):
            check_layout(args, policy, reference_model=other)
    with pytest.raises(ValueError, match=r"DistributedConfig\(fsdp_size=2\), as args.fsdp_size is; got fsdp_size 1"):
        check_layout(SimpleNamespace(tp_size=2, fsdp_size=2, world_size=4, optim="adamw_torch"), policy)
    with pytest.raises(ValueError, match="expected a layout of 3 processes; got tp 2"):
        check_layout(SimpleNamespace(tp_size=1, fsdp_size=1, world_size=3, optim="adamw_torch"), policy)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected one of .*; got 'pissa'"),
        ({"use_dora": True}, "use_dora: expected one of"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: expected one of .*; got \['lm_head'\]"),
    ],
)
def test_adapters_that_need_whole_matrices(options, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        check_splittable(lora(**options))


def test_accelerates_plugin_on_a_cpu(tmp_path, monkeypatch) -> None:
    """accelerate ignores its FSDP plugin on a CPU, silently; the trainer does not."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="--use_fsdp: expected several processes on GPUs, .* got 1 on cpu"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"FSDP_VERSION": "1"}, "got fsdp_version 1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "got fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "got fsdp_activation_checkpointing"),
    ],
)
def test_settings_of_accelerates_plugin(settings, expected, tmp_path) -> None:
    with accelerate_fsdp({"FSDP_VERSION": "2", **settings}), pytest.raises(ValueError, match=expected):
        make_trainer(tmp_path)


def test_models_for_accelerates_plugin(tmp_path) -> None:
    split = tiny_model("llama")
    split.config.distributed_config = SimpleNamespace(tp_size=2, fsdp_size=1, dp_replicate_size=1)
    split._is_distributed_loading_by_transformers = True
    expected = "expected whole models, .* from_pretrained has split, tp 2"
    with accelerate_fsdp({"FSDP_VERSION": "2"}), pytest.raises(ValueError, match=expected):
        make_trainer(tmp_path, model=split)
    with pytest.raises(ValueError, match=r"rows of every trained parameter for each of 100 processes; got \(97, 32\)"):
        shard(SimpleNamespace(num_processes=100), SimpleNamespace(), tiny_model("llama"), None)
