"""The source distribution contains every file of the repository, as its tests and documents read them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {".gitignore"}  # used only in a checkout
MADE = {"PKG-INFO", "setup.cfg"}  # added by setuptools


def git_files(*options: str) -> set[str]:
    """Return the repository's files, without those deleted in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout, or no git")
def test_the_sdist_holds_every_tracked_file_and_nothing_ignored(tmp_path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path), "--formats", "tar"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()} - MADE
    assert not git_files() - packed - LEFT_OUT, "MANIFEST.in leaves them out: include them, or name them in LEFT_OUT"
    assert not packed - git_files("--cached", "--others", "--exclude-standard"), "files that git ignores"
