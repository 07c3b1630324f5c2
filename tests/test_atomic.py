"""Atomic files and folders: complete or absent, their manifest, remains of killed writers, refusals to replace."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch

from nlhf_kernels.core import atomic, lock, manifest

KIND = "thing"


def fill(place: Path, text: str, overwrite: bool = False) -> None:
    with atomic.atomic_folder(place, KIND, overwrite=overwrite) as work:
        (work / "deep").mkdir()
        (work / "file").write_text(text)
        (work / "deep" / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["renameat2", "two renames"])
def renames(request, monkeypatch) -> str:
    """Run the test with each way to exchange two folders; return its name."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    return request.param


def test_folders(tmp_path, renames) -> None:
    with atomic.atomic_folder(tmp_path / "a" / "b", KIND) as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileExistsError, match="expected a folder that is not there yet"):
        fill(tmp_path / "a" / "b", "y")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    fill(tmp_path / "link", "z", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a" / "b" / "file").read_text() == "z"
    assert names(tmp_path / "a") == ["b"], "neither leftovers nor locks"
    manifest.verify(tmp_path / "a" / "b")


def test_a_replaced_folder_keeps_its_mode(tmp_path) -> None:
    fill(tmp_path / "private", "x")
    (tmp_path / "private").chmod(0o700)
    fill(tmp_path / "private", "y", overwrite=True)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


def test_what_others_wrote_is_not_replaced(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="mine: overwrite: expected a thing that this library wrote; got some"):
        fill(tmp_path / "mine", "x", overwrite=True)
    fill(tmp_path / "ours", "x")
    with pytest.raises(FileExistsError, match="overwrite: expected a policy that this library wrote"):
        atomic.check_folder(tmp_path / "ours", "policy", overwrite=True)
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected only what this library wrote; got notes.txt beside it"):
        fill(tmp_path / "ours", "y", overwrite=True)
    (tmp_path / "ours" / "notes.txt").unlink()
    (tmp_path / "ours" / "file").write_text("edited")
    with pytest.raises(FileExistsError, match="expected only what this library wrote; got file"):
        fill(tmp_path / "ours", "y", overwrite=True)


def test_nothing_is_published_before_it_is_on_disk(tmp_path, monkeypatch, renames) -> None:
    """Every file and subfolder of the new folder is synced before the rename, and the parent folder after it."""
    events: list[str] = []
    rename, sync = Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    if renames == "renameat2":
        real = atomic._renameat2
        monkeypatch.setattr(atomic, "_renameat2", lambda *a: (events.append("rename"), real(*a))[1])
    fill(tmp_path / "place", "x")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    work = next(path for path in before if path.endswith(atomic.UNFINISHED))
    synced = {path.removeprefix(work) for path in before}
    assert synced == {"", "/file", "/deep", "/deep/file", f"/{manifest.NAME}"} and str(tmp_path) in after


def killed_at(line: int, place: Path) -> bool:
    """Replace the folder in a process killed after `line` lines of the writing code; return whether it was killed."""
    process = os.fork()
    if process == 0:
        left = line

        def trace(frame, event, argument):
            nonlocal left
            if Path(frame.f_code.co_filename).name in ("atomic.py", "manifest.py"):
                left -= event == "line"
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace
            return None

        sys.settrace(trace)
        with atomic.atomic_folder(place, KIND, overwrite=True) as work:
            (work / "file").write_text("new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0


def test_a_kill_at_any_line_loses_nothing(tmp_path, renames) -> None:
    """The path holds the complete old or new folder, at once or after the next writer's recovery."""
    place, seen, killed, line = tmp_path / "place", [], True, 0
    while killed:
        with atomic.atomic_folder(place, KIND, overwrite=place.exists()) as work:
            (work / "file").write_text("old")
        killed = killed_at(line, place)
        assert renames == "two renames" or place.is_dir(), "exchanged in one step"
        atomic.remove_leftovers(tmp_path)
        manifest.verify(place)
        seen.append((place / "file").read_text())
        assert [name for name in names(tmp_path) if not name.endswith(lock.NAME)] == ["place"]
        line += 3
    assert line > 100 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_leftovers_are_removed_and_replaced_ones_put_back(tmp_path, caplog) -> None:
    for name in (".a.12345678.nlhf-unfinished", ".b.abcdefgh.nlhf-replaced", ".c.abcdefgh.nlhf-removed", ".a.12345678"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "a", "x")
    assert names(tmp_path) == [".a.12345678", ".b.abcdefgh.nlhf-replaced", ".c.abcdefgh.nlhf-removed", "a"]
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".a.12345678", "a", "b"] and "b: put back" in caplog.text


def test_removal_is_by_a_new_name_first(tmp_path, monkeypatch) -> None:
    fill(tmp_path / "place", "x")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path: None)
    atomic.remove(tmp_path / "place")
    (left,) = names(tmp_path)
    assert left.startswith(".place.") and left.endswith(atomic.REMOVED) and (tmp_path / left / "file").exists()


@pytest.mark.parametrize("kind", ["byte", "shorter", "missing", "manifest"])
def test_damage_is_found_and_named(tmp_path, kind) -> None:
    fill(tmp_path / "place", "some text")
    file = tmp_path / "place" / ("file" if kind != "manifest" else manifest.NAME)
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if kind == "shorter" else content)
    expected = {"byte": "CRC-32", "shorter": "expected 9 bytes", "missing": "it is missing", "manifest": "the list"}[
        kind
    ]
    with pytest.raises(manifest.DamagedError, match=f"place/{file.name}: .*{expected}"):
        manifest.verify(tmp_path / "place")


def test_files_keep_mode_and_are_replaced_whole(tmp_path) -> None:
    atomic.write_atomic(tmp_path / "text", "one")
    (tmp_path / "touched").touch()
    assert (tmp_path / "text").stat().st_mode == (tmp_path / "touched").stat().st_mode
    (tmp_path / "text").chmod(0o400)
    atomic.write_atomic(tmp_path / "text", "two")
    with pytest.raises(TypeError):
        atomic.write_atomic(tmp_path / "text", 3)  # type: ignore[arg-type]
    assert (tmp_path / "text").read_text() == "two"
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o400
    assert names(tmp_path) == ["text", "touched"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_keep_their_owner(tmp_path) -> None:
    atomic.write_atomic(tmp_path / "text", "one")
    os.chown(tmp_path / "text", 12, 34)
    atomic.write_atomic(tmp_path / "text", "two")
    assert ((tmp_path / "text").stat().st_uid, (tmp_path / "text").stat().st_gid) == (12, 34)


def test_streams_are_written_to_and_stay_what_they_are(tmp_path, capsys) -> None:
    atomic.write_atomic("-", "one ")
    atomic.write_atomic("/dev/stdout", "two")
    assert capsys.readouterr().out == "one two"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(pipe.read_text()))
    reader.start()
    atomic.write_atomic(pipe, "through")
    reader.join()
    assert said == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    atomic.write_atomic("/dev/null", "nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_atomic("/dev/full", "nothing")
    with (tmp_path / "file").open("w") as file:
        file.write("before ")
        file.flush()
        inode = os.fstat(file.fileno()).st_ino
        atomic.write_atomic(f"/dev/fd/{file.fileno()}", "after")
        assert (tmp_path / "file").stat().st_ino == inode and (tmp_path / "file").read_text() == "before after"
    for path, message in ((tmp_path, "got a folder"), (tmp_path / "no" / "where", "there is no")):
        with pytest.raises(OSError, match=message):
            atomic.check_file(path)


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(1 << 21)),
    "torch": lambda path: torch.save(torch.zeros(1 << 19), path),
    "safetensors": lambda path: pytest.importorskip("safetensors.torch").save_file({"x": torch.zeros(1 << 19)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_sentence(tmp_path, writer) -> None:
    """The error is one line. A limit on file sizes simulates the full disk without root."""
    fill(tmp_path / "place", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(atomic.WriteError, match=r"place: cannot be written: .* MiB are free there; make room or ch"),
            atomic.atomic_folder(tmp_path / "place", KIND, overwrite=True) as work,
        ):
            WRITERS[writer](work / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["place"] and (tmp_path / "place" / "file").read_text() == "old"


def test_other_errors_stay_what_they_are(tmp_path) -> None:
    with pytest.raises(OSError, match="odd") as caught, atomic.atomic_folder(tmp_path / "place", KIND):
        raise OSError(errno.EIO, "odd")
    assert caught.value.errno == errno.EIO and names(tmp_path) == []


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the folder's lock; yield its process id."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        with lock.lock_folder(tmp_path):
            os.write(write, b"held")
            signal.pause()
    assert os.read(read, 4) == b"held"
    yield process
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_one_writer_at_a_time(tmp_path, holder, caplog) -> None:
    message = rf"expected a place that no other run writes to; process {holder} on .* since .* holds it"
    with pytest.raises(lock.InUseError, match=message), lock.lock_folder(tmp_path):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    with lock.lock_folder(tmp_path):
        assert f"taking over from process {holder}" in caplog.text
        with lock.lock_folder(tmp_path), lock.lock_place(tmp_path / "x"):  # reentrant, and covers paths inside
            assert names(tmp_path) == [lock.NAME]
    assert names(tmp_path) == []


@pytest.mark.parametrize("alive", [True, False])
def test_another_machines_lock(tmp_path, monkeypatch, caplog, alive) -> None:
    """Without flock between machines, the lock file's modification time tells whether its holder is alive."""
    path = tmp_path / lock.NAME
    path.write_text('{"pid": 7, "host": "elsewhere", "boot": "x", "started": "then", "command": "train"}')
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    ended = threading.Event()
    renewer = threading.Thread(target=lambda: [os.utime(path) for _ in range(100) if not ended.wait(0.02)])
    if alive:
        renewer.start()
        message = r"process 7 on elsewhere since then \(train\) holds it"
        with pytest.raises(lock.InUseError, match=message), lock.lock_folder(tmp_path):
            pass
        ended.set()
        renewer.join()
    else:
        with lock.lock_folder(tmp_path):
            assert "taking over from process 7 on elsewhere" in caplog.text


def test_a_lock_without_flocks_is_still_a_file(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "RENEWAL", 0.01)
    with lock.lock_folder(tmp_path):
        first = (tmp_path / lock.NAME).stat().st_mtime_ns
        threading.Event().wait(0.2)
        assert (tmp_path / lock.NAME).stat().st_mtime_ns > first, "renewed"
    assert names(tmp_path) == []
