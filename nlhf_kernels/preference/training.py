"""Training a preference or reward model on human pairs: cross-entropy, both orders of every pair in every step.

A loop in plain PyTorch, on the model's device: it averages over a step's pairs whatever the micro-batches, and needs no
other package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..core.checks import check_integer, check_number
from ..core.stopping import deferred, requested, stop_if_requested, stoppable
from ..core.terminal import new_console, new_progress
from ..core.upstream import finite_attention_gradients
from ..data import Pair
from ..data.pairs import check_pairs
from .checkpoint import Checkpoint
from .judges import PreferenceModelJudge
from .measures import Evaluation, evaluate
from .models import ComparisonModel, Rows


@dataclass(frozen=True)
class PreferenceTraining:
    """Settings of `train_preference_model`.

    Args:
        steps: optimiser steps.
        batch_size: pairs of a step.
        micro_batch: pairs of a forward pass, which changes memory, not results; None: all of a step.
        learning_rate: the highest one; it rises over the first steps, then falls linearly towards zero.
        warmup: share of the steps during which the learning rate rises.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        seed: of the order of pairs and of dropout.
        bfloat16: compute products in bfloat16 (autocast); weights and optimiser state stay as they are.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch: int | None = None
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_integer("PreferenceTraining", name, getattr(self, name), 1, 10**9)
        if self.micro_batch is not None:
            check_integer("PreferenceTraining", "micro_batch", self.micro_batch, 1, self.batch_size)
        check_integer("PreferenceTraining", "seed", self.seed, 0, 2**63 - 1)
        check_number("PreferenceTraining", "learning_rate", self.learning_rate, 0.0, open_low=True)
        check_number("PreferenceTraining", "warmup", self.warmup, 0.0, 1.0)
        check_number("PreferenceTraining", "weight_decay", self.weight_decay, 0.0)
        check_number("PreferenceTraining", "clip", self.clip, 0.0, open_low=True)


@dataclass(frozen=True)
class TrainingReport:
    """The result of `train_preference_model`.

    Args:
        losses: of every step, before it.
        evaluation: on the held-out pairs; None where there were none.
    """

    losses: list[float]
    evaluation: Evaluation | None


def train_preference_model(
    model: ComparisonModel,
    pairs: Sequence[Pair],
    settings: PreferenceTraining = PreferenceTraining(),
    *,
    held_out: Sequence[Pair] = (),
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
) -> TrainingReport:
    """Train `model` in place. A loss or gradient that is not finite raises before the weights change.

    Interrupted and called again with the same arguments, it resumes from `checkpoint` exactly. The file remains when
    the training is done.

    Args:
        model: a model with float32 weights to train.
        pairs: to train on.
        settings: of the training.
        held_out: pairs to measure on afterwards.
        progress: show a bar on stderr.
        checkpoint: a file that the state is written to, and resumed from where it exists.
        checkpoint_every: steps between checkpoints.
    """
    if not pairs:
        raise ValueError("train_preference_model: pairs: expected at least one; got none")
    check_pairs("train_preference_model", pairs)
    check_pairs("train_preference_model", held_out, "held_out")
    low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if low:
        raise ValueError(
            f"train_preference_model: model: expected float32 weights, since small steps vanish in others; {low[0]} is "
            "not (bfloat16=True has the products in bfloat16)"
        )
    encoded = _encode(model, pairs)
    training_state = Checkpoint.of(checkpoint, checkpoint_every, model, settings, encoded)
    _encode(model, held_out)  # raises on pairs that are too long before the training, not after it
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer.zero_grad()
    with (
        stoppable(), deferred(), training_state.lock(), _training_mode(model), _seeded(model, settings.seed),
        _bar(settings.steps, progress) as show,
    ):  # fmt: skip
        losses = training_state.resume(model, optimizer)
        batches = islice(_batches(len(encoded), settings), len(losses), settings.steps)
        for step, batch in enumerate(batches, start=len(losses)):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _slope(step, settings)
            loss = _backward(model, [encoded[index] for index in batch], settings)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not (loss.isfinite() and norm.isfinite()):
                raise FloatingPointError(
                    f"train_preference_model: step {step}: expected a finite loss and gradient; got {float(loss)} and "
                    f"a gradient of norm {float(norm)}; the weights are those of the step before"
                )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            training_state.write(model, optimizer, losses, now=requested())
            show(losses)
            stop_if_requested()
    judge = PreferenceModelJudge(model, settings.micro_batch or settings.batch_size)
    return TrainingReport(losses, evaluate(judge, held_out) if held_out else None)


def _encode(model: ComparisonModel, pairs: Sequence[Pair]) -> list[Rows]:
    return model.encode(*([pair[field] for pair in pairs] for field in range(3)))


def _backward(model: ComparisonModel, batch: list[Rows], settings: PreferenceTraining) -> torch.Tensor:
    """Add the gradients of the mean loss of a step's pairs, a micro-batch at a time; return that mean."""
    size = settings.micro_batch or len(batch)
    total = torch.zeros((), dtype=torch.float32, device=model.head.weight.device)
    for start in range(0, len(batch), size):
        with finite_attention_gradients():
            with torch.autocast(total.device.type, torch.bfloat16, enabled=settings.bfloat16):
                a, b = model(batch[start : start + size])
            loss = model.pair_losses(a.float(), b.float()).sum() / len(batch)
            loss.backward()
        total += loss.detach()
    return total


def _batches(count: int, settings: PreferenceTraining) -> Iterator[list[int]]:
    """Yield the indices of each step: every pair once an epoch, in the seed's order; a step may span two epochs."""
    generator = torch.Generator().manual_seed(settings.seed)

    def stream() -> Iterator[int]:
        while True:
            yield from torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu").tolist()

    indices = stream()
    while True:
        yield list(islice(indices, settings.batch_size))


def _slope(step: int, settings: PreferenceTraining) -> float:
    rise = round(settings.warmup * settings.steps)
    return (step + 1) / (rise + 1) if step < rise else (settings.steps - step) / (settings.steps - rise)


@contextmanager
def _training_mode(model: ComparisonModel) -> Iterator[None]:
    before = [(part, part.training) for part in model.modules()]
    model.train()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def _seeded(model: ComparisonModel, seed: int) -> Iterator[None]:
    """Seed dropout, and restore the state of the caller's generators afterwards."""
    device = model.head.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield lambda losses: None
        return
    with new_progress(new_console(stderr=True)) as progress:
        task = progress.add_task("loss ...", total=steps)
        yield lambda losses: progress.update(task, completed=len(losses), description=f"loss {losses[-1]:.4f}")
