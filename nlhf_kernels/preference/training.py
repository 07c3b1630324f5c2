"""Training a preference or reward model on human pairs: cross-entropy, both orders of every pair in every step.

A loop of our own in plain PyTorch, on the device the model is on: it fits on a page, averages over a step's pairs
whatever the micro-batches, and asks for no package besides.
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
from .checkpoint import Checkpoint
from .judges import PreferenceModelJudge
from .measures import Evaluation, evaluate
from .models import ComparisonModel, Rows


@dataclass(frozen=True)
class PreferenceTraining:
    steps: int = 1000
    batch_size: int = 16  # pairs a step
    micro_batch: int | None = None  # pairs at once through the model: memory, not results; default the whole step
    learning_rate: float = 1e-5  # rises over the first steps, then falls linearly towards zero
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    seed: int = 0  # order of the pairs, dropout
    bfloat16: bool = False  # products in bfloat16 (autocast); weights and optimiser stay as they are

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
    losses: list[float]  # of every step, before it
    evaluation: Evaluation | None  # on the held-out pairs; None where there were none


def train_preference_model(
    model: ComparisonModel,
    pairs: Sequence[Pair],
    settings: PreferenceTraining = PreferenceTraining(),
    *,
    held_out: Sequence[Pair] = (),
    progress: bool = True,  # a bar on stderr
    checkpoint: str | Path | None = None,  # a file; one that is there is gone on from
    checkpoint_every: int = 500,  # steps
) -> TrainingReport:
    """Trains `model` in place. A loss or gradient that is not finite stops it before the weights take it in.

    Cut off and called again with the same arguments, it goes on from `checkpoint` as if nothing had been. The file
    stays when the training is done.
    """
    if not pairs:
        raise ValueError("train_preference_model: pairs: expected at least one; got none")
    low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if low:
        raise ValueError(
            f"train_preference_model: model: expected float32 weights, since small steps vanish in others; {low[0]} is "
            "not (bfloat16=True has the products in bfloat16)"
        )
    encoded = _encode(model, pairs)
    keeper = Checkpoint.of(checkpoint, checkpoint_every, model, settings, encoded)
    _encode(model, held_out)  # what is too long shows now, not after the training
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer.zero_grad()
    with (
        stoppable(), deferred(), keeper.lock(), _training_mode(model), _seeded(model, settings.seed),
        _bar(settings.steps, progress) as show,
    ):  # fmt: skip
        losses = keeper.resume(model, optimizer)
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
            keeper.keep(model, optimizer, losses, now=requested())
            show(losses)
            stop_if_requested()
    judge = PreferenceModelJudge(model, settings.micro_batch or settings.batch_size)
    return TrainingReport(losses, evaluate(judge, held_out) if held_out else None)


def _encode(model: ComparisonModel, pairs: Sequence[Pair]) -> list[Rows]:
    return model.encode(*([pair[field] for pair in pairs] for field in range(3)))


def _backward(model: ComparisonModel, batch: list[Rows], settings: PreferenceTraining) -> torch.Tensor:
    """Gradients of the mean loss of the step's pairs, a micro-batch at a time; returns that mean."""
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
    """Every pair once an epoch, in an order of the seed's; a step may reach into the next epoch."""
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
    """Dropout's noise is the seed's; the caller's generators go on as if nothing had been drawn."""
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
