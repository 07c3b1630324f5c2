"""The experiment's folder: a stage is a folder in it, there whole or not at all, so that a killed run goes on.

A stage that is there is not made again. `experiment.json` says what the folder belongs to: a folder with another
experiment's stages, or with other things in it, is refused; starting over removes what is known to be ours, no more.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.whole import whole_folder, write_whole

IDENTITY = "experiment.json"
FACTS = "stage.json"
RUNS = "runs"
STAGES = ("corpus", "sft", "preferences", "preference-model", "reward-model", "cycles", RUNS, "tournament", "speed",
          "report")  # fmt: skip


class Workspace:
    def __init__(self, folder: Path, identity: dict[str, Any], restart: bool = False) -> None:
        self.folder = folder
        self._claim(json.loads(json.dumps(identity)), restart)

    def _claim(self, identity: dict[str, Any], restart: bool) -> None:
        known = self.folder / IDENTITY
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"experiment: --out: expected a folder; got the file {self.folder}")
        if known.is_file() and restart:
            self._clear()
        elif known.is_file() and self.seconds():
            _compare(self.folder, _read_identity(known), identity)
        elif not known.is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"experiment: --out: expected an empty folder, a new one or an experiment's; got {self.folder}, which "
                "holds other things"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in [*self.folder.glob(".*.unfinished"), *(self.folder / RUNS).glob(".*.unfinished")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_whole(known, json.dumps(identity, indent=2) + "\n")

    def _clear(self) -> None:
        for name in STAGES:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def has(self, stage: str) -> bool:
        return (self.folder / stage / FACTS).is_file()

    def stage(self, name: str, make: Callable[[Path], None]) -> Path:
        """The stage's folder, filled by `make` where it is not there yet."""
        if not self.has(name):
            began = time.perf_counter()
            with whole_folder(self.folder / name, overwrite=True) as work:
                make(work)
                write_json(work / FACTS, {"seconds": time.perf_counter() - began})
        return self.path(name)

    def seconds(self) -> dict[str, float]:
        """What every stage took, those of earlier starts included."""
        found = [*self.folder.glob(f"*/{FACTS}"), *self.folder.glob(f"{RUNS}/*/{FACTS}")]
        return {str(path.parent.relative_to(self.folder)): float(read_json(path)["seconds"]) for path in sorted(found)}


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        known = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"experiment: {path}: expected JSON; got {error} (--restart starts over)") from error
    return known if isinstance(known, dict) else {}


def _compare(folder: Path, known: dict[str, Any], identity: dict[str, Any]) -> None:
    for name in sorted(identity.keys() | known.keys()):
        if known.get(name) != identity.get(name):
            raise ValueError(
                f"experiment: --out: {folder} holds an experiment whose {name} is {known.get(name)!r}; this one's is "
                f"{identity.get(name)!r} (--restart starts over there, another --out keeps both)"
            )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
