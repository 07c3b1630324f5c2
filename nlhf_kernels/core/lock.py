"""One writer at a time: a lock file that the operating system guards and people can read.

The file has an flock, which ends with the process that holds it, and names that process and its machine. A
killed run leaves the file without the flock, and the next run takes it over with a warning. Some network file systems
keep flocks to one machine, so a file from another machine counts as held while its holder renews its time stamp.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = ".nlhf-lock"
RENEWAL = 10.0  # seconds between two renewals of the time stamp
PATIENCE = 60.0  # seconds without a renewal after which another machine's lock is stale
_log = logging.getLogger(__name__)
_held: set[Path] = set()  # by this process


class InUseError(RuntimeError):
    """Another run holds the lock."""


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Lock a folder that exists: one run at a time writes into it. Within a process it may be locked several times."""
    with _locked(Path(folder).resolve() / NAME, str(folder)):
        yield


@contextmanager
def lock_place(place: str | Path) -> Iterator[None]:
    """Lock the name of a file or folder that may not exist yet. A lock held on a parent folder covers all in it."""
    resolved = Path(place).resolve()
    if any(parent / NAME in _held for parent in resolved.parents):
        yield
        return
    with _locked(resolved.with_name(f".{resolved.name}{NAME}"), str(place)):
        yield


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    if path in _held:
        yield
        return
    descriptor = _acquire(path, what)
    released = threading.Event()
    threading.Thread(target=_renew, args=(descriptor, released), daemon=True).start()
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        released.set()
        _release(descriptor, path)


def _release(descriptor: int, path: Path) -> None:
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _flock(descriptor, path, what) and not _is_there(descriptor, path):
                os.close(descriptor)  # its holder removed it between the two calls
                continue
            if left := _read(descriptor):
                _take_over(path, what, left)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_myself()).encode() + b"\n", 0)
            return descriptor
        except InUseError:
            os.close(descriptor)
            raise
        except BaseException:
            _release(descriptor, path)
            raise


def _flock(descriptor: int, path: Path, what: str) -> bool:
    """Take the lock; return False where the file system has no flocks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(_described(path, what, _read(descriptor))) from error
    except OSError:
        return False
    return True


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take_over(path: Path, what: str, left: dict[str, Any]) -> None:
    """Warn of a lock whose holder is gone; raise if it is alive."""
    if left.get("boot") != _myself()["boot"] and _renewed(path):
        raise InUseError(_described(path, what, left))
    _log.warning(
        "%s: taking over from process %s on %s, which was started at %s and did not end well",
        what, left.get("pid"), left.get("host"), left.get("started"),
    )  # fmt: skip


def _renewed(path: Path) -> bool:
    """Return whether a holder on another machine is alive. Opening makes a network file system query its server."""
    modification_times: set[int] = set()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with path.open("rb") as file:
            modification_times.add(os.fstat(file.fileno()).st_mtime_ns)
        if len(modification_times) > 1:
            return True
        time.sleep(min(1.0, PATIENCE / 10))
    return False


def _renew(descriptor: int, released: threading.Event) -> None:
    while not released.wait(RENEWAL):
        with suppress(OSError):
            os.utime(descriptor)


def _described(path: Path, what: str, holder: dict[str, Any]) -> str:
    who = (
        f"process {holder['pid']} on {holder['host']} since {holder['started']} ({holder['command']})"
        if holder.keys() >= {"pid", "host", "started", "command"}
        else "another process"
    )
    return f"{what}: expected a place that no other run writes to; {who} holds it (lock file {path})"


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or cut off
        return {}
    return content if isinstance(content, dict) else {}


def _myself() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }
