"""The build: modules left out with a reason, no instruction above its level, nothing of torch linked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nlhf_kernels.core import capabilities
from tests.support.backends import SIMD_LEVELS

ROOT = Path(__file__).resolve().parent.parent
needs_build_tools = pytest.mark.skipif(
    not (shutil.which("c++") and capabilities.build_facts().get("_cpu", {}).get("built")),
    reason="no C++ compiler, or the package was not built here",
)
KERNEL_SOURCES = sorted((ROOT / "csrc").glob("*/*_cpu.cpp"))
LEVEL_FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def run_setup(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Build a copy of the source in place; return setup.py's output and the build record."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "tests", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    return result, json.loads((copy / "nlhf_kernels" / "_native_build.json").read_text())


def path_without(tmp_path: Path, *programs: str) -> str:
    """Return a PATH of links to all programs except those named."""
    folder = tmp_path / "path"
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*") if Path(directory).is_dir() else ():
            link = folder / program.name
            if program.name not in programs and not link.exists() and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


COMPILERS = ("c++", "g++", "gcc", "cc", "clang++", "clang", "c99", "c89")
COMPILERS += tuple(f"x86_64-linux-gnu-{name}" for name in COMPILERS)
COMPILERS += tuple(f"{name}-{version}" for name in COMPILERS for version in range(8, 20))


@needs_build_tools
def test_without_a_compiler_the_package_installs_and_says_how_to_get_one(tmp_path) -> None:
    result, facts = run_setup(tmp_path, PATH=path_without(tmp_path, *COMPILERS), CXX="", CUDACXX="")
    assert result.returncode == 0, result.stderr
    for module in ("_cpu", "_cuda"):
        assert not facts[module]["built"]
        assert "no c++ found: install a C++17 compiler" in facts[module]["reason"]
        assert f"{module} is left out" in result.stderr
    check = (  # an editable install of this repository must not lend the copy its modules
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "import nlhf_kernels, torch; print(nlhf_kernels.explain('row_uniforms', *[torch.arange(1)] * 3))"
    )
    check_run = subprocess.run([sys.executable, "-c", check], cwd=tmp_path / "source", capture_output=True, text=True)
    assert "apt install g++" in check_run.stdout, check_run.stderr
    assert "-> torch" in check_run.stdout


@needs_build_tools
def test_broken_nvcc_leaves_the_cpu_module_alone(tmp_path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc fatal : it is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    result, facts = run_setup(tmp_path, CUDACXX=str(broken))
    assert result.returncode == 0, result.stderr
    assert facts["_cpu"] == {"built": True}
    assert not facts["_cuda"]["built"]
    assert "configuring _cuda failed" in facts["_cuda"]["reason"]


@needs_build_tools
def test_output_in_another_encoding_is_no_reason_to_fail(tmp_path) -> None:
    """The compiler prints Latin-1 and the terminal is ASCII; the build still succeeds."""
    broken = tmp_path / "c++"
    broken.write_bytes(b"#!/bin/sh\nprintf 'erreur: entr\\351e \\303\\251 \\377\\n' >&2\nexit 1\n")
    broken.chmod(0o755)
    result, facts = run_setup(tmp_path, CXX=str(broken), PYTHONIOENCODING="ascii", CUDACXX="")
    assert result.returncode == 0, result.stderr
    assert not facts["_cpu"]["built"] and "configuring _cpu failed" in facts["_cpu"]["reason"]
    assert "entr\\xe9e \\xe9 \\xff" in result.stdout


@needs_build_tools
def test_stale_module_does_not_survive_a_build_that_leaves_it_out(tmp_path) -> None:
    shutil.copytree(ROOT / "nlhf_kernels", tmp_path / "nlhf_kernels")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    assert list((tmp_path / "nlhf_kernels").glob("_cpu*.so"))
    environment = {**os.environ, "PATH": path_without(tmp_path, *COMPILERS), "CXX": "", "CUDACXX": ""}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, env=environment, check=True
    )
    assert not list((tmp_path / "nlhf_kernels").glob("_c*.so"))


@pytest.mark.skipif(not shutil.which("c++") or not shutil.which("nm"), reason="no c++ or nm")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="levels exist on x86-64 only")
@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("source", KERNEL_SOURCES, ids=lambda path: path.stem)
def test_no_symbol_of_a_level_can_be_merged_with_anothers(source, level, tmp_path) -> None:
    """No weak symbols: the linker could keep the AVX-512 copy, which crashes on CPUs without AVX-512."""
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", f"-DNLHF_LEVEL={level}"]
    target = tmp_path / "kernel.o"
    subprocess.run(["c++", *flags, *LEVEL_FLAGS[level], "-c", str(source), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    mergeable_symbols = [
        line for line in symbols.splitlines() if line[17:18] in "WVuT" and f"nlhf::{level}::" not in line
    ]
    mergeable_symbols = [line for line in mergeable_symbols if "typeinfo" not in line and "vtable" not in line]
    assert not mergeable_symbols, "\n".join(mergeable_symbols)


@pytest.mark.skipif(not shutil.which("ldd"), reason="no ldd")
@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_modules_link_neither_torch_nor_the_driver(module) -> None:
    if reason := capabilities.native_missing(module):
        pytest.skip(reason)
    linked_libraries = subprocess.run(
        ["ldd", capabilities.native(module).__file__], capture_output=True, text=True
    ).stdout
    for library in ("libtorch", "libc10", "libcuda.so", "libcudart"):
        assert library not in linked_libraries, linked_libraries


def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    if reason := capabilities.native_missing("_cpu"):
        pytest.skip(reason)
    code = (
        "import torch, nlhf_kernels; from nlhf_kernels.core import capabilities; capabilities.native('_cpu');"
        "a = torch.tensor(1), torch.arange(10**5), torch.tensor(2); nlhf_kernels.row_uniforms(*a, backend='cpu');"
        "torch.rand(10**6).exp();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]}, sep='\\n')"
    )
    mapped_files = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    runtimes = [path for path in mapped_files if "libgomp" in path or "libomp" in path or "libiomp" in path]
    assert len(runtimes) == 1, runtimes
