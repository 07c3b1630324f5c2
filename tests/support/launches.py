"""Launch a call with a stand-in driver: `python -m tests.support.launches`, without TRITON_INTERPRET.

Prints what reached the driver as JSON, one line a launch. The first call goes through Triton's own way, which passes
tensors; the second through the compiled kernel, which gets addresses; the third likewise, from a table of known calls.
The last two are observed, so that they go Triton's way again.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from nlhf_kernels.core import upstream
from nlhf_kernels.core.calls import known_calls
from nlhf_kernels.core.prepared import Result, Slot, Source
from nlhf_kernels.core.triton_launch import Launch, Scratch, TritonCall
from tests.support.aot import StandInDriver


class Launcher:
    """Prints the arguments of a launch instead of launching."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        plain = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        own_way = any(isinstance(x, torch.Tensor) for x in arguments)
        print(json.dumps({"own_way": own_way, "arguments": [x for x in plain if isinstance(x, (int, str, tuple))]}))


class Utilities:
    """Loads nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**17}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024  # module, function, registers, spills, most threads


class LaunchingDriver(StandInDriver):
    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0


@triton.jit
def copy_kernel(x, middle, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(middle + at, value)
    tl.store(y + at, value)


def main() -> None:
    driver.set_active(LaunchingDriver(90))
    upstream.current_raw_stream = lambda index: 0  # type: ignore[assignment]
    memory: dict[Any, torch.Tensor] = {}  # the same for every call
    allocate = upstream.allocator(torch.device("cpu"))
    upstream.allocator = lambda device: lambda *result: memory.setdefault(result, allocate(*result))  # type: ignore[assignment]

    device = torch.device("cpu")
    scratch = Scratch(Result((3,), torch.uint8), Result((5, 2), torch.float32))
    pointers = Slot(Source.INPUT, 0), scratch.slots[1], Slot(Source.RESULT, 0)
    launch = Launch(copy_kernel, (7,), pointers, (5,), {"BLOCK": 16, "num_warps": 2})
    call = TritonCall(device, [Result((8,), torch.float32)], scratch, (launch, launch._replace(grid=(8,))))
    x = (torch.zeros(8, dtype=torch.float32),)
    call(x)
    call(x)
    table = known_calls()
    table.learn(x, (), call, call)
    table.run(x, (), None)
    assert table.run((x[0][1:],), (), None) is NotImplemented, "an address that is not aligned"
    knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    call(x)
    table.run(x, (), None)


if __name__ == "__main__":
    main()
