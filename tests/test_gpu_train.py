"""Training on a GPU: captured rollouts use the current weights; kernels learn what the PyTorch oracle learns."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from benchmarks import train_step
from benchmarks.harness.case import Shape
from tests.support.training import history, lora, make_trainer

pytestmark = pytest.mark.gpu
RUN = {"use_cpu": False, "max_steps": 6, "learning_rate": 1e-3, "tau": 0.1, "adam_epsilon": 1e-3}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_kernels_and_reference_learn_the_same(adapters, tmp_path) -> None:
    curves = []
    for backend in ("torch", None):
        options = {**RUN, "backend": backend, "peft_config": lora() if adapters else None}
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / str(backend), **options)
        trainer.train()
        assert trainer.args.device.type == "cuda"
        curves.append(torch.tensor(history(trainer, "loss", "kl", "preference")))
    assert torch.allclose(curves[0], curves[1], rtol=2e-2, atol=2e-3)
    assert curves[1][-1, 1] != 0, "rollouts play with the weights of now"


@pytest.mark.parametrize(
    ("width", "vocabulary", "dtype"), [(896, 151_936, "bfloat16"), (576, 49_155, "float32")], ids=["bf16", "fp32"]
)
def test_an_update_is_plain_autograds(width, vocabulary, dtype, tmp_path) -> None:
    sizes = {"prompts": 4, "prompt": 32, "new": 32, "width": width, "layers": 2, "vocabulary": vocabulary}
    rival = train_step.nash_rival(str(tmp_path), Shape(sizes, dtype), torch.device("cuda"), None)
    assert train_step.gradient_error(rival) < train_step.ALLOWED_ERROR[dtype]


@pytest.mark.parametrize("algorithm", ["nash-md", "nash-ema", "nash-mp", "ipo-md"])
def test_bfloat16_trains(algorithm, tmp_path) -> None:
    trainer = make_trainer(tmp_path, algorithm=algorithm, bf16=True, **RUN)
    trainer.train()
    losses = torch.tensor(history(trainer, "loss", "grad_norm"))
    assert losses.isfinite().all() and len(losses) == 6
    experience = trainer.experiences[0]
    with torch.no_grad():
        trainer.rollout_policy.refresh()
        positions = (experience.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = trainer.policy_loss.reference(
            experience.input_ids, attention_mask=experience.attention_mask, position_ids=positions
        )
    width, counts = experience.targets.shape[1], experience.targets >= 0
    logprobs = logits.logits[:, -width - 1 : -1].float().log_softmax(-1)
    target_logprobs = logprobs.gather(-1, experience.targets.clamp(min=0)[..., None])[..., 0]
    assert float((target_logprobs - experience.reference_logprobs)[counts].abs().max()) < 0.3


def test_float16_trains_with_a_scaler(tmp_path) -> None:
    """Training with accelerate's gradient scaler works, whether or not its initial scale overflows."""
    options = {**RUN, "fp16": True, "max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(tmp_path, **options)
    before = torch.cat([value.detach().flatten() for value in trainer.model.parameters()]).clone()
    trainer.train()
    logs = torch.tensor(history(trainer, "loss", "skipped_updates", "loss_scale"))
    assert bool(logs.isfinite().all()) and logs[-1, 1] < 12 and float(logs[-1, 2]) >= 1
    assert trainer.rollout_policy.dtype == torch.float16
    after = torch.cat([value.detach().flatten() for value in trainer.model.parameters()])
    assert after.dtype == torch.float32 and not after.equal(before)
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.accelerator.scaler.state_dict() == trainer.accelerator.scaler.state_dict()
