"""The experiment's folder: a stage is a folder in it, complete or absent, so that a killed run goes on.

A stage that is complete is kept. `experiment.json` holds the experiment's settings: a folder with stages of other
settings, or with other things in it, is refused; starting over removes only folders with a stage's manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..core.atomic import OWN, atomic_folder, check_folder, remove, remove_leftovers, write_atomic
from ..core.lock import lock_folder
from ..core.manifest import DamagedError, has_manifest, verify

IDENTITY = "experiment.json"
FACTS = "stage.json"
KIND = "stage"
RUNS, REPORT = "runs", "report"
STAGES = (
    *("corpus", "sft", "preferences", "preference-model", "reward-model", "cycles", "tournament", "limits"),
    *("exploitability", "speed", REPORT),
)


class Workspace:
    """The folder of one experiment. Writers hold `with workspace.lock():`, one run at a time."""

    def __init__(self, folder: Path, identity: dict[str, Any], restart: bool = False) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self._refuse_others()
        folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            for parent in (folder, folder / RUNS):
                if parent.is_dir():
                    remove_leftovers(parent)
            if restart:
                self._clear()
            self._claim()

    def lock(self) -> AbstractContextManager[None]:
        return lock_folder(self.folder)

    def _refuse_others(self) -> None:
        """Raise for a folder that is not an experiment's, and for a path with a stage's name that is not a stage."""
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"experiment: --out: expected a folder; got the file {self.folder}")
        things = [path for path in self.folder.iterdir() if OWN not in path.name] if self.folder.is_dir() else []
        if things and not (self.folder / IDENTITY).is_file():
            raise FileExistsError(
                f"experiment: --out: expected an empty folder, a new one or an experiment's; got {self.folder}, which "
                "holds other things"
            )
        for path in self._stages():
            if not has_manifest(path):
                raise FileExistsError(
                    f"experiment: --out: expected a stage of the experiment under the name {path}; got something else"
                )

    def _claim(self) -> None:
        identity_file = self.folder / IDENTITY
        if identity_file.is_file() and self.seconds():
            _compare(self.folder, _read_identity(identity_file), self.identity)
        for path in self._stages():
            try:
                verify(path)
            except DamagedError as error:
                raise DamagedError(
                    f"experiment: {error}; without {path} and the stages after it, they are made again"
                ) from error
        check_folder(self.folder / REPORT, KIND, overwrite=True)
        write_atomic(identity_file, json.dumps(self.identity, indent=2) + "\n")

    def _stages(self) -> list[Path]:
        """Return existing paths with the name of a stage."""
        runs = sorted(self.folder.glob(f"{RUNS}/[!.]*/"))
        return [path for path in [*(self.folder / name for name in STAGES), *runs] if path.exists()]

    def _clear(self) -> None:
        for path in self._stages():
            check_folder(path, KIND, overwrite=True)
        for path in self._stages():
            remove(path)

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def has(self, stage: str) -> bool:
        return (self.folder / stage / FACTS).is_file()

    def stage(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the stage's folder; if it is missing, `make` fills it first."""
        if not self.has(name):
            began = time.perf_counter()
            with atomic_folder(self.folder / name, KIND) as work:
                make(work)
                write_json(work / FACTS, {"seconds": time.perf_counter() - began})
        return self.path(name)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage, earlier starts included."""
        paths = [*self.folder.glob(f"*/{FACTS}"), *self.folder.glob(f"{RUNS}/*/{FACTS}")]
        return {str(path.parent.relative_to(self.folder)): float(read_json(path)["seconds"]) for path in sorted(paths)}


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"experiment: {path}: expected JSON; got {error} (--restart starts over)") from error
    return content if isinstance(content, dict) else {}


def _compare(folder: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    for name in sorted(identity.keys() | stored.keys()):
        if stored.get(name) != identity.get(name):
            raise ValueError(
                f"experiment: --out: {folder} holds an experiment whose {name} is {stored.get(name)!r}; this one's is "
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
