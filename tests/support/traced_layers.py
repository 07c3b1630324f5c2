"""Trace the engine's layers as torch.compile does: `python -m tests.support.traced_layers`, without TRITON_INTERPRET.

Prints the calls of each layer's graph as JSON, one line a layer; a graph that breaks is an error. Nothing is launched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from nlhf_kernels.engine.layers import triton_kernels


def graph_calls(function: Callable[..., Any], *arguments: torch.Tensor) -> list[str]:
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls.extend(getattr(node.target, "__name__", "") for node in graph.graph.nodes if node.op == "call_function")
        return lambda *inputs: tuple(torch.zeros(1) for node in graph.graph.output_node().args[0])

    torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    return calls


def main() -> None:
    x, weight = torch.zeros(2, 1, 64), torch.ones(64)
    gate, up = torch.zeros(2, 1, 256).chunk(2, -1)
    query, key, value = torch.zeros(2, 1, 6, 16).transpose(1, 2).split((2, 2, 2), 1)
    cos, sin = torch.zeros(2, 2, 1, 16)
    keys, values = torch.zeros(2, 2, 2, 8, 16)
    cursor = torch.zeros(1, dtype=torch.int64)
    layers: dict[str, Callable[[torch.Tensor], Any]] = {
        "rms_norm": lambda x: triton_kernels.rms_norm(x, weight, 1e-6) + 1,
        "silu_product": lambda x: triton_kernels.silu_product(gate, up) + x.sum(),
        "rotate": lambda x: triton_kernels.rotate(query, key, cos, sin)[0] + x.sum(),
        "store_slot": lambda x: (triton_kernels.store_slot(keys, values, key, value, cursor), x + 1)[1],
    }
    with torch.no_grad(), mock.patch("torch.utils._triton.has_triton", return_value=True):
        for name, layer in layers.items():
            print(json.dumps([name, graph_calls(layer, x)]))


if __name__ == "__main__":
    main()
