"""Run the CPU kernels under sanitizers.

    python -m tests.support.sanitized                 `make sanitize`: the CPU backend's tests, under AddressSanitizer
                                                      and UndefinedBehaviorSanitizer
    python -m tests.support.sanitized tests/test_logprobs.py   options and files are passed on to pytest
    python -m tests.support.sanitized --threads       threads_main.cpp under ThreadSanitizer, by clang and its OpenMP

The tests run in a copy of the package and of the tests under build/sanitized, with an instrumented `_cpu`. A finding
ends the process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COPY = ROOT / "build" / "sanitized"
SANITIZERS = "address,undefined"
OPS = (
    "row_uniforms",
    "mixture_sample",
    "logprobs",
    "linear_logprobs",
    "decode_attention",
    "mirror_descent",
    "nash_pg_loss",
)
FILES = (*OPS, "known_calls", "mixture_sample_filters", "logprobs_autograd", "operator_boundary", "fuzz")
# Tests that run code of `_cpu`, but for compilation by Dynamo and ahead of time, which runs the same code.
RUN = "known_calls or cpu or avx or baseline or fuzz or autograd"
SELECTED = f"({RUN}) and not (triton or cuda or compile or opcheck or theorem)"


def build() -> None:
    """Copy the package and its tests, and compile `_cpu` with sanitizers into the copy."""
    for name in ("nlhf_kernels", "tests"):
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", COPY)
    facts = {"_cpu": {"built": True}, "_cuda": {"built": False, "reason": "left out of the build with sanitizers"}}
    (COPY / "nlhf_kernels" / "_native_build.json").write_text(json.dumps(facts))
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])}
    settings = {
        "NLHF_MODULE": "cpu",
        "NLHF_SANITIZE": SANITIZERS,
        "CMAKE_BUILD_TYPE": "None",
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(COPY / "nlhf_kernels"),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    build = COPY / "cmake"
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *options], check=True, env=environment)
    subprocess.run(["cmake", "--build", str(build), "--parallel", "2"], check=True, env=environment)


def sanitized_environment() -> dict[str, str]:
    """Return the environment for a Python that loads the instrumented `_cpu`.

    The sanitizer's runtime must be loaded first, and the C++ library before any exception is thrown through it. The
    leak check is off, since it would report memory that Python and PyTorch keep until the end of the process.
    """
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(COPY),
        "PYTHONMALLOC": "malloc",
    }


def check_threads() -> int:
    """Build and run threads_main.cpp under ThreadSanitizer.

    The sanitizer must know OpenMP's synchronisation, or it reports accesses ordered by a barrier as races. GCC's
    libgomp does not report it; clang's libomp does through Archer, a tool library that comes with it.
    """
    archer = sorted(Path("/usr/lib").glob("llvm-*/lib/libarcher.so"))
    if not shutil.which("clang++") or not archer:
        print("needs clang++, its sanitizers and libomp with Archer (Debian: clang, libclang-rt-14-dev, libomp-dev)")
        return 1
    folder = COPY / "threads"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc").glob("*/*_cpu.cpp")), ROOT / "csrc" / "common" / "levels.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-fopenmp", "-march=native", "-DNLHF_LEVEL=baseline"]
    program = folder / "threads"
    main_source = ROOT / "tests" / "support" / "threads_main.cpp"
    subprocess.run(["clang++", *flags, *map(str, [*sources, main_source]), "-o", str(program)], check=True)
    environment = {
        **os.environ,
        "OMP_TOOL_LIBRARIES": str(archer[-1]),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",  # libomp's own memory
    }
    return subprocess.run([str(program)], env=environment).returncode


def main(arguments: list[str]) -> int:
    if arguments == ["--threads"]:
        return check_threads()
    build()
    environment = sanitized_environment()
    check = (
        "import torch\n"
        "from nlhf_kernels.core import capabilities\n"
        "cpu = capabilities.native('_cpu')\n"
        f"assert cpu.__file__.startswith({str(COPY)!r}), cpu.__file__\n"
        f"assert cpu.build_info()['sanitizers'] == {SANITIZERS!r}, cpu.build_info()\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=COPY, env=environment)
    files = [f"tests/test_{name}.py" for name in FILES]
    chosen = (
        ["-k", SELECTED, "--fuzz-seconds", "60", "--fuzz-backends", "cpu", *files]
        if not any(argument.endswith(".py") for argument in arguments)
        else []
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *arguments]
    return subprocess.run(command, cwd=COPY, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
