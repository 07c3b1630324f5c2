"""Checkpoints that are whole or absent, and that belong to the run that reads them.

transformers writes a checkpoint file by file into its place. Here it writes into `.unfinished/` and the folder is
renamed once all is there, so a name `checkpoint-N` always stands for a whole checkpoint, for every other tool as well.
`nash_run.json` in it says which run wrote it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

UNFINISHED = ".unfinished"
RUN = "nash_run.json"
OPPONENT = "opponent.safetensors"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")  # to go on exactly; save_only_model leaves them out

Identity = dict[str, Any]


def write_run(folder: Path, identity: Identity, skipped: int) -> None:
    (folder / RUN).write_text(json.dumps({**identity, "skipped_updates": skipped}, indent=2) + "\n")


def skipped_updates(checkpoint: str) -> int:
    return int(json.loads((Path(checkpoint) / RUN).read_text())["skipped_updates"])


def clear_unfinished(output: Path) -> None:
    """What a killed run has left half-written."""
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def finish(output: Path, name: str) -> Path:
    """Give the folder its name. One of that name, from before a resumed run came here again, makes way."""
    final = output / name
    if final.exists():
        final.rename(output / UNFINISHED / f"old-{name}")
    (output / UNFINISHED / name).rename(final)
    clear_unfinished(output)
    return final


def update_of(checkpoint: str) -> int:
    """How many updates had been made."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])


def resolve(output: str, resume: str | bool | None, identity: Identity) -> str | None:
    """The checkpoint to go on from, if any. Refuses a folder that holds another run's checkpoints."""
    last = get_last_checkpoint(output) if Path(output).is_dir() else None  # type: ignore[no-untyped-call]
    if not resume:
        if last is not None:
            raise ValueError(
                f"NashTrainer: output_dir: expected a folder without checkpoints; got {last} in it "
                "(train(resume_from_checkpoint=True) goes on from it)"
            )
        return None
    chosen = last if resume is True else str(resume)
    if chosen is None:
        raise ValueError(f"NashTrainer: resume_from_checkpoint: expected a checkpoint in {output}; got none")
    try:
        known = json.loads((Path(chosen) / RUN).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"NashTrainer: resume_from_checkpoint: expected a whole checkpoint that this trainer wrote; "
            f"got {chosen}: {error}"
        ) from error
    missing = [name for name in NEEDED if not (Path(chosen) / name).exists()]
    if missing:
        raise ValueError(
            f"NashTrainer: resume_from_checkpoint: expected a checkpoint with all that training needs; {chosen} has no "
            f"{', '.join(missing)}"
        )
    for name, value in identity.items():
        if known.get(name) != value:
            raise ValueError(
                f"NashTrainer: resume_from_checkpoint: {chosen} is another run's: its {name} is "
                f"{known.get(name)!r}; this run's is {value!r}"
            )
    return chosen
