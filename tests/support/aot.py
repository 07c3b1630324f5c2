"""Compile every Triton kernel for GPUs that are absent: `python -m tests.support.aot [op ...] [--arch 90 ...]`.

Each room's Triton function is called on its examples with a stand-in driver that reports the architecture; the launch
is replaced by Triton's warm-up, which specialises on the real arguments and compiles to machine code. So the kernels
are exactly those that a user's launch would compile, including pointer alignment. Prints one line per kernel. Must run
in a separate process, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import nlhf_kernels
from nlhf_kernels.core.registry import get_op, ops

ARCHITECTURES = (80, 90, 100, 120)
ENGINE_LAYERS = "engine_layers"  # in place of a room's name
#: Shared memory a block may ask for, by architecture (CUDA programming guide, compute capabilities).
MAX_SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}


class StandInDriver:
    """The part of a driver that compilation needs."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def registers(image: bytes) -> str:
    """Return registers and stack of the machine code; a stack means that registers were spilled to memory."""
    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"), None)
    if tool is None:
        return "registers unknown (this triton brings no cuobjdump)"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", report)
    return f"{match[1]} registers, {match[2]} bytes of stack" if match else "registers unknown"


def compile_room(op: str, architecture: int) -> list[str]:
    """Compile every kernel that the room's examples launch; return one line of facts per kernel."""

    def launch_all() -> None:
        for direction, arguments in recorded_backend_calls(op):
            getattr(get_op(op).backend("triton"), direction)(*arguments)

    return compile_launches(op, launch_all, architecture)


def launch_engine_layers() -> None:
    """Launch the kernels of the engine's layers, as steps of Qwen2-0.5B and Qwen2-7B do."""
    from nlhf_kernels.engine.layers import triton_kernels

    for width, mlp, heads, key_heads, head in ((896, 4864, 14, 2, 64), (3584, 18944, 28, 4, 128)):
        for dtype in (torch.bfloat16, torch.float32):
            rows = torch.zeros(2, 1, 2 * mlp, dtype=dtype)
            triton_kernels.rms_norm(rows[..., :width], torch.ones(width, dtype=dtype), 1e-6)
            weight, rest = torch.ones(2, width, dtype=dtype)
            triton_kernels.rms_norm(rows[..., :width], weight, 1e-6, rest, 1)
            triton_kernels.silu_product(*rows.chunk(2, -1))
            product = torch.zeros(2, 1, heads + 2 * key_heads, head, dtype=dtype).transpose(1, 2)
            query, key, value = product.split((heads, key_heads, key_heads), 1)
            triton_kernels.rms_norm(query.transpose(1, 2), torch.ones(head, dtype=dtype), 1e-6)
            _, key = triton_kernels.rotate(query, key, *torch.zeros(2, 2, 1, head, dtype=dtype))
            keys, values = torch.zeros(2, 2, key_heads, 8, head, dtype=dtype)
            triton_kernels.store_slot(keys, values, key, value, torch.zeros(1, dtype=torch.int64))


def compile_launches(label: str, launch_all: Callable[[], None], architecture: int) -> list[str]:
    """Compile every kernel that `launch_all` launches; return one line of facts per kernel."""
    driver.set_active(StandInDriver(architecture))
    lines: list[str] = []

    def compile_only(kernel: jit.JITFunction, grid: object):
        def launch(*args, **kwargs):
            compiled = kernel.warmup(*args, grid=(1,), **kwargs)
            image, shared = compiled.asm["cubin"], compiled.metadata.shared
            assert image, f"{kernel.__name__}: no machine code"
            assert shared <= MAX_SHARED[architecture], f"{kernel.__name__}: {shared} bytes of shared memory"
            aligned = compiled.asm["ttir"].count("tt.divisibility = 16")
            assert aligned, f"{kernel.__name__}: no argument is known to be aligned, unlike in a user's launch"
            lines.append(
                f"{label} {kernel.__name__} sm_{architecture}: {compiled.metadata.num_warps} warps, "
                f"{shared} bytes shared, {aligned} aligned arguments, {registers(image)}"
            )

        return launch

    original, jit.JITFunction.__getitem__ = jit.JITFunction.__getitem__, compile_only
    try:
        launch_all()
    finally:
        jit.JITFunction.__getitem__ = original
    assert lines, f"{label}: launched no Triton kernel"
    return lines


def recorded_backend_calls(op: str) -> list[tuple[str, tuple]]:
    """Return the room's backend calls on each example that Triton accepts: ("run" or "run_backward", arguments).

    An example whose outputs require a gradient is also run backward.
    """
    entry = get_op(op)
    examples = importlib.import_module(f"tests.test_{op}").EXAMPLES
    calls: list[tuple[str, tuple]] = []
    oracle = entry.backend("torch")

    def recording(direction: str):
        original = getattr(oracle, direction)

        def record(*arguments):
            calls.append((direction, arguments))
            return original(*arguments)

        return record

    directions = ("run", "run_backward") if oracle.backward else ("run",)
    oracle.__dict__.update({direction: recording(direction) for direction in directions})
    try:
        for make in examples:
            args, kwargs = make(torch.device("cpu"))
            if not entry.backend("triton").limits(entry.describe(*args, **kwargs)):
                _run_backward(getattr(nlhf_kernels, op)(*args, **kwargs, backend="torch"))
    finally:
        for direction in directions:
            del oracle.__dict__[direction]  # cached properties: resolved again at the next use
    return calls


def _run_backward(outputs: object) -> None:
    """Run backward from the sum of all outputs that require a gradient, if any does."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    sums = [part.sum() for part in parts if isinstance(part, torch.Tensor) and part.requires_grad]
    if sums:
        torch.stack(sums).sum().backward()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    with_triton = [op.name for op in ops() if "triton" not in op.absent and not op.built_on]
    parser.add_argument("op", nargs="*", default=[*with_triton, ENGINE_LAYERS])
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    arguments = parser.parse_args(argv)
    print(f"triton {triton.__version__}")
    for op in arguments.op:
        for architecture in arguments.arch:
            lines = (
                compile_launches(op, launch_engine_layers, architecture)
                if op == ENGINE_LAYERS
                else compile_room(op, architecture)
            )
            print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
