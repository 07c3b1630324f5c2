"""Facts about the machine of a run, without host names and paths, and the ceilings measured on it."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .results import Floor
from .timing import MIB, Action, Clock, Timing

ROOT = Path(__file__).resolve().parents[2]
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
COMMIT_VARIABLE = "NLHF_BENCHMARK_COMMIT"
DEFAULT_CACHE_BYTES = 64 * MIB
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Ceilings:
    """The device's best rates, measured in this run with the threads in use."""

    copy_bytes_per_s: float
    matmul_flops_per_s: Mapping[str, float]  # dtype -> rate

    def floor_us(self, bytes_moved: float, flops: float, dtype: str) -> tuple[float, str]:
        """Return the least time of a call, and what bounds it."""
        moving = 1e6 * bytes_moved / self.copy_bytes_per_s
        multiplying = 1e6 * flops / self.matmul_flops_per_s[dtype] if flops else 0.0
        return max(moving, multiplying), "bandwidth" if moving >= multiplying else "matmul"

    def floor_of(self, timing: Timing, bytes_moved: float, flops: float, dtype: str) -> Floor:
        """Return the least time of a call, beside the time that it took."""
        floor_us, bound_by = self.floor_us(bytes_moved, flops, dtype)
        return Floor(bytes_moved, flops, floor_us, bound_by, 100 * floor_us / timing.median_us)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parse_size(text: str) -> int:
    """Convert a size such as '491520K' to bytes."""
    text = text.strip()
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text)


def last_level_cache_bytes(device: torch.device, caches: Path = CPU_CACHES) -> int:
    """Return the size of the last-level cache; 64 MiB if the system does not report it."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", DEFAULT_CACHE_BYTES))
    sizes = []
    for folder in caches.glob("index*"):
        try:
            if (folder / "type").read_text().strip() != "Instruction":
                sizes.append(parse_size((folder / "size").read_text()))
        except (OSError, ValueError):
            continue  # a container may hide some of the files
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def machine_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "last_level_cache_bytes": last_level_cache_bytes(device),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def versions() -> dict[str, str | None]:
    result: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    result["cuda"] = torch.version.cuda
    for name in ("triton", "nlhf_kernels"):
        try:
            result[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except ImportError:
            result[name] = None
    return result


def without_paths(text: str) -> str:
    """Replace this machine's folders in a message by placeholders, since results are published."""
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "<python>"), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            text = text.replace(str(folder), name)
    return text


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def source_state() -> tuple[str | None, bool | None]:
    """Return the commit, and whether the tree differs from it (results aside).

    Outside a repository, for example in a copy on a GPU machine, the commit is the one that the environment variable
    names, and whether the tree differs is unknown.
    """
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if commit is None:
        return os.environ.get(COMMIT_VARIABLE) or None, None
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return commit, None if changes is None else bool(changes)


def _fastest_s(action: Action, clock: Clock) -> float:
    """Return the fastest of a few runs: slower ones are disturbed by other load on the machine."""
    samples = [clock.sample_us(action) for _ in range(7)]
    return min(samples[2:]) / 1e6


def _copy_bandwidth(clock: Clock, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=clock.device)
    target = torch.zeros_like(source)
    return 2 * size / _fastest_s(Action(lambda: None, lambda _: target.copy_(source)), clock)


def _matmul_rate(clock: Clock, size: int, dtype: torch.dtype) -> float:
    left = torch.randn(size, size, device=clock.device).to(dtype)
    right = torch.randn(size, size, device=clock.device).to(dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / _fastest_s(Action(lambda: None, lambda _: torch.mm(left, right, out=out)), clock)


def measure_ceilings(device: torch.device, dtypes: Iterable[str], preset: str) -> Ceilings:
    """Measure the copy bandwidth of buffers larger than the last-level cache, and each dtype's square matmul rate."""
    clock = Clock(device, 0)
    if preset == "tiny":
        copied, side = 8 * MIB, 256
    elif device.type == "cuda":
        copied, side = 1024 * MIB, 8192
    else:
        copied, side = min(1024 * MIB, max(256 * MIB, 2 * last_level_cache_bytes(device))), 2048
    rates = {name: _matmul_rate(clock, side, getattr(torch, name)) for name in sorted(set(dtypes))}
    return Ceilings(_copy_bandwidth(clock, copied), rates)
