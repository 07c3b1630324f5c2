"""Output that is there whole or not at all: written beside its place under another name, then renamed into it.

Whatever stops the writing (an exception, Ctrl-C, the machine) the place holds what it held before. Only the exchange
of an old folder for the new one takes two renames; killed between them, the old one is left beside as `.NAME.*.old`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill; becomes `folder` when the block ends well, and is gone when it does not."""
    place = Path(folder).resolve()  # a link stays one
    if not overwrite:
        refuse_existing(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".unfinished", dir=place.parent))
    try:
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                _flush(path)
                path.chmod(0o666 & ~_umask())  # safetensors' own is for one user, too
        work.chmod(0o777 & ~_umask())  # mkdtemp's own is for one user
        _put(work, place, overwrite)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The same for one file, in the place of one that may be there: one rename, so nothing comes in between."""
    place = Path(path).resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".unfinished", dir=place.parent)
    os.close(descriptor)
    work = Path(name)
    try:
        yield work
        _flush(work)
        work.chmod(0o666 & ~_umask())
        work.replace(place)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, text: str) -> None:
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8")


def refuse_existing(place: Path) -> None:
    if place.exists():
        raise FileExistsError(
            f"{place}: expected a place where nothing is yet; got one in use (overwrite=True replaces it)"
        )


def _put(work: Path, place: Path, overwrite: bool) -> None:
    if not overwrite:
        refuse_existing(place)  # once more: the work took time
    if not place.exists():
        work.rename(place)
        return
    old = work.with_suffix(".old")
    place.rename(old)
    try:
        work.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
