"""Compile the CUDA sources with g++ against the emulated runtime of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def _compile(folder: Path, jobs: list[tuple[Path, list[str]]]) -> list[str]:
    """Compile (source, extra flags) pairs in parallel and return the objects."""
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulation is compiled by g++, which is not installed")

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, flags = job
        target = str(folder / (source.name + ".o"))
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        include = ["-I", str(HERE)]  # before the system's, so that <cuda_runtime.h> is the emulated one
        _run(["g++", "-std=c++17", "-fPIC", *warnings, *include, *flags, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, jobs))


def _kernels() -> list[Path]:
    return sorted(SOURCES.glob("*/*_cuda.cu"))


def build_module(folder: Path) -> Path:
    """Build `_cuda` over the emulated runtime, with the kernels of planted.cpp and the emulator's switches."""
    pybind11 = pytest.importorskip("pybind11")
    bindings = ["-O0", "-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"], "-fvisibility=hidden"]
    bindings += ['-DNLHF_CUDA_ARCHITECTURES="none"', '-DNLHF_COMPILER="g++"']
    jobs = [(SOURCES / "bindings_cuda.cpp", bindings)]  # the slowest first
    jobs += [(source, ["-O1", "-g"]) for source in [*_kernels(), HERE / "emulator.cpp", HERE / "planted.cpp"]]
    module = folder / "_cuda.so"
    # -Bsymbolic: calls bind to the emulated runtime even where another loaded library has functions of the same name
    _run(["g++", "-shared", "-Wl,-Bsymbolic", "-o", str(module), *_compile(folder, jobs)])
    return module


def build_sanitized(folder: Path) -> Path:
    """Build sanitized_main.cpp over all kernels with AddressSanitizer and UndefinedBehaviorSanitizer."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    objects = _compile(folder, [(probe, SANITIZERS)])
    link_probe = ["g++", *SANITIZERS, *objects, "-o", str(folder / "probe")]
    if subprocess.run(link_probe, capture_output=True).returncode != 0:
        pytest.skip("this g++ has no sanitizer runtimes")
    sources = [*_kernels(), HERE / "emulator.cpp", HERE / "sanitized_main.cpp"]
    objects = _compile(folder, [(source, [*SANITIZERS, "-O1", "-g"]) for source in sources])
    program = folder / "sanitized"
    _run(["g++", *SANITIZERS, "-o", str(program), *objects])
    return program
