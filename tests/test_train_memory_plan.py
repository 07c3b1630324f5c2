"""The memory plan of a training run: against measured allocations, against every layout's shares, and as a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
import yaml

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.cli.main import main
from nlhf_kernels.train import NashConfig
from nlhf_kernels.train.layout import Layout, adapter_share_of, check_divides, layout_of, share_of
from nlhf_kernels.train.memory_plan import Models, plan_rank
from nlhf_kernels.train.model_shapes import ModelShapes
from tests.support import paper_costs
from tests.support.live_bytes import LiveBytes
from tests.support.training import checkpoints, lora, make_trainer, single_thread  # noqa: F401

CONFIG = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"], vocab_size=1000, hidden_size=128, intermediate_size=344, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
RUN = {
    "max_steps": 2, "max_prompt_length": 48, "max_new_tokens": 16, "min_new_tokens": 16, "optim": "adamw_torch",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True, "algorithm": "nash-ema"},
        {"peft_config": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "gradient_accumulation_steps": 2},
        {"algorithm": "nash-mp", **checkpoints(True), "optim": "sgd"},
        {"algorithm": "online-ipo", "optim": "adafactor"},
    ],
    ids=["plain", "bf16-average", "adapters", "snapshots-recomputed", "ipo"],
)
def test_a_run_allocates_what_was_planned(changes, tmp_path) -> None:
    """The peak bytes of live tensors in two updates are within 10 % of the plan."""
    options = {**RUN, **changes}
    adapters = options.pop("peft_config", None)
    if adapters is not None:
        options["peft_config"] = lora(**adapters)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG)
    trainer = make_trainer(tmp_path, model=model, train_dataset=[{"prompt": "x" * 48}] * 16, **options)
    reference = trainer.policy_loss.reference
    models = [trainer.model, trainer.rollout_policy.model, *([] if reference is None else [reference])]
    with LiveBytes(value for each in models for value in each.parameters()) as live:
        trainer.train()
    policy = ModelShapes(CONFIG, lora=None if adapters is None else lora(**adapters))
    plan = plan_rank(Models(policy, None if adapters else ModelShapes(CONFIG)), trainer.args, Layout(), "cpu")
    assert 0.9 < plan.total / live.peak < 1.1, (plan.parts, live.peak)


def test_shares_of_a_parameter() -> None:
    plan = {"model.layers.*.q_proj": "colwise", "model.layers.*.o_proj": "rowwise", "lm_head": "colwise_gather_output"}
    cut = {
        ("model.layers.3.q_proj.weight", (12, 8)): (6 * 8, 6 * 8, 3 * 8),
        ("model.layers.3.q_proj.bias", (12,)): (6, 6, 3),
        ("model.layers.0.o_proj.weight", (12, 8)): (12 * 4, 6 * 8, 6 * 4),
        ("model.layers.0.o_proj.bias", (12,)): (12, 6, 6),
        ("model.norm.weight", (9,)): (9, 5, 5),  # the first rank has the longer part
        ("lm_head.weight", (97, 8)): (49 * 8, 49 * 8, 25 * 8),
    }
    for (name, shape), shares in cut.items():
        layouts = Layout(tp_size=2), Layout(fsdp_size=2), Layout(2, 2, 3)
        assert tuple(share_of(name, shape, plan, layout) for layout in layouts) == shares, name


def test_shares_of_an_adapter() -> None:
    plan = {"model.layers.*.q_proj": "colwise", "model.layers.*.o_proj": "rowwise"}
    shares = {
        ("model.layers.3.q_proj.lora_A.default.weight", (4, 8)): 4 * 8,
        ("model.layers.3.q_proj.lora_B.default.weight", (12, 4)): 6 * 4,
        ("model.layers.3.o_proj.lora_A.default.weight", (4, 12)): 4 * 6,
        ("model.layers.3.o_proj.lora_B.default.weight", (8, 4)): 8 * 4,
    }
    for (name, shape), share in shares.items():
        assert adapter_share_of(name, shape, plan, Layout(tp_size=2, fsdp_size=2)) == share, name
        assert adapter_share_of(name, shape, plan, Layout(fsdp_size=2)) == shape[0] * shape[1], name


def test_what_a_gpus_memory_decides(tmp_path) -> None:
    """More logits at a time and copies of layers of one input, where there is memory for them; slices keep to the
    default. Filters gather logits from slices."""
    wide = {"vocab_size": 100_000, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 64}
    policy = ModelShapes(transformers.LlamaConfig(**{**CONFIG.to_dict(), **wide, "head_dim": None}))
    run = {"use_cpu": True, "per_device_train_batch_size": 64, "max_new_tokens": 512, "report_to": []}
    args = NashConfig(str(tmp_path), **run)

    def parts(layout: Layout, gib: int | None, args: NashConfig = args) -> dict[str, int]:
        return dict(plan_rank(Models(policy, policy), args, layout, "cuda", None if gib is None else gib << 30).parts)

    row = 100_000 * 4
    for gib, chunk in ((None, 512 << 20), (10, 512 << 20), (40, 1 << 30), (1000, 2 << 30)):
        assert chunk - 128 * row < parts(Layout(), gib)["chunk of logits"] <= chunk, gib
    assert parts(Layout(tp_size=2), 1000)["chunk of logits"] <= 512 << 20
    matrices = 3 * (2048 * (2048 + 2 * 256) + 2 * 64 * 2048)  # layers x (query, key and value; gate and up)
    assert parts(Layout(), 1000)["joint products"] == 2 * 4 * matrices
    assert not {"joint products"} & (parts(Layout(), 1).keys() | parts(Layout(tp_size=2), 1000).keys())
    filtered = NashConfig(str(tmp_path), top_k=5, **run)
    gathered = parts(Layout(tp_size=2), None, filtered)["logits"] / parts(Layout(tp_size=2), None)["logits"]
    assert gathered == 3 and parts(Layout(), None, filtered) == parts(Layout(), None)


def test_layouts_fit_processes_and_heads() -> None:
    assert layout_of("train", 2, 2, None, 8) == Layout(2, 2, 2)
    assert Layout(2, 2, 2).processes == 8 and Layout(2, 2, 2).data_parallel == 4
    with pytest.raises(ValueError, match=r"tp_size: expected a multiple of 4 processes, .*; got 6"):
        layout_of("train", 2, 2, None, 6)
    with pytest.raises(ValueError, match=r"expected 4 processes, .* dp_replicate_size 2; got 2"):
        layout_of("train", 2, 1, 2, 2)
    with pytest.raises(ValueError, match="fsdp_size: expected .* got 0"):
        layout_of("train", 1, 0, None, 1)
    with pytest.raises(ValueError, match="divisor of the num_attention_heads of model, 4; got 3"):
        check_divides("train", "model", CONFIG, 3)
    with pytest.raises(ValueError, match="divisor of the num_key_value_heads of model, 2; got 4"):
        check_divides("train", "model", CONFIG, 4)


@pytest.fixture
def run_file(tmp_path):
    CONFIG.save_pretrained(tmp_path / "model")
    training = {"output_dir": "run", "per_device_train_batch_size": 8, "max_new_tokens": 64, "max_prompt_length": 64}
    content = {
        "model": str(tmp_path / "model"), "judge": {"function": "judge.py:likes_e"}, "data": {"train": "prompts.jsonl"},
        "training": training,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


def plan(run_file: str, *options: str) -> int:
    return main(["plan", "--config", run_file, "--gpus", "4", *options])


def test_a_verdict_names_settings_that_fit(run_file, capsys) -> None:
    """No weights are there to be read. What the verdict advises is taken by the next call."""
    assert plan(run_file, "--gpu-memory", "1") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^fits: [\d.]+ MiB of", printed, re.M)
    everything = float(re.search(r" all +([\d.]+) MiB", printed)[1])
    memory = str(0.6 * everything / 1024)
    assert plan(run_file, "--gpu-memory", memory) == 1
    advice = re.search(r"^(training\..*) would: ([\d.]+) MiB", capsys.readouterr().out, re.M)
    changes = [word for change in advice[1].split() for word in ("--set", change)]
    assert changes
    assert plan(run_file, "--gpu-memory", memory, *changes) == 0
    assert f"fits: {advice[2]} MiB" in capsys.readouterr().out
    assert plan(run_file, "--gpu-memory", "0.001") == 1
    assert "no layout of 4 GPUs would" in capsys.readouterr().out


def test_bad_layouts_are_refused(run_file, capsys) -> None:
    assert plan(run_file, "--gpu-memory", "1", "--set", "training.tp_size=4") == 2
    assert "training.tp_size: expected a divisor of the num_key_value_heads of model, 2" in capsys.readouterr().err
    assert plan(run_file, "--gpu-memory", "1", "--set", "training.fsdp_size=3") == 2
    assert "training.tp_size: expected a multiple of 3 processes" in capsys.readouterr().err
    assert plan(run_file, "--gpu-memory", "0") == 2


def test_the_table_on_paper_is_computed(tmp_path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "scaling.md").read_text()
    assert paper_costs.table(str(tmp_path)) in page, "python -m tests.support.paper_costs"
