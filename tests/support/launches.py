"""Launch a prepared call twice with a stand-in driver: `python -m tests.support.launches`, without TRITON_INTERPRET.

Prints what reached the driver as JSON, one line a launch: first through Triton's own way, which passes tensors, then
through the compiled kernel, which gets addresses. A third call has an unaligned tensor, a fourth one is observed.
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
from nlhf_kernels.core.triton_launch import Launch, PreparedLaunches, Scratch
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
    device = torch.device("cpu")
    scratch = Scratch(device, ((3,), torch.uint8), ((5, 2), torch.float32))
    launch = Launch(copy_kernel, 7, 3, (5,), {"BLOCK": 16, "num_warps": 2})
    launches = PreparedLaunches(device, scratch, (launch, launch._replace(programs=8)))
    memory = scratch.allocate()
    scratch.allocate = lambda: memory  # type: ignore[method-assign]
    x, y = torch.zeros(8, dtype=torch.float32), torch.zeros(8, dtype=torch.float32)
    launches([x], [y])
    launches([x], [y])
    launches([x[1:]], [y])
    launches([x], [y])
    knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    launches([x], [y])


if __name__ == "__main__":
    main()
