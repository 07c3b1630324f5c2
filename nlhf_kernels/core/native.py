"""What calls into `_cpu` and `_cuda` need: dtype codes, the current stream and device, zeroed counters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock

import torch

from . import upstream

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum class DType of csrc/common/dtype.h


def cuda_stream(device: torch.device) -> int:
    """Return PyTorch's current stream on `device`, as the address that the launchers take."""
    return upstream.current_raw_stream(device.index)


class Counters:
    """Device integers that are 0 before and after each kernel, so that no call has to zero them.

    Calls on one stream share a set. A captured call gets a set of its own for the life of the process, since its graph
    may be replayed concurrently with any other work. Such sets come from one reserve per device, allocated by the first
    call outside a capture. Without a reserve, or when it is used up, a call gets no set and zeroes counters of its own.
    """

    RESERVE = 2**20  # bytes per device; the sampler takes 16 per row and captured call

    def __init__(self) -> None:
        self._by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._reserves: dict[torch.device, list[torch.Tensor]] = {}  # the unused rest, in one piece
        self._lock = Lock()

    def address(self, device: torch.device, stream: int, size: int) -> int:
        """Return the address of `size` bytes of zeros for a call on `stream`; 0 where there are none."""
        with self._lock:
            if is_capturing(device):
                return self._from_reserve(device, size)
            counters = self._by_stream.get((device, stream))
            if counters is None or counters.numel() < size:
                self._reserves.setdefault(device, [zeroed_bytes(self.RESERVE, device)])
                counters = self._by_stream[device, stream] = zeroed_bytes(max(size, 4096), device)
            return counters.data_ptr()

    def _from_reserve(self, device: torch.device, size: int) -> int:
        reserve = self._reserves.get(device)
        if reserve is None or reserve[0].numel() < size:
            return 0
        counters, reserve[0] = reserve[0][:size], reserve[0][size:]
        return counters.data_ptr()


def zeroed_bytes(size: int, device: torch.device) -> torch.Tensor:
    """Return zeros that are visible to every stream on return."""
    zeros = torch.zeros(size, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return zeros


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU: the driver's, and what PyTorch's allocator has cached."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of `device` is recording a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_current(device: torch.device) -> bool:
    """Return whether launches go to `device` without further ado: PyTorch's current GPU, or none."""
    return device.index is None or device.index == torch.cuda.current_device()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current inside the block; does nothing where it already is."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)
