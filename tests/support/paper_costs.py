"""The table of docs/scaling.md, computed: `python -m tests.support.paper_costs` prints it."""

from __future__ import annotations

from typing import Any

HEAD = (
    "model", "layout", "state", "playing", "caches", "rest", "all", "rollout TFLOP", "loss TFLOP",
    "FSDP2 sends", "TP sends",
)  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "70B": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
LAYOUTS = {"7B": ((1, 8), (2, 4), (8, 1)), "70B": ((4, 16), (8, 8))}


def table(folder: str) -> str:
    from transformers import LlamaConfig

    from nlhf_kernels.train import NashConfig
    from nlhf_kernels.train.layout import Layout
    from nlhf_kernels.train.memory_plan import Models, plan_rank
    from nlhf_kernels.train.model_shapes import ModelShapes
    from nlhf_kernels.train.update_cost import update_cost
    from tests.support.training import checkpoints

    options: dict[str, Any] = {"use_cpu": True, "bf16": True, "report_to": [], **checkpoints(True)}
    args = NashConfig(
        folder, per_device_train_batch_size=8, max_prompt_length=512, max_new_tokens=512, optim="adamw_torch", **options
    )
    rows = [HEAD, ("---",) * len(HEAD)]
    for name, shape in SHAPES.items():
        policy = ModelShapes(LlamaConfig(**shape))
        models = Models(policy, policy)
        for sizes in LAYOUTS[name]:
            layout = Layout(*sizes)
            parts, cost = plan_rank(models, args, layout).parts, update_cost(models, args, layout)
            state = sum(parts[part] for part in ("policy", "gradients", "optimizer"))
            played = sum(parts.get(part, 0) for part in ("policy in rollouts", "reference", "reference, split"))
            caches = sum(size for part, size in parts.items() if "cache" in part)
            every = sum(parts.values())
            memory = [state, played, caches, every - state - played - caches, every]
            sent = [cost.sent_by_fsdp, cost.sent_by_tensor_parallelism]
            flops = [cost.rollout_flops, cost.loss_flops]
            cells = [*(f"{size / 2**30:.1f}" for size in memory), *(f"{count / 1e12:.0f}" for count in flops)]
            rows.append((name, str(layout), *cells, *(f"{size / 2**30:.1f}" for size in sent)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table("unused"))
