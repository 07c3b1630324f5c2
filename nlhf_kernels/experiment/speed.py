"""Speed-up of this run by the kernels: the same work, alternately with them and with the PyTorch oracle.

Two measurements: whole updates of Nash-MD, including the models' forward and backward passes, which are PyTorch's in
both cases; and the two operations alone, at the sizes of this run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..core.registry import explain
from ..ops import linear_nash_pg_loss, mixture_sample
from .presets import CONTESTANTS, Preset
from .runs import configuration, make_trainer
from .supervised import Setting
from .training import AfterStep, train_silently
from .workspace import write_json

ROUNDS = 2
REPEATS = 5
TORCH = "torch"


def measure(work: Path, judge: Any, reward: Any, setting: Setting) -> None:
    """Time updates and operations with both backends; write `speed.json`."""
    preset = setting.preset
    mixing = [name for name in preset.contestants if CONTESTANTS[name].beta not in (None, 0.0, 1.0)]
    algorithm = (mixing or list(preset.contestants))[0]  # one that samples from a mixture, where there is one
    seconds: dict[str, list[float]] = {TORCH: [], "auto": []}
    with setting.reporter.bar("timing updates, kernels and oracle in turn", 2 * ROUNDS) as advance:
        for turn in range(2 * ROUNDS):
            backend = (TORCH, "auto")[turn % 2]
            options = {"backend": backend, "max_steps": preset.speed_updates + 1, "eval_strategy": "no"}
            config = configuration(
                algorithm, 0, 0, preset, work / "trainer", setting.device, eval_steps=None, **options
            )
            seconds[backend] += _update_seconds(make_trainer(config, judge, reward, setting))
            advance(turn + 1)
    model = setting.fresh_policy()
    facts = {
        "algorithm": algorithm,
        "update": _compared({name: statistics.median(each) for name, each in seconds.items()}),
        "updates_timed": len(seconds["auto"]),
        "operations": [_sampling(model, preset), _loss(model, preset)],
        "threads": torch.get_num_threads(),
        "device": setting.device.type,
    }
    write_json(work / "speed.json", facts)


def _update_seconds(trainer: Any) -> list[float]:
    """Return the time of each update but the first, from the end of the previous one."""
    ends: list[float] = []
    trainer.add_callback(AfterStep(lambda _: ends.append(_now())))
    train_silently(trainer)
    return [after - before for before, after in pairwise(ends)]


def _now() -> float:
    """Return the time at which the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _compared(seconds: dict[str, float]) -> dict[str, float]:
    return {"torch_ms": 1e3 * seconds[TORCH], "kernels_ms": 1e3 * seconds["auto"],
            "speedup": seconds[TORCH] / seconds["auto"]}  # fmt: skip


def _sampling(model: Any, preset: Preset) -> dict[str, Any]:
    """Time the sampling of one token of y' for every prompt of an update."""
    rows, width = preset.prompts_per_update * preset.samples_per_prompt, model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator(model.device).manual_seed(0)
    logits = [torch.randn(rows, width, generator=generator, dtype=torch.float32, device=model.device) for _ in range(2)]
    row_ids = torch.arange(rows, dtype=torch.int64, device=model.device)
    options: dict[str, Any] = {"seed": 0, "row_ids": row_ids, "step": 0}

    def run(backend: str) -> None:
        mixture_sample(logits[0], logits[1], 0.125, backend=backend, **options)

    backend = explain("mixture_sample", *logits, 0.125, **options).chosen
    return {"name": "mixture_sample", "size": f"{rows} rows x {width} tokens", "backend": backend, **_timed(run)}


def _loss(model: Any, preset: Preset) -> dict[str, Any]:
    """Time the loss and gradients of an update's answers, from hidden states."""
    weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
    rows, tokens = preset.prompts_per_update * preset.samples_per_prompt, preset.answer_tokens
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (rows, tokens, weight.shape[1])
    hidden = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device=model.device)
        .to(weight.dtype)
        .requires_grad_()
    )
    targets = torch.randint(weight.shape[0], shape[:2], generator=generator, dtype=torch.int64, device=model.device)
    preference = torch.rand(rows, generator=generator, dtype=torch.float32, device=model.device)
    reference = torch.full(targets.shape, -1.0, dtype=torch.float32, device=model.device)

    def run(backend: str) -> None:
        options: dict[str, Any] = {"tau": preset.taus[0], "kl": "to_go", "reference_logprobs": reference}
        linear_nash_pg_loss(hidden, weight, targets, preference, backend=backend, **options).loss.backward()

    size = f"{rows} answers x {tokens} tokens x {weight.shape[0]} words"
    return {"name": "linear_nash_pg_loss", "size": size, "backend": "auto", **_timed(run)}


def _timed(run: Callable[[str], None]) -> dict[str, float]:
    """Return median times of calls that alternate between the backends, after a warm-up of each."""
    seconds: dict[str, list[float]] = {TORCH: [], "auto": []}
    for repeat in range(REPEATS + 1):
        for backend, each in seconds.items():
            began = _now()
            run(backend)
            if repeat:
                each.append(_now() - began)
    return _compared({name: statistics.median(each) for name, each in seconds.items()})
