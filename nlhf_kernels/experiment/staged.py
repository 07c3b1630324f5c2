"""An experiment in a folder, made stage by stage: what both experiments share."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ..core import settings
from ..core.atomic import atomic_folder
from ..core.loading import quiet
from ..core.terminal import Reporter
from .workspace import KIND, REPORT, Workspace, write_json


class StagedExperiment(ABC):
    """An experiment: `run` completes the stages that are missing, `write` makes the report.

    Args:
        folder (Path): of the experiment; an interrupted one goes on.
        identity (dict): the settings; a folder with stages of others is refused.
        threads (int): of PyTorch on the CPU; 0: as many as it takes.
        device (torch.device): of all models.
        reporter (Reporter): progress lines and bars.
        restart (bool): remove the stages of an experiment that is in the folder.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], threads: int, device: torch.device, reporter: Reporter,
        restart: bool,
    ) -> None:  # fmt: skip
        self.threads, self.device, self.reporter = threads, device, reporter
        self.workspace = Workspace(folder, {**identity, "device": device.type}, restart)

    def run(self) -> dict[str, Any]:
        """Complete the missing stages; return the results, from which the report is drawn: one JSON document."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with self.workspace.lock(), quiet():
                self.make_stages()
                return self.results()
        finally:
            torch.set_num_threads(before)

    def write(self, results: dict[str, Any]) -> Path:
        """Write `results.json`, `report.html` and its figures, replacing older ones; return their folder.

        Args:
            results (dict): of `run`.
        """
        place = self.workspace.path(REPORT)
        with self.workspace.lock(), atomic_folder(place, KIND, overwrite=True) as work:
            write_json(work / "results.json", results)
            self.write_report(results, work)
        return place

    @abstractmethod
    def make_stages(self) -> None:
        """Make the stages that are missing, by `stage`, in order; each reads the files that earlier ones have
        written."""

    @abstractmethod
    def results(self) -> dict[str, Any]:
        """Return all numbers of the report, from the stages' files, as one JSON document."""

    @abstractmethod
    def write_report(self, results: dict[str, Any], folder: Path) -> Path:
        """Write `report.html` and its figures; return its path.

        Args:
            results (dict): of `run`.
            folder (Path): of the report.
        """

    def stage(self, name: str, title: str, make: Callable[[Path], None]) -> None:
        """Make a stage in its folder unless it is there, and say so."""
        suffix = " (kept)" if self.workspace.has(name) else ""
        self.reporter.say(f"{title}{suffix}")
        self.workspace.stage(name, make)


def machine(device: torch.device) -> dict[str, Any]:
    """Return facts about the machine, for the results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type}: {name}", "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "simd": settings.simd_level, "python": platform.python_version()}  # fmt: skip
