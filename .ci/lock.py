"""Write .ci/locks/*.txt: the packages that CI and the Makefile install, with versions and file hashes.

    make lock        runs this script, with uv in a separate environment

constraints.txt lists the tested versions; the locks add their dependencies. The locks are for CPython 3.11 on Linux
x86-64.

    torch-cpu.txt    PyTorch's CPU build, for machines whose pip is configured to find it beside the index
    torch.txt        for all other machines: PyTorch from the index, and the CUDA libraries that it needs
    all.txt          the other packages that `make` installs
    newest.txt       the packages that `make test-newest` adds, except the newest transformers
    runtime.txt      the package's dependencies except PyTorch, for the installation from the sdist
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
    return {re.split(r"[\[=]", block)[0]: block.splitlines() for block in blocks if block.strip()}


def local_torch(lines: list[str]) -> Locked:
    """Return the build of torch that this machine's pip prefers to the index's; empty if there is none."""
    pin = lines[0].removesuffix("\\").strip()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    result = subprocess.run([*command, "--report", "-", pin], check=True, capture_output=True, text=True)
    (install,) = json.loads(result.stdout)["install"]
    version = install["metadata"]["version"]
    digest = install["download_info"]["archive_info"]["hashes"]["sha256"]
    if not version.endswith("+cpu"):
        return {}
    return {"torch": [f"torch=={version} \\", f"    --hash=sha256:{digest}"]}


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
    torch = {package: lines for package, lines in everything.items() if package == "torch" or CUDA_ONLY.match(package)}
    if local := local_torch(torch["torch"]):
        write("torch-cpu.txt", local)
    else:
        print(".ci/locks/torch-cpu.txt: left as it is, the pip of this machine has no such build")
    write("torch.txt", torch)
    write("all.txt", without(everything, torch))
    write("newest.txt", without(resolve(*packages, *NEWEST), everything))
    write("runtime.txt", without(resolve(*RUNTIME), torch))


if __name__ == "__main__":
    main(sys.argv[1:])
