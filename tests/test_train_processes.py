"""Two processes over gloo learn what one learns from the same prompts: gradients, logs, evaluation, checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from tests.support import train_run
from tests.support.training import lora, make_trainer, single_thread  # noqa: F401

RUN = {
    "max_steps": 2, "learning_rate": 1e-2, "samples_per_prompt": 2, "tau": 0.1, "save_strategy": "epoch",
    "eval_dataset": [{"prompt": f"say {letter}"} for letter in "abcde"], "eval_strategy": "steps", "eval_steps": 2,
    "adam_epsilon": 1e-3, "algorithm": "nash-ema", "ema_decay": 0.5, "baseline": "batch",
}  # fmt: skip
HALF = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}


def test_two_processes_are_one(tmp_path) -> None:
    """One process with 8 prompts an update and 2 processes with 2 micro-batches of 2 learn the same; the baseline is a
    mean over all prompts, the opponent an average kept by every process."""
    result = train_run.start(tmp_path / "two", processes=2, **RUN, **HALF)
    assert result.returncode == 0, result.stderr
    trainer = make_trainer(tmp_path / "one", **RUN, per_device_train_batch_size=8)
    trainer.train()
    alone, together = train_run.outcome(trainer), train_run.result(tmp_path / "two")
    assert (alone["batch"], together["batch"]) == (16, 4), "answers a micro-batch"
    assert torch.allclose(torch.tensor(alone["history"]), torch.tensor(together["history"]), rtol=1e-3, atol=1e-5)
    assert alone["history"][-1][2] != 0, "rollouts play with the weights of now"
    assert alone["weights"].keys() == together["weights"].keys()
    for name, (total, squares) in alone["weights"].items():
        assert together["weights"][name] == pytest.approx([total, squares], rel=1e-3, abs=1e-2), name
    (here,), (there,) = alone["evaluations"], together["evaluations"]
    measures = [name for name in here if name.startswith("eval_")]
    assert len(measures) > 4
    for name in measures:
        assert there[name] == pytest.approx(here[name], rel=1e-2, abs=1e-3), name
    saved = {path.name for path in (tmp_path / "two" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "nash_run.json"} <= saved


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("nash-ema", {"lora": {}}), ("nash-mp", {"models_differ": True})],
    ids=["adapters", "models"],
)
def test_all_processes_play_the_same(algorithm, options, tmp_path) -> None:
    """Policy, opponent and reference agree across processes before and after training, even from different generators
    and models; the first adapters depend on args.seed alone, as one process shows."""
    run = {"algorithm": algorithm, "max_steps": 1, "learning_rate": 1e-2, "seed": 11, **options}
    result = train_run.start(tmp_path, processes=2, per_device_train_batch_size=2, ddp_backend="gloo", **run)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"process-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0] != first[1], "the policy has learned"
    if "lora" in options:
        alone = make_trainer(tmp_path / "alone", algorithm=algorithm, seed=11, peft_config=lora())
        assert train_run.players(alone) == first[0]
