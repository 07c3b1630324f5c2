"""A folder's manifest: `nlhf_manifest.json`, written last, lists size and checksum of every file.

It marks a folder as written by this library, and shows which files have changed since. CRC-32 detects every flipped
bit, and is the fastest checksum in Python's standard library.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "nlhf_manifest.json"
FORMAT = 1
THREADS = 4  # crc32 releases the GIL


class DamagedError(ValueError):
    """A file is missing, or not what was written."""


def write_manifest(folder: Path, kind: str) -> None:
    """Write sizes and checksums of the folder's files; `kind` is what it is: a checkpoint, a policy."""
    names = sorted(_files(folder))
    with ThreadPoolExecutor(THREADS) as pool:
        checksums = list(pool.map(lambda name: checksum_of(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": checksum}
        for name, checksum in zip(names, checksums, strict=True)
    }
    content = {"format": FORMAT, "kind": kind, "files": files}
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def has_manifest(folder: Path) -> bool:
    return (folder / NAME).is_file()


def kind_of(folder: Path) -> str | None:
    """Return the kind that this library wrote the folder as; None where it did not."""
    try:
        return str(_read(folder)["kind"])
    except DamagedError:
        return None


def strangers(folder: Path) -> list[str]:
    """Return the files that this library did not write, or that have another size now."""
    files = _read(folder)["files"]
    return [
        name for name in sorted(_files(folder))
        if name not in files or (folder / name).stat().st_size != files[name]["bytes"]
    ]  # fmt: skip


def verify(folder: Path) -> None:
    """Read every file and raise DamagedError for the first that is not what was written."""
    files = _read(folder)["files"]
    with ThreadPoolExecutor(THREADS) as pool:
        for fault in pool.map(lambda item: _fault(folder / item[0], item[1]), sorted(files.items())):
            if fault is not None:
                raise DamagedError(f"{fault} (restore it, or delete {NAME} to use the folder as it is)")


def checksum_of(path: Path) -> str:
    total, buffer = 0, bytearray(1 << 22)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total = zlib.crc32(view[:count], total)
    return f"{total:08x}"


def _fault(path: Path, written: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: expected a file; it is missing"
    size = path.stat().st_size
    if size != written["bytes"]:
        return f"{path}: expected {written['bytes']} bytes, as were written; got {size}"
    try:
        found = checksum_of(path)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if found != written["crc32"]:
        return f"{path}: expected the CRC-32 {written['crc32']} of what was written; got {found}"
    return None


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name != NAME and (path.is_file() or path.is_symlink()):
            yield name


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DamagedError(f"{path}: expected format {FORMAT}; got {content['format']!r}")
        if not all(isinstance(entry["bytes"], int) and entry["crc32"] for entry in content["files"].values()):
            raise TypeError("no sizes and checksums")
        str(content["kind"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path}: expected the list of the folder's files; got {error!r}") from error
    return dict(content)
