"""Launches of Triton kernels at little cost on the host.

`kernel[grid](...)` examines every argument on every call. What it finds out depends on types and sizes and on which
addresses are multiples of 16, which the signature of a call fixes (core/calls.py). So the first call of a signature
goes that way, and later ones pass addresses to the compiled kernels it returned. Where that is not possible (in the
interpreter, under Triton's profiling hooks, in versions that core/upstream.py does not know) all go that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from . import upstream
from .calls import known_calls
from .native import cuda_stream, is_current, on_device
from .prepared import ALIGNMENT, PreparedCall, Result, Slot, Source, Step, tensors_of


class Scratch:
    """Working memory of one call: pieces of one allocation.

    Args:
        pieces (of Result): the tensors in it.
    """

    def __init__(self, *pieces: Result) -> None:
        self._pieces = pieces
        self.offsets: list[int] = []  # in bytes
        self.size = 0
        for shape, dtype in pieces:
            self.offsets.append(self.size)
            self.size += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def slots(self) -> list[Slot]:
        return [Slot(Source.SCRATCH, offset) for offset in self.offsets]

    def view(self, memory: torch.Tensor, offset: int) -> torch.Tensor:
        """Return the piece at an offset of the allocated memory as a tensor."""
        shape, dtype = self._pieces[self.offsets.index(offset)]
        return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(*shape)


class Launch(NamedTuple):
    """One launch of a call: its kernel takes pointers, then numbers, then constants.

    Args:
        kernel (triton.JITFunction): its parameters in that order.
        grid (of int): programs along each axis.
        pointers (of Slot): in the kernel's order.
        numbers (of int or float): in the kernel's order.
        options: constants of the kernel and options of the launch, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    pointers: Sequence[Slot]
    numbers: tuple[float, ...]
    options: dict[str, Any]


class TritonCall(PreparedCall):
    """The launches of the calls of one signature, in their order.

    Args:
        device (torch.device): of all tensors.
        results (of Result): what the call returns.
        scratch (Scratch): memory that the kernels share.
        launches (of Launch): what is launched.
    """

    def __init__(
        self, device: torch.device, results: Sequence[Result], scratch: Scratch, launches: Sequence[Launch]
    ) -> None:
        super().__init__(device, results, (), scratch.size, [partial(cuda_stream, device)], partial(_is_ready, device))
        self._scratch, self._launches = scratch, tuple(launches)

    @property
    def is_complete(self) -> bool:
        return bool(self.steps)

    def _run(self, inputs: list[torch.Tensor], allocated: list[torch.Tensor]) -> None:
        by_address = bool(self.steps) and not upstream.triton_is_observed()
        if by_address and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in allocated):
            super()._run(inputs, allocated)
        else:
            self._launch_by_triton(inputs, allocated)

    def _launch_by_triton(self, inputs: list[torch.Tensor], allocated: list[torch.Tensor]) -> None:
        def tensor(slot: Slot) -> torch.Tensor:
            if slot.source == Source.SCRATCH:
                return self._scratch.view(allocated[self.results], slot.place)
            return (inputs if slot.source == Source.INPUT else allocated)[slot.place]

        stream = Slot(Source.NOW, 0)
        steps: list[Step | None] = []
        for kernel, grid, pointers, numbers, options in self._launches:
            compiled = kernel[grid](*map(tensor, pointers), *numbers, **options)
            steps.append(upstream.launch_by_address(compiled, kernel, grid, stream, (*pointers, *numbers), options))
        if all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in allocated):
            self.steps = tuple(step for step in steps if step is not None) if all(steps) else ()


def _is_ready(device: torch.device) -> bool:
    """Return whether addresses may be launched now: nothing observes launches, and the device is current."""
    return not upstream.triton_is_observed() and is_current(device)


#: What a kernel takes: tensors, which precede the results; (shape, dtype) of each result; the kernel; its grid;
#: numbers; constants and options.
Layout = tuple[
    tuple[torch.Tensor, ...],
    tuple[tuple[Sequence[int], torch.dtype], ...],
    Any,
    tuple[int, ...],
    tuple[float, ...],
    dict[str, Any],
]


class LaunchedFunction:
    """A function that is one launch, prepared once for each signature.

    Args:
        layout (callable): the function's arguments -> Layout. Its tensors are those among the arguments, in their
            order, or views or copies of them.
    """

    def __init__(self, layout: Callable[..., Layout]) -> None:
        self._layout = layout
        self._known: Any = None

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(*inputs)
        if self._known is None:
            self._known = known_calls()
        result = self._known.run(inputs, (), None)
        return self._first(*inputs) if result is NotImplemented else result

    def _traced(self, *inputs: Any) -> Any:
        tensors, results, kernel, grid, numbers, options = self._layout(*inputs)
        device = tensors[0].device
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in results]
        if 0 not in grid:
            with on_device(device):
                kernel[grid](*tensors, *outputs, *numbers, **options)
        return None if not outputs else outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _first(self, *inputs: Any) -> Any:
        """Make a call of a new signature; keep it unless it copies an argument."""
        tensors, results, kernel, grid, numbers, options = self._layout(*inputs)
        outputs = [Result(tuple(shape), dtype) for shape, dtype in results]
        slots = [Slot(Source.INPUT, index) for index in range(len(tensors))]
        slots += [Slot(Source.RESULT, index) for index in range(len(outputs))]
        launches = [Launch(kernel, grid, slots, numbers, options)] if 0 not in grid else []
        call = TritonCall(tensors[0].device, outputs, Scratch(), launches)
        result = call(tensors)
        if [x.data_ptr() for x in tensors] == [x.data_ptr() for x in tensors_of(inputs)]:
            self._known.learn(inputs, (), call, call if call.is_complete else None)
        return result
