"""Measure what calls cost the host where launches do nothing: `python -m tests.support.host_cost`, on any machine.

CPU tensors stand in for a GPU's, a driver that launches nothing for Triton's, and a function that does nothing for
`_cuda`'s. Prints microseconds of processor time a call, medians of batches. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver

import nlhf_kernels
from nlhf_kernels.core import calls, capabilities, upstream
from nlhf_kernels.ops.mixture_sample import native
from nlhf_kernels.ops.mixture_sample.op import sample_packed
from tests.support.aot import StandInDriver
from tests.support.launches import Utilities

CPU = torch.device("cpu")
BF16 = torch.bfloat16


class Launcher:
    """Launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class IdleDriver(StandInDriver):
    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0


def stand_in() -> None:
    """Let CPU tensors pass for a GPU's on every backend."""
    driver.set_active(IdleDriver(90))
    upstream.current_raw_stream = lambda index: 0  # type: ignore[assignment]
    capabilities.machine_reasons = lambda name, device: []  # type: ignore[assignment]
    idle = SimpleNamespace(
        mixture_sample=lambda *arguments: None,
        mixture_sample_plan=lambda rows, vocabulary: (1, 8, 8, 1, 1),
        mixture_sample_workspace=lambda *sizes: 65_536,
        mixture_sample_counters=lambda rows: 16 * rows,
    )
    real = capabilities.native
    native.capabilities.native = lambda name: idle if name == "_cuda" else real(name)  # type: ignore[assignment]


def microseconds(call: Callable[[], Any], batches: int, size: int) -> float:
    for _ in range(200):
        call()
    times = []
    for _ in range(batches):
        start = time.process_time_ns()
        for _ in range(size):
            call()
        times.append((time.process_time_ns() - start) / size / 1e3)
    return statistics.median(times)


def samplers() -> dict[str, Callable[[], Any]]:
    counter = {"seed": torch.tensor(11), "row_ids": torch.arange(1), "step": torch.tensor(5)}
    settings = nlhf_kernels.mixture_settings([0.7, 0.3], device=CPU)
    operator = torch.ops.nlhf_kernels.mixture_sample.default
    result: dict[str, Callable[[], Any]] = {}
    for backend, vocabulary in (("triton", 128_256), ("cuda", 128_256), ("cpu", 64)):
        logits = list(torch.zeros(2, 1, vocabulary, dtype=BF16))
        operands = logits, *settings, None, None, *counter.values(), 0, 7, backend
        public = partial(nlhf_kernels.mixture_sample, *logits, **counter, backend=backend)
        result |= {
            f"{backend}: mixture_sample, numbers": partial(public, 0.3),
            f"{backend}: mixture_sample, packed settings": partial(public, settings=settings),
            f"{backend}: operator": partial(operator, *operands),
            f"{backend}: sample_packed": partial(
                sample_packed, logits, settings, **counter, logprob_mask=7, backend=backend
            ),
        }
    return result


def steps() -> dict[str, Callable[[], Any]]:
    """Return what layers of Qwen2-0.5B call in a step of 8 rows."""
    from nlhf_kernels.engine.layers import triton_kernels

    x, weight = torch.zeros(8, 1, 896, dtype=BF16), torch.ones(896, dtype=BF16)
    gate, up = torch.zeros(8, 1, 2 * 4864, dtype=BF16).chunk(2, -1)
    query, key, value = torch.zeros(8, 1, 18, 64, dtype=BF16).transpose(1, 2).split((14, 2, 2), 1)
    cos, sin = torch.zeros(2, 8, 1, 64, dtype=BF16)
    keys, values = torch.zeros(2, 8, 2, 256, 64, dtype=BF16)
    cursor, ends = torch.zeros(1, dtype=torch.int64), torch.full((8,), 100)
    contiguous, rows, wide = query[:, :, 0].contiguous(), x[:, 0], torch.zeros(1152, 896, dtype=BF16)
    return {
        "rms_norm": lambda: triton_kernels.rms_norm(x, weight, 1e-6),
        "silu_product": lambda: triton_kernels.silu_product(gate, up),
        "rotate": lambda: triton_kernels.rotate(query, key, cos, sin),
        "store_slot": lambda: triton_kernels.store_slot(keys, values, key, value, cursor),
        "decode_attention": lambda: nlhf_kernels.decode_attention(
            contiguous, keys, values, ends=ends, backend="triton"
        ),
        "decode_linear": lambda: nlhf_kernels.decode_linear(rows, wide, backend="triton"),
    }


def floors() -> dict[str, Callable[[], Any]]:
    """Return what no call of the sampler can do without."""
    library = torch.library.Library("nlhf_host_cost", "FRAGMENT")
    floors.library = library  # type: ignore[attr-defined]  # its operators live as long as it does
    schema = str(torch.ops.nlhf_kernels.mixture_sample.default._schema).partition("(")[2]
    library.define(f"nothing({schema}")
    results = (
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(3, 1, dtype=torch.float32),
        torch.zeros(1, dtype=torch.bool),
    )
    library.impl("nothing", lambda *operands: results, "CPU")
    operator = torch.ops.nlhf_host_cost.nothing.default
    logits, one = list(torch.zeros(2, 1, 64, dtype=BF16)), torch.tensor(1)
    operands = logits, torch.zeros(1, 6, dtype=torch.float32), False, None, None, one, torch.arange(1), one, 0, 7, ""
    allocate = upstream.allocator(CPU)
    return {
        "an operator of the sampler's schema that returns ready tensors": partial(operator, *operands),
        "torch.empty": partial(torch.empty, 1, dtype=torch.int64, device=CPU),
        "an allocation as prepared calls make it": partial(allocate, (1,), (1,), torch.int64),
        "whether anything observes calls": upstream.is_unobserved,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--batches", type=int, default=9)
    parser.add_argument("--size", type=int, default=2000, help="calls of a batch")
    parser.add_argument("--python", action="store_true", help="without the table of known calls in C++")
    arguments = parser.parse_args(argv)
    stand_in()
    if arguments.python:
        calls.native_calls_missing = lambda: "left out"  # type: ignore[assignment]
    print(f"torch {torch.__version__}, table of known calls in C++: {calls.native_calls_missing() or 'yes'}")
    with torch.no_grad():
        for name, call in {**samplers(), **steps(), **floors()}.items():
            print(f"{name:64}{microseconds(call, arguments.batches, arguments.size):8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
