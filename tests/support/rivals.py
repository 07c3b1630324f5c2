"""Rivals of a benchmark that fail in various ways; they run in separate processes, so they import little."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


class Rival:
    """A rival with the fault that `fault` names; any other name gives one without a fault."""

    def __init__(self, fault: str) -> None:
        self.fault, self.runs = fault, 0
        if fault == "absent":
            raise ModuleNotFoundError("No module named 'requests'")

    def error(self) -> float | None:
        return 0.5 if self.fault == "wrong" else float("nan") if self.fault == "nan" else 1e-6

    def run(self) -> None:
        self.runs += 1
        if self.fault == "killed" and self.runs == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "assert":
            raise RuntimeError("CUDA error: device-side assert triggered\nand more")

    def finished(self, updates: int) -> dict[str, list[float]]:
        if self.fault == "weights":
            raise FloatingPointError("after 3 updates lm_head.weight is not finite")
        return {"loss": [1e-3] * updates}

    def peak(self) -> int:
        return 1


def make(fault: str, *_: Any) -> Rival:
    return Rival(fault)


def start(threads: int, make: Any, *arguments: Any) -> Rival:
    """Make the rival as `train_step.start` does, without PyTorch."""
    return make(*arguments)


class Scorer:
    """A worker of `benchmarks.one_model` with the fault that `fault` names, or without one."""

    def __init__(self, fault: str) -> None:
        self.fault, self.samples = fault, 0
        if fault == "absent":
            raise ModuleNotFoundError("No module named 'cutlass'")
        if fault == "compiles":
            time.sleep(600)

    def error(self) -> float:
        return 0.5 if self.fault == "wrong" else float("nan") if self.fault == "nan" else 1e-6

    def sample_us(self, flush_bytes: int) -> float:
        self.samples += 1
        if self.fault == "killed" and self.samples == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return 500.0 if self.fault == "fast" else 1000.0

    def peak(self) -> int:
        return 1


def make_scorer(threads: int, fault: str, *_: Any) -> Scorer:
    return Scorer(fault)
