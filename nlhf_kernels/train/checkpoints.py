"""Checkpoints that are complete or absent, and that belong to the run that reads them.

transformers writes a checkpoint file by file into its final folder. Here it writes into a private folder, which is
renamed once all of it is on disk, with a manifest of every file. So `checkpoint-N` is always a complete checkpoint, for
other tools too. `nash_run.json` in it identifies the run that wrote it.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..core import atomic, manifest
from .identity import OP, STORED, Identity, check_changes, differences

KIND = "checkpoint"
RUN = "nash_run.json"
OPPONENT = "opponent.safetensors"
SCALER = "scaler.pt"  # the gradient scaler's state; of runs with fp16
SHARDED = "sharded/.metadata"  # in place of optimizer.pt: marks a complete checkpoint of split models
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")  # to go on exactly; save_only_model leaves them out
_log = logging.getLogger(__name__)


def write_run(folder: Path, identity: Identity, skipped: int) -> None:
    (folder / RUN).write_text(json.dumps({**identity, "skipped_updates": skipped}, indent=2) + "\n")


def skipped_updates(checkpoint: str) -> int:
    return int(json.loads((Path(checkpoint) / RUN).read_text())["skipped_updates"])


def work_folder(output: Path) -> str:
    """Make a new folder in `output` that a checkpoint is written into; return its name."""
    output.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{KIND}.", suffix=atomic.UNFINISHED, dir=output)).name


def publish(work: Path, final: Path) -> None:
    """Rename the checkpoint to its final name, replacing one from before the run was resumed."""
    if final.exists() and (manifest.kind_of(final) != KIND or manifest.strangers(final)):
        _put_aside(final, "holds what this trainer did not write")
    atomic.publish(work, final, KIND)


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders named checkpoint-N in `output`, the newest last."""
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*"))
    numbered = [(int(match[1]), path) for match, path in matches if match and path.is_dir()]
    return [path for _, path in sorted(numbered)]


def rotate(latest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside `latest` until `limit` are left, except the best and other runs' ones."""
    if not limit or limit < 0:
        return
    own = [path for path in list_checkpoints(latest.parent) if manifest.kind_of(path) == KIND]
    spared = [path for path in own if path == latest or str(path) == best]
    removable = [path for path in own if path not in spared]
    for path in removable[: max(0, len(own) - max(limit, len(spared)))]:
        atomic.remove(path)


def resolve(
    output: Path, resume: str | bool | None, overwrite: bool, identity: Identity, changes: Sequence[str] = ()
) -> str | None:
    """Return the checkpoint to go on from, or None. Raise where the folder holds another run's checkpoints.

    Of several it is the newest whose files match their manifest; damaged ones are put aside. `changes` names what may
    differ from the run that wrote it.
    """
    candidates = list_checkpoints(output)
    if not resume:
        _start_over(candidates, overwrite)
        return None
    if resume is not True:
        candidates = [Path(resume)]
    if not candidates:
        raise ValueError(f"{OP}: resume_from_checkpoint: expected a checkpoint in {output}; got none")
    faults: list[tuple[Path, ValueError]] = []
    for path in reversed(candidates):
        try:
            _check_complete(path)
        except ValueError as error:
            faults.append((path, error))
            continue
        _check_identity(path, identity, changes)
        for damaged, fault in faults:
            _put_aside(damaged, str(fault))
        return str(path)
    newest = faults[0][1]
    raise ValueError(f"{OP}: resume_from_checkpoint: expected a complete checkpoint; {newest}") from newest


def _start_over(checkpoints: list[Path], overwrite: bool) -> None:
    others = [path for path in checkpoints if not overwrite or manifest.kind_of(path) != KIND]
    if others:
        raise ValueError(
            f"{OP}: output_dir: expected a folder without checkpoints; got {others[-1]} in it "
            "(resume_from_checkpoint=True goes on from it, overwrite_output_dir=True removes those of this trainer)"
        )
    for path in checkpoints:
        atomic.remove(path)


def _check_complete(path: Path) -> None:
    if not manifest.has_manifest(path):
        raise ValueError(f"{path}: expected a checkpoint that this trainer wrote; it has no {manifest.NAME}")
    manifest.verify(path)
    instead = {"optimizer.pt": SHARDED} if (path / SHARDED).parent.is_dir() else {}
    missing = [name for name in (RUN, *NEEDED) if not (path / instead.get(name, name)).exists()]
    if not missing and json.loads((path / RUN).read_text()).get("fp16") and not (path / SCALER).exists():
        missing = [SCALER]
    if missing:
        raise ValueError(f"{path}: expected all that training needs; it has no {', '.join(missing)}")


def _check_identity(path: Path, identity: Identity, changes: Sequence[str]) -> None:
    check_changes(changes, identity)
    differing = differences(json.loads((path / RUN).read_text()), identity)
    wrong = [text for name, text in differing.items() if name not in changes]
    if wrong:
        possible = sorted(differing.keys() - set(STORED))
        way = f" (resume_changes={possible} goes on with this run's)" if len(possible) == len(differing) else ""
        raise ValueError(f"{OP}: resume_from_checkpoint: {path} is another run's: {'; '.join(wrong)}{way}")
    for text in differing.values():
        _log.warning("%s: %s: as asked for, not the same run: %s", OP, path, text)


def _put_aside(path: Path, why: str) -> None:
    names = (f"{path.name}.damaged{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    aside = next(place for name in names if not (place := path.with_name(name)).exists())
    path.rename(aside)
    _log.warning("%s: put aside as %s: %s", path, aside.name, why)


def update_of(checkpoint: str) -> int:
    """Return how many updates had been made."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])
