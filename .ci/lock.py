"""Write .ci/locks/*.txt: what CI and the Makefile install, each package with its version and the hashes of its files.

    make lock        runs this, with uv in an environment of its own

constraints.txt says which versions are tested; the locks add what these depend on. They are made for CPython 3.11 on
Linux x86-64.

    all.txt          what `make` installs
    cuda.txt         what PyTorch's CUDA build needs beside; installed where torch is that build
    newest.txt       what `make test-newest` adds, but for the newest transformers
    runtime.txt      what the package itself needs: for the installation from the sdist

torch has the hashes of the index's files and of the file that this machine's pip takes, where that is another build.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / ".ci" / "locks"
CUDA_ONLY = re.compile(r"(nvidia|cuda)-")
RUNTIME = ("torch", "numpy", "rich")  # `dependencies` of pyproject.toml
NEWEST = ("trl", "requests")
TARGET = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")

Locked = dict[str, list[str]]  # package -> the lines of its pin and its hashes


def resolve(*packages: str) -> Locked:
    with tempfile.TemporaryDirectory() as folder:
        requirements, output = Path(folder, "requirements.in"), Path(folder, "requirements.txt")
        requirements.write_text("\n".join(packages) + "\n")
        options = ("--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-strip-extras")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *options, *TARGET]
        command += ["--constraints", str(ROOT / "constraints.txt"), "--output-file", str(output), str(requirements)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        blocks = re.split(r"^(?=\S)", output.read_text(), flags=re.MULTILINE)
    locked = {re.split(r"[\[=]", block)[0]: block.splitlines() for block in blocks if block.strip()}
    if "torch" in locked:
        add_hash_of_this_machine(locked["torch"])
    return locked


def add_hash_of_this_machine(lines: list[str]) -> None:
    pin = lines[0].removesuffix("\\").strip()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    result = subprocess.run([*command, "--report", "-", pin], check=True, capture_output=True, text=True)
    (install,) = json.loads(result.stdout)["install"]
    digest = "--hash=sha256:" + install["download_info"]["archive_info"]["hashes"]["sha256"]
    if not any(digest in line for line in lines):
        lines[-1] += " \\"
        lines.append(f"    {digest}")


def write(name: str, locked: Locked) -> None:
    lines = [line for package in sorted(locked) for line in locked[package]]
    head = "# Made by `make lock` for CPython 3.11 on Linux x86-64; for pip's --require-hashes --no-deps."
    LOCKS.mkdir(exist_ok=True)
    (LOCKS / name).write_text("\n".join([head, *lines]) + "\n")
    print(f".ci/locks/{name}: {len(locked)} packages")


def without(locked: Locked, *others: Locked) -> Locked:
    return {package: lines for package, lines in locked.items() if not any(package in other for other in others)}


def main(packages: list[str]) -> None:
    everything = resolve(*packages)
    cuda = {package: lines for package, lines in everything.items() if CUDA_ONLY.match(package)}
    write("all.txt", without(everything, cuda))
    write("cuda.txt", cuda)
    write("newest.txt", without(resolve(*packages, *NEWEST), everything))
    write("runtime.txt", without(resolve(*RUNTIME), cuda))


if __name__ == "__main__":
    main(sys.argv[1:])
