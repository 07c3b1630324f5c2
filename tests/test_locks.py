"""The locks that CI and `make` install from: the versions of constraints.txt, and hashes for every package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / ".ci" / "locks"
pytestmark = pytest.mark.files


def pins(text: str) -> dict[str, str]:
    """Return {package: version} of a lock or of constraints.txt, for Python 3.11."""
    lines = [line for line in text.splitlines() if "python_version <" not in line]
    pairs = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", "\n".join(lines), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_locks_hold_the_versions_of_constraints() -> None:
    tested = pins((ROOT / "constraints.txt").read_text())
    locked = {name: pins((LOCKS / f"{name}.txt").read_text()) for name in ("all", "torch", "newest", "runtime")}
    everything = {**locked["all"], **locked["torch"], **locked["newest"]}
    differing = {name: (version, everything.get(name)) for name, version in tested.items() if name != "uv"}
    assert all(version == other for version, other in differing.values()), f"run `make lock`: {differing}"
    assert locked["runtime"].items() <= locked["all"].items()
    assert not locked["all"].keys() & locked["torch"].keys()
    assert pins((LOCKS / "torch-cpu.txt").read_text()) == {"torch": tested["torch"] + "+cpu"}


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_package_has_hashes(path) -> None:
    text = path.read_text()
    blocks = re.split(r"^(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pins(text)) > 0
    for block in blocks:
        pin, *hashes = block.rstrip("\n").split(" \\\n")
        assert hashes and all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes), pin
    assert "://" not in text, "no addresses: pip's own settings say where packages come from"


def test_the_makefile_installs_what_the_locks_were_made_for() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (installed,) = re.findall(r"^INSTALLED := (.*)$", makefile, re.MULTILINE)
    locked = {**pins((LOCKS / "all.txt").read_text()), **pins((LOCKS / "torch.txt").read_text())}
    assert set(installed.split()) <= locked.keys()
