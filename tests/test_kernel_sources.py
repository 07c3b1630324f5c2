"""What a GPU would refuse or compute wrongly, read off the kernels' sources: offsets beyond 2^31, grids, captures."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = sorted((ROOT / "csrc").rglob("*.cu*")) + sorted((ROOT / "csrc").rglob("*cuda*.cpp"))
TRITON = sorted((ROOT / "nlhf_kernels").rglob("*triton*.py"))
#: Kernels whose axis 0 does not count rows of a vocabulary -> what it counts.
OTHER_AXES = {
    ("decode_linear", "product_kernel"): "columns of a weight",
    ("decode_linear", "sum_kernel"): "results of a decoding step's few rows",
}
#: Calls that a graph's capture refuses, or that wait for the device.
REFUSED = re.compile(
    r"\bcuda(Malloc\w*|Free\w*|HostAlloc|HostRegister|Memcpy|Memset|(Device|Stream|Event)Synchronize|"
    r"(Stream|Event)Query|DeviceReset|SetDevice)\s*\("
)
BAD_CUDA = ["cudaMalloc(&p, n);", "cudaMemset(p, 0, n);", "cudaStreamSynchronize(s);", "int row = blockIdx.y;"]
BAD_TRITON = [
    "row = tl.program_id(0)\n    tl.load(x + row * stride)",
    "program = tl.program_id(0)\n    row = program // tiles\n    tl.load(x + row * stride)",
    "row, part = tl.program_id(0), tl.program_id(1)\n    tl.load(x + stride * row)",
    "tl.load(x + tl.program_id(0) * 4096 + tl.arange(0, 4096))",
]


def cuda_faults(source: str) -> list[str]:
    """Return the lines with a call that a capture refuses, or with a grid whose second dimension ends at 65,535."""
    lines = [line.partition("//")[0] for line in source.splitlines()]
    return [line.strip() for line in lines if REFUSED.search(line) or re.search(r"(blockIdx|gridDim)\.[yz]", line)]


def narrow_products(function: ast.FunctionDef) -> list[str]:
    """Return the products with a program's 32-bit number of axis 0, which counts rows: they overflow at 2^31.

    A remainder is as small as its divisor, and `.to(tl.int64)` widens.
    """
    narrow: set[str] = set()

    def is_narrow(node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return ast.unparse(node) in ("tl.program_id(0)", "tl.program_id(axis=0)")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
            return is_narrow(node.left)
        return isinstance(node, ast.Name) and node.id in narrow

    found = []
    for node in ast.walk(function):  # breadth first: the statements of a body in order, before what they contain
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                narrow |= {name.id for name, value in pairs if isinstance(name, ast.Name) and is_narrow(value)}
    for node in ast.walk(function):
        is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        if is_product and (is_narrow(node.left) or is_narrow(node.right)):
            found.append(ast.unparse(node))
    return found


def kernels(source: str) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [each for each in functions if any("triton.jit" in ast.unparse(mark) for mark in each.decorator_list)]


@pytest.mark.parametrize("path", CUDA, ids=lambda path: path.name)
def test_cuda_sources_hold_nothing_that_a_capture_or_a_large_grid_refuses(path) -> None:
    assert not cuda_faults(path.read_text())


def test_no_launch_goes_unchecked() -> None:
    """Every launch's status is returned or assigned."""
    for path in CUDA:
        for line in path.read_text().splitlines():
            if re.search(r"(?<![\w.>])launch\(", line) and "template" not in line and "cudaError_t launch" not in line:
                assert re.search(r"return launch\(|= launch\(|^void launch\(|^  +launch\(\"", line), (
                    f"{path.name}: {line}"
                )
            assert "<<<" not in line.partition("//")[0], f"{path.name}: {line}"


@pytest.mark.parametrize("path", TRITON, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_triton_offsets_of_rows_are_64_bits_wide(path) -> None:
    counted = [each for each in kernels(path.read_text()) if (path.parent.name, each.name) not in OTHER_AXES]
    assert {kernel.name: found for kernel in counted if (found := narrow_products(kernel))} == {}


def test_the_sources_are_found() -> None:
    assert len(CUDA) > 10 and len(TRITON) > 8 and sum(len(kernels(path.read_text())) for path in TRITON) > 40


@pytest.mark.parametrize("source", BAD_CUDA)
def test_a_faulty_cuda_source_is_found(source) -> None:
    assert cuda_faults(source) == [source]


@pytest.mark.parametrize("body", BAD_TRITON)
def test_a_narrow_offset_is_found(body) -> None:
    source = f"@triton.jit\ndef kernel(x, stride, tiles):\n    {body}\n"
    assert [narrow_products(kernel) for kernel in kernels(source)] != [[]]
