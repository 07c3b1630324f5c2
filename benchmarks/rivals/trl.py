"""TRL's NashMDTrainer, from the last release that has it, on given models; for `benchmarks.train_step`.

Its reward model costs nothing; its scores differ between responses, since equal scores would give zero gradients.
Lengths are forced: no end token before the last position.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch

PHASES = {"_generate_completions": "rollout", "_compute_rewards": "judge", "_compute_logprobs": "scoring"}


class Reward(torch.nn.Module):
    """The reward-model interface of TRL's get_reward, at no cost: 1 if the last token is odd, 0 if it is even."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_name_or_path="reward")
        self.score = torch.nn.Identity()

    def body(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=(input_ids % 2)[..., None].float())


def make_trainer(
    folder: str, policy: Any, reference: Any, tokenizer: Any, prompts: list[str], new: int, beta: float, tau: float,
    **options: Any,
) -> tuple[Any, dict[str, float]]:  # fmt: skip
    """Return the trainer and the seconds of its last update by phase. Changes settings of the process."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith("1.13."):
        raise ImportError(f"expected TRL 1.13; found {found}")
    os.environ.setdefault("CI", "1")  # otherwise TRL sends usage telemetry
    # On an H100 or H200, if the length is 64 more than a multiple of 128, cuDNN's gradients of padded rows are NaN, and
    # the next rollout fails in torch.multinomial (nlhf_kernels/core/upstream.py).
    torch.backends.cuda.enable_cudnn_sdp(False)
    from datasets import Dataset
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

    args = NashMDConfig(
        folder, max_new_tokens=new, max_length=4096, temperature=1.0, mixture_coef=beta, beta=tau,
        missing_eos_penalty=None, generation_kwargs={"min_new_tokens": new, "top_k": 0}, **options,
    )  # fmt: skip
    trainer = NashMDTrainer(
        policy,
        ref_model=reference,
        reward_funcs=Reward(),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=tokenizer,
    )
    seconds: dict[str, float] = {}
    for name, phase in PHASES.items():
        setattr(trainer, name, _timed(getattr(trainer, name), phase, seconds, trainer.args.device))
    return trainer, seconds


def _timed(function: Callable[..., Any], phase: str, seconds: dict[str, float], device: torch.device) -> Any:
    @wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        made = function(*arguments, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[phase] = time.perf_counter() - began
        return made

    return timed
