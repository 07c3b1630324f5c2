"""Output that is complete or absent: written beside its place under a private name, brought to disk, then renamed.

Whatever stops the writing (an exception, Ctrl-C, kill -9, a power failure) the place holds what it held before, or all
of the new. A name is published only after the files, their manifest and their folders are on disk. An old folder is
exchanged for the new one in one step where the file system can do that; elsewhere two renames are needed, and the next
writer finishes what a kill between them left. What this library did not write is never replaced by a folder.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import manifest
from .lock import lock_place

OWN = ".nlhf-"  # in the names of files that are no output: leftovers, locks
UNFINISHED, REPLACED, REMOVED = ".nlhf-unfinished", ".nlhf-replaced", ".nlhf-removed"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<kind>\.nlhf-(unfinished|replaced|removed))")
_STREAM = re.compile(r"/dev/fd/(\d+)|/proc/self/fd/(\d+)")
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the limit on a file's size is reached (ulimit -f)",
}
_EXCHANGE, _NO_REPLACE = 2, 1  # flags of renameat2(2)
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # renameat2's errors where it is not supported
_log = logging.getLogger(__name__)


class WriteError(OSError):
    """Nothing was published; the message gives the reason and a remedy."""


# ---- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(folder: str | Path, kind: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; rename it to `folder` when the block succeeds, remove it when the block raises.

    The manifest records `kind` (a policy, a preference model). `overwrite` replaces a folder of that kind.
    """
    check_folder(folder, kind, overwrite=overwrite)
    place = Path(folder).resolve()  # a link stays one
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock_place(place), explaining(place):
        remove_leftovers(place.parent, place.name)
        check_folder(folder, kind, overwrite=overwrite)  # again, under the lock: another run may have written it
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=UNFINISHED, dir=place.parent))
        try:
            yield work
            publish(work, place, kind)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_folder(folder: str | Path, kind: str, *, overwrite: bool) -> None:
    """Raise if `atomic_folder` would fail; to be called before hours of work."""
    place = Path(folder).resolve()
    if not place.exists():
        _check_writable(folder, place.parent, "folder")
        return
    if not overwrite:
        raise FileExistsError(f"{folder}: expected a folder that is not there yet; it is (overwrite=True replaces it)")
    if not place.is_dir() or manifest.kind_of(place) != kind:
        raise FileExistsError(f"{folder}: overwrite: expected a {kind} that this library wrote; got something else")
    if others := manifest.strangers(place):
        raise FileExistsError(
            f"{folder}: overwrite: expected only what this library wrote; got {others[0]} beside it, or changed since"
        )


def publish(work: Path, place: Path, kind: str) -> None:
    """Flush a finished folder to disk and rename it to `place`; a folder there is exchanged for it and removed."""
    mask = _umask()
    for path in work.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)  # safetensors makes files readable by one user only
    work.chmod(0o777 & ~mask)  # and so does mkdtemp
    if place.exists():
        _like(work, place.stat())
    manifest.write_manifest(work, kind)
    for folder, _, files in os.walk(work, topdown=False):
        for name in files:
            _to_disk(Path(folder, name))
        _to_disk(Path(folder))
    _exchange(work, place)
    _to_disk(place.parent)
    if work.exists():
        shutil.rmtree(work)  # now the replaced folder


def remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a partial one never has its name."""
    gone = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=REMOVED, dir=folder.parent))
    folder.rename(gone)  # replaces the empty folder
    _to_disk(gone.parent)
    shutil.rmtree(gone)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in `folder`, for all names or for `name`. The caller must hold the lock."""
    found = [(match, path) for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    mine = [(match, path) for match, path in found if name in (None, match["name"])]
    for match, path in sorted(mine, key=lambda item: item[0]["kind"] != REPLACED):
        place = folder / match["name"]
        if match["kind"] == REPLACED and not place.exists():
            _log.warning("%s: put back; its writer was killed while it was replaced", place)
            path.rename(place)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not _in_use(path):
            path.unlink(missing_ok=True)


def _exchange(work: Path, place: Path) -> None:
    if not place.exists():
        if not _renameat2(work, place, _NO_REPLACE):
            work.rename(place)
        return
    if _renameat2(work, place, _EXCHANGE):
        return
    old = work.with_suffix(REPLACED)
    try:
        place.rename(old)
        work.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    old.rename(work)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Call renameat2; return False where the kernel, the C library or the file system lacks it."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(target))


_libc = ctypes.CDLL(None, use_errno=True)


# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a file to write; rename it to `path` afterwards, with mode and owner of the file that it replaces."""
    check_file(path)
    place = Path(path).resolve()
    with explaining(place):
        remove_leftovers(place.parent, place.name)
        descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=UNFINISHED, dir=place.parent)
        work = Path(name)
        try:
            with suppress(OSError):  # a file system without locks, where leftovers are not removed
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # marks the file as in use
            yield work
            work.chmod(0o666 & ~_umask())
            if place.exists():
                _like(work, place.stat())
            _to_disk(work)
            work.replace(place)
            _to_disk(place.parent)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text to a file atomically, or directly to standard output (-, /dev/stdout), a device or a pipe."""
    if is_stdout(path):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    if match := _STREAM.fullmatch(os.path.abspath(path)):
        target: int | Path = os.dup(int(match[1] or match[2]))
    elif _is_stream(Path(path)):
        target = Path(path)
    else:
        with atomic_file(path) as work:
            work.write_text(text, encoding="utf-8")
        return
    with open(target, "w", encoding="utf-8") as file:
        file.write(text)


def check_file(path: str | Path) -> None:
    """Raise if `write_atomic` would fail; to be called before hours of work."""
    place = Path(path).resolve()
    if is_stdout(path) or _STREAM.fullmatch(os.path.abspath(path)) or _is_stream(Path(path)):
        return
    if place.exists() and not place.is_file():
        raise FileExistsError(
            f"{path}: expected a file or a new name; got a {'folder' if place.is_dir() else 'device'}"
        )
    _check_writable(path, place.parent, "file")
    if place.exists() and (owner := place.stat().st_uid) != os.geteuid() != 0:
        raise PermissionError(f"{path}: expected a file of user {os.geteuid()}; got one of user {owner}")


def is_stdout(path: str | Path) -> bool:
    return str(path) in ("-", "/dev/stdout")


def _is_stream(path: Path) -> bool:
    """Return whether `path` is a pipe or a character device, which a rename would replace by a file."""
    with suppress(OSError):
        mode = path.stat().st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return False


# ---- both ------------------------------------------------------------------------------------------------------------


def _check_writable(asked: str | Path, parent: Path, what: str) -> None:
    there = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{asked}: expected a {what} that can be made; {there} cannot be written to")
    if what == "file" and there != parent:
        raise FileNotFoundError(f"{asked}: expected a file in a folder that is there; there is no {parent}")


def _like(path: Path, old: os.stat_result) -> None:
    """Copy mode and owner of what is replaced."""
    mine = path.stat()
    if (mine.st_uid, mine.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):  # a group that this user is not in
            os.chown(path, old.st_uid, old.st_gid)
    path.chmod(stat.S_IMODE(old.st_mode))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # the file system has no fsync for folders
            raise
    finally:
        os.close(descriptor)


def _in_use(path: Path) -> bool:
    """Return whether a file's writer is alive; True if that cannot be determined."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


@contextmanager
def explaining(place: Path) -> Iterator[None]:
    """Turn an error for lack of disk space into a `WriteError`; leave other errors as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WriteError) or (reason := _no_room(error)) is None:
            raise
        free = shutil.disk_usage(place.parent).free / 2**20
        raise WriteError(
            f"{place}: cannot be written: {reason}, {free:.0f} MiB are free there; make room or choose another place "
            "(what was there before is unchanged)"
        ) from error


def _no_room(error: Exception) -> str | None:
    """Return why there was no room, from an error of Python, safetensors ("os error 28") or PyTorch (no number)."""
    numbered = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(numbered[1]) if numbered else None
    if number in _NO_ROOM:
        return _NO_ROOM[number]
    failed = re.search(r"PytorchStreamWriter failed|inline_container", str(error))
    return "PyTorch could not write all of a file" if failed else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
