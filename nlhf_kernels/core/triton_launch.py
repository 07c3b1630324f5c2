"""Launches of Triton kernels at little cost on the host.

`kernel[grid](...)` examines every argument on every call. What it finds out depends on types and
sizes, which a prepared call fixes, and on which addresses are multiples of 16. So the first launch for each pattern of
addresses goes that way, and later ones pass addresses to the compiled kernel it returned. Where that is not possible
(in the interpreter, under Triton's profiling hooks, in versions that core/upstream.py does not know) all go that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from . import upstream
from .native import on_device

_ALIGNMENT = 16  # bytes, of which Triton knows whether an address is a multiple


class Scratch:
    """Memory of one prepared call: pieces of one allocation.

    Args:
        device (torch.device): where it lies.
        pieces ((shape, dtype) each): the tensors in it.
    """

    def __init__(self, device: torch.device, *pieces: tuple[Sequence[int], torch.dtype]) -> None:
        self._device, self._pieces = device, pieces
        self.offsets: list[int] = []  # in bytes
        self.size = 0
        for shape, dtype in pieces:
            self.offsets.append(self.size)
            self.size += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def allocate(self) -> torch.Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device=self._device)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return the pieces of memory that `allocate` returned as tensors."""
        return [
            memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(*shape)
            for offset, (shape, dtype) in zip(self.offsets, self._pieces, strict=True)
        ]


class Launch(NamedTuple):
    """One launch of a prepared call: its kernel takes pointers, then integers, then constants.

    Args:
        kernel (triton.JITFunction): its parameters in that order.
        programs (int): of the grid.
        pointers (int): how many of the call's pointers it takes, from the first on.
        integers (of int): in the kernel's order.
        options: constants of the kernel and options of the launch, by name.
    """

    kernel: Any
    programs: int
    pointers: int
    integers: tuple[int, ...]
    options: dict[str, Any]


class PreparedLaunches:
    """The launches of one prepared call, in their order.

    Args:
        device (torch.device): of all tensors.
        scratch (Scratch): memory that the kernels share.
        launches (of Launch): what is launched.
    """

    def __init__(self, device: torch.device, scratch: Scratch, launches: Sequence[Launch]) -> None:
        self._device, self._scratch, self._launches = device, scratch, tuple(launches)
        self._compiled: dict[Any, list[Callable[[int, list[int]], None]]] = {}  # by the addresses' alignment

    def __call__(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
        """Launch with the pointers `before`, the scratch memory's pieces, `after`."""
        memory = self._scratch.allocate()
        start = memory.data_ptr()
        given = [tensor.data_ptr() for tensor in (*before, *after)]
        low_bits = start
        for address in given:
            low_bits |= address
        alignment: Any = True
        if low_bits % _ALIGNMENT:
            alignment = (start % _ALIGNMENT == 0, *[address % _ALIGNMENT == 0 for address in given])
        pieces = [start + offset for offset in self._scratch.offsets]
        addresses = [*given[: len(before)], *pieces, *given[len(before) :]]
        compiled = self._compiled.get(alignment)
        with on_device(self._device):
            if compiled is None or upstream.triton_is_observed():
                self._launch_by_triton([*before, *self._scratch.views(memory), *after], alignment)
                return
            stream = upstream.current_raw_stream(self._device.index)
            for launch in compiled:
                launch(stream, addresses)

    def _launch_by_triton(self, pointers: list[torch.Tensor], alignment: Any) -> None:
        compiled: list[Any] = []
        for launch in self._launches:
            result = launch.kernel[(launch.programs,)](
                *pointers[: launch.pointers], *launch.integers, **launch.options
            )  # fmt: skip
            compiled.append(upstream.launcher_of(result, *launch))
        if all(compiled):
            self._compiled[alignment] = compiled
