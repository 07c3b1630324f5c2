"""Every op and backend on a GPU: accurate at real sizes, equal inside a captured graph, without synchronization.

As in the benchmarks, the error against float64 is bounded by a multiple of PyTorch's error at the same dtype.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch

import nlhf_kernels
from benchmarks.cases import all_cases
from benchmarks.harness.case import Shape
from benchmarks.harness.gate import judge_all
from benchmarks.harness.implementations import collect
from benchmarks.harness.modes import make_problem
from benchmarks.rivals.models import linear_shape
from nlhf_kernels.core import capabilities
from nlhf_kernels.core.registry import ops
from tests.support.backends import DEVICE
from tests.support.gpu import nothing_waits
from tests.test_operators import backward, examples

pytestmark = pytest.mark.gpu
QWEN, SMOL = 151_936, 49_155  # vocabularies; rows of the second are not 16-byte aligned
BOTH, KL = "policy+reference", "policy+reference+kl"


def _logits(tokens: int, vocabulary: int, dtype: str, models: str) -> tuple[str, Shape]:
    return "logprobs", Shape({"tokens": tokens, "length": 64, "vocabulary": vocabulary, "models": models}, dtype)


def _draws(rows: int, vocabulary: int, dtype: str, **filters: float) -> tuple[str, Shape]:
    return "mixture_sample", Shape({"rows": rows, "vocabulary": vocabulary, **filters}, dtype)


def _games(games: int, actions: int, dtype: str = "float32") -> tuple[str, Shape]:
    return "mirror_descent", Shape({"games": games, "actions": actions, "steps": 20}, dtype)


def _product(rows: int, width: int, columns: int, dtype: str, **more: int) -> tuple[str, Shape]:
    return "decode_linear", Shape({"rows": rows, "width": width, "columns": columns, **more}, dtype)


def _attention(rows: int, heads: int, kv_heads: int, positions: int, dim: int, dtype: str) -> tuple[str, Shape]:
    sizes = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "positions": positions, "dim": dim}
    return "decode_attention", Shape(sizes, dtype)


REAL = [
    _draws(32, QWEN, "bfloat16"),
    _draws(33, SMOL, "bfloat16"),
    _draws(32, QWEN, "float32", top_k=50, top_p=0.9),
    _draws(33, SMOL, "bfloat16", top_k=50, top_p=0.9),
    _draws(33, SMOL, "float32", min_p=0.1),
    _logits(512, QWEN, "bfloat16", KL),
    _logits(256, SMOL, "bfloat16", BOTH),
    _logits(256, SMOL, "float32", KL),
    ("linear_logprobs", linear_shape(512, 128, 896, QWEN, "bfloat16")),
    ("linear_logprobs", linear_shape(256, 64, 576, SMOL, "float32", kl="exact")),
    ("nash_pg_loss", linear_shape(512, 128, 896, QWEN, "bfloat16", kl="exact")),
    ("nash_pg_loss", linear_shape(256, 64, 576, SMOL, "float32")),
    ("preference_loss", linear_shape(512, 128, 896, QWEN, "bfloat16")),
    _games(64, 64),
    _games(64, 64, "float64"),
    _games(4, 512),
    _games(2, 2048),
    _product(32, 896, 1152, "bfloat16"),
    _product(33, 577, 4099, "float32"),
    _product(64, 896, 1152, "bfloat16", weights=2),
    _product(66, 577, 4099, "float32", weights=2),
    _attention(32, 14, 2, 192, 64, "bfloat16"),
    _attention(8, 32, 8, 4096, 128, "bfloat16"),
    _attention(8, 28, 4, 1000, 128, "float32"),
    ("row_uniforms", Shape({"rows": 1 << 20}, "float64", modes=("forward",))),
]


@pytest.mark.parametrize(("name", "shape"), [pytest.param(*each, id=f"{each[0]} {each[1].label}") for each in REAL])
def test_every_backend_is_right_at_real_sizes(name, shape) -> None:
    case = all_cases()[name]
    problem = make_problem(case, shape, DEVICE, torch.Generator(DEVICE).manual_seed(1))
    wrong, ran = {}, set()
    for mode in {"forward", "full"} & set(case.modes_at(shape)):
        competitors = collect(case, problem.inputs, mode, (), with_compile=False)
        ours = {each: one for each, one in competitors.items() if each == "eager" or one.kind in ("backend", "variant")}
        for implementation, verdict in judge_all(ours, problem, mode, shape.dtype).items():
            if verdict.status in ("red", "failed"):
                wrong[f"{mode}, {implementation}"] = verdict.reasons
            elif verdict.status == "ok":
                ran.add(implementation)
    assert not wrong
    assert "torch" in ran and ran - {"eager", "torch"}, "a kernel ran beside the oracle"


ON_DEVICE = [
    pytest.param(op.name, backend, id=f"{op.name}-{backend}")
    for op in ops()
    for backend in ("torch", "triton", "cuda")
    if backend not in op.absent
]


def made_calls(op: str, backend: str) -> list[Any]:
    """Return calls of the op's first and last example, without those that the backend refuses."""
    function, made, calls = getattr(nlhf_kernels, op), examples(op), []
    chosen = {"backend": backend} if "backend" in inspect.signature(function).parameters else {}  # else plain PyTorch
    for args, kwargs in (made[0], made[-1]):
        if not nlhf_kernels.explain(op, *args, **kwargs).reasons[backend]:
            calls.append(partial(function, *args, **chosen, **kwargs))
    if not calls:
        pytest.skip(f"{op} on {backend}: no example runs ({capabilities.native_missing('_cuda') or 'refused'})")
    return calls


@pytest.mark.parametrize(("op", "backend"), ON_DEVICE)
def test_a_captured_graph_gives_what_the_call_gave(op, backend) -> None:
    for call in made_calls(op, backend):
        with torch.no_grad():
            expected = call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call()
        for tensor in torch.utils._pytree.tree_leaves(captured):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "backend"), ON_DEVICE)
def test_neither_a_call_nor_its_gradient_waits(op, backend) -> None:
    for call in made_calls(op, backend):
        backward(call())
        with nothing_waits():
            backward(call())
