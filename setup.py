"""Build the native modules with CMake; CMakeLists.txt holds the build rules.

Each module is built separately. If one cannot be built, it is left out, and the reason is printed here and kept in
`nlhf_kernels/_native_build.json` for `nlhf-kernels info`; the package then works through PyTorch and Triton.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HOW_TO_GET = {
    "ninja": "pip install ninja",
    "cmake": "install CMake 3.22 or newer (pip install cmake)",
    "c++": "install a C++17 compiler (Debian, Ubuntu: apt install g++; or point CXX at one)",
    "nvcc": "install the CUDA toolkit, 12.8 or newer for sm_100 and sm_120 (or point CUDACXX at its nvcc)",
}


class CannotBuild(Exception):
    """A native module cannot be built here; the message is for the user."""


def find(program: str, *candidates: str | None) -> str:
    """Return the first of `candidates` that exists, looking beside this Python first, as in a virtual environment."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for candidate in filter(None, candidates):
        if found := shutil.which(candidate, path=path):
            return found
    raise CannotBuild(f"no {program} found: {HOW_TO_GET[program]}")


def run(step: str, command: list[str]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    result = subprocess.run(command, encoding="utf-8", errors="backslashreplace", **pipes)  # of any compiler
    print(result.stdout.encode("ascii", "backslashreplace").decode())  # for any terminal
    if result.returncode:
        raise CannotBuild(f"{step} failed: {first_error(result.stdout)}")


def first_error(output: str) -> str:
    """Return the first error line of a tool's output and the line after it, where CMake names the failure."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if "error" in line.lower() or "not found" in line.lower():
            return " ".join(lines[index : index + 3])[:400]
    return " ".join(lines[-3:])[:400]


class BuildNative(build_ext):
    def run(self) -> None:
        in_source = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "nlhf_kernels" if in_source else Path(self.build_lib).resolve() / "nlhf_kernels"
        package.mkdir(parents=True, exist_ok=True)
        facts = {}
        for module in ("_cpu", "_cuda"):
            for stale in package.glob(f"{module}.*.so"):
                stale.unlink()  # never keep a module built from other sources
            try:
                self.build_module(module, package)
                facts[module] = {"built": True}
            except CannotBuild as reason:
                facts[module] = {"built": False, "reason": str(reason)}
                print(f"nlhf_kernels: {module} is left out: {reason}", file=sys.stderr)
        (package / "_native_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_module(self, module: str, package: Path) -> None:
        cmake = find("cmake", "cmake")
        find("c++", os.environ.get("CXX"), "c++", "g++", "clang++")
        if module == "_cuda":
            find("nvcc", os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
        build = Path(self.build_temp).resolve() / module
        shutil.rmtree(build, ignore_errors=True)  # CMake would trust a cache from another compiler or Python
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DNLHF_MODULE={module.lstrip('_')}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"]
        with contextlib.suppress(CannotBuild):  # without ninja, CMake uses make
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja', 'ninja')}"]
        run(f"configuring {module}", configure)
        run(f"compiling {module}", [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])

    def get_outputs(self) -> list[str]:
        return []  # built files are found in build_lib, not by the extensions' names


modules = [Extension(f"nlhf_kernels.{name}", sources=[], optional=True) for name in ("_cpu", "_cuda")]
setup(ext_modules=modules, cmdclass={"build_ext": BuildNative})
