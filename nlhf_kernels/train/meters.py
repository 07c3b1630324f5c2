"""Means over all processes, and time by phase, between two logs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .processes import DataParallel

PHASES = ("rollout", "judge", "loss", "optimizer")


class Meters:
    """Means by name; sums and counts stay on the device until `means` is called."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add values to a mean; every entry counts once. All processes must add the same names.

        Args:
            name: of the mean.
            values (any shape): the entries.
        """
        total = values.detach().double().sum()
        pair = torch.stack([total, torch.full_like(total, values.numel())])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self, processes: DataParallel) -> dict[str, float]:
        """Return the means over all processes, and reset them.

        Args:
            processes: sums over groups.
        """
        if not self.sums:
            return {}
        names, pairs = list(self.sums), torch.stack(list(self.sums.values()))
        self.sums = {}
        total, count = processes.total(pairs).T.tolist()
        return {name: s / c for name, s, c in zip(names, total, count, strict=True) if c}


class PhaseTimer:
    """Seconds by phase; a phase ends when the device has finished its work.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        self.began, self.seconds, self.tokens = time.perf_counter(), defaultdict[str, float](float), 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(name, began)

    def add(self, name: str, began: float) -> None:
        """Count the time since `began`, a reading of time.perf_counter(), as the phase's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the trainer reads the loss after every micro-batch anyway
        self.seconds[name] += time.perf_counter() - began

    def report(self, processes: DataParallel) -> dict[str, float]:
        """Return shares of the time since the last report; the rest to 1 is saving, evaluating and reading data.

        Args:
            processes: sums the tokens per second over groups.
        """
        elapsed = time.perf_counter() - self.began
        shares = {f"time/{name}": self.seconds[name] / elapsed for name in PHASES}
        rate = torch.tensor(self.tokens / elapsed, dtype=torch.float32, device=self.device)
        shares["tokens_per_second"] = float(processes.total(rate))
        self.start()
        return shares
