"""Estimate a run's time, memory and disk from two updates on the longest prompts, whose results are discarded.

The figures are upper bounds for the real models, judge and settings; failures of a first update (memory, a judge) are
raised here. The trainer cannot be used afterwards: its weights have changed.
"""

from __future__ import annotations

import copy
import math
import os
import resource
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from .callbacks import OptimizerHooks
from .prompts import PromptDataset

UNMEASURED = ("logging_strategy", "eval_strategy", "save_strategy")


class Estimate(NamedTuple):
    updates: int
    update_seconds: float
    evaluations: int
    evaluation_seconds: float  # of all evaluation prompts
    memory: int  # bytes at the peak: the device's, or the process's on a CPU
    device_memory: int  # bytes there are
    checkpoint: int  # bytes of one
    checkpoints: int  # on the disk at once

    @property
    def seconds(self) -> float:
        return self.updates * self.update_seconds + self.evaluations * self.evaluation_seconds


def estimate(trainer: Any) -> Estimate:
    """Return the estimate of a `NashTrainer` that has not trained yet. Calls the judge for the pairs of two updates."""
    args, device = trainer.args, trainer.args.device
    updates = _updates(trainer)
    parts = trainer.evaluation_prompts
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _train(trainer)
    evaluation = 0.0
    for part in [] if parts is None else parts.values() if isinstance(parts, Mapping) else [parts]:
        evaluation += _evaluate(trainer, part)
    if device.type == "cuda":
        memory, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    saves = _count(args.save_strategy, args.save_steps, updates, args.num_train_epochs)
    return Estimate(
        updates,
        seconds,
        _count(args.eval_strategy, args.eval_steps or args.logging_steps, updates, args.num_train_epochs),
        evaluation,
        memory,
        there,
        _checkpoint_bytes(trainer),
        min(saves, args.save_total_limit or saves),
    )


def describe(estimate: Estimate) -> list[str]:
    share = f"{100 * estimate.memory / estimate.device_memory:.0f} % of {_size(estimate.device_memory)}"
    lines = [f"an update: {_time(estimate.update_seconds)}; {estimate.updates} of them"]
    if estimate.evaluations:
        lines.append(f"an evaluation: {_time(estimate.evaluation_seconds)}; {estimate.evaluations} of them")
    lines += [
        f"all: {_time(estimate.seconds)} at most, as measured with the longest prompts",
        f"memory: {_size(estimate.memory)}, {share}",
    ]
    if estimate.checkpoints:
        each = f"{estimate.checkpoints} checkpoints of {_size(estimate.checkpoint)}"
        lines.append(f"disk: {_size(estimate.checkpoint * estimate.checkpoints)}, {each}")
    return lines


class _Times(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def _train(trainer: Any) -> float:
    """Return the seconds of the second of two updates, when kernels are compiled and the optimizer has its state."""
    args, times = copy.copy(trainer.args), _Times()
    prompts_per_update = int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
    args.max_steps, args.load_best_model_at_end, args.eval_on_start, args.logging_first_step = 2, False, False, False
    for name in UNMEASURED:
        setattr(args, name, type(getattr(args, name))("no"))
    needed = (DefaultFlowCallback, OptimizerHooks)
    callbacks = trainer.callback_handler.callbacks
    trainer.callback_handler.callbacks = [each for each in callbacks if isinstance(each, needed)]
    trainer.add_callback(times)
    whole, trainer.train_dataset = trainer.train_dataset, _longest(trainer.train_dataset, prompts_per_update)
    before, trainer.args = trainer.args, args
    try:
        Trainer.train(trainer)  # not the subclass's method, which reads output_dir
    finally:
        trainer.train_dataset, trainer.args, trainer.callback_handler.callbacks = whole, before, callbacks
    first, second = times.ends
    return second - first


def _evaluate(trainer: Any, prompts: PromptDataset) -> float:
    """Return the seconds of all prompts, extrapolated from one batch of the longest."""
    size = int(trainer.args.per_device_eval_batch_size * trainer.args.world_size)
    began = time.perf_counter()
    trainer.evaluator(_longest(prompts, size), "estimate")
    return (time.perf_counter() - began) * math.ceil(len(prompts) / size)


def _longest(prompts: PromptDataset, count: int) -> PromptDataset:
    longest = copy.copy(prompts)
    longest.prompts = sorted(prompts.prompts, key=lambda prompt: -len(prompt.ids))[:count]
    return longest


def _updates(trainer: Any) -> int:
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    an_epoch: int = max(1, math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps))
    epochs: float = trainer.args.num_train_epochs
    return math.ceil(epochs * an_epoch)


def _count(strategy: Any, steps: float, updates: int, epochs: float) -> int:
    """Return the number of a strategy's actions: one every `steps` steps (or share of all steps), or one per epoch."""
    name = str(getattr(strategy, "value", strategy))
    if name == "no":
        return 0
    if name == "epoch":
        return math.ceil(epochs)
    every = steps if steps >= 1 else max(1, math.ceil(updates * steps))
    return int(updates / every)


def _checkpoint_bytes(trainer: Any) -> int:
    """Return the bytes of the saved weights and the optimizer's state."""
    trainable = [value for value in trainer.model.parameters() if value.requires_grad]
    saved = trainable if hasattr(trainer.model, "peft_config") else list(trainer.model.parameters())
    state = [value for each in trainer.optimizer.state.values() for value in each.values()]
    return sum(int(value.nbytes) for value in [*saved, *state] if isinstance(value, torch.Tensor))


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
