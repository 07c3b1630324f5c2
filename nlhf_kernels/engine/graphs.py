"""CUDA graphs of a step: recorded once per (rows of every player, cache bucket), replayed from then on.

`Graphs` keeps the books and knows nothing of CUDA; `CudaRecorder` is the part that does. A recorder is given a step and
the small tensors that the step advances, and returns what replays it; recording must leave those tensors as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

BUCKET = 256  # cache slots a graph reads: fewer waste attention on masked slots, more cost graphs and memory
WARM_UPS = 2  # steps run before recording: libraries allocate and tune on their first calls
Run = Callable[[], None]


class Recorder(Protocol):
    def record(self, step: Run, state: Sequence[torch.Tensor]) -> Run:
        """`step` as something that replays it, or `step` itself where nothing is kept of it. `state` is what a step
        advances: it is as before when this returns."""

    def side_by_side(self, reads: Sequence[Callable[[], Any]]) -> list[Any]:
        """Runs forwards that do not depend on each other, and gives their results."""


class Graphs:
    def __init__(self, recorder: Recorder, bucket: int = BUCKET) -> None:
        self.recorder, self.slots = recorder, bucket
        self.recorded: dict[Hashable, Run] = {}

    def bucket(self, length: int) -> int:
        """`length` rounded up to whole buckets."""
        return -(-length // self.slots) * self.slots

    def run(self, key: Hashable, step: Run, state: Sequence[torch.Tensor]) -> None:
        replay = self.recorded.get(key) or self.recorder.record(step, state)
        if replay is not step:  # what nobody recorded is this rollout's own, and looks at it
            self.recorded[key] = replay
        replay()

    def side_by_side(self, reads: Sequence[Callable[[], Any]]) -> list[Any]:
        return self.recorder.side_by_side(reads)


class Unrecorded:
    """Steps of standing shapes that nobody records: what compiled models want where there are no graphs."""

    def record(self, step: Run, state: Sequence[torch.Tensor]) -> Run:
        return step

    def side_by_side(self, reads: Sequence[Callable[[], Any]]) -> list[Any]:
        return [read() for read in reads]


class CudaRecorder:
    """Graphs share one memory pool, as they replay one after another; each model's forward has a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: list[torch.cuda.Stream] = []
        self.pool: Any = None

    def record(self, step: Run, state: Sequence[torch.Tensor]) -> Run:
        before = [tensor.clone() for tensor in state]
        current = torch.cuda.current_stream(self.device)
        side = self._stream(0)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
                _restore(state, before)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=side):
            step()
        self.pool = graph.pool()
        return graph.replay

    def side_by_side(self, reads: Sequence[Callable[[], Any]]) -> list[Any]:
        main = torch.cuda.current_stream(self.device)
        results = []
        for index, read in enumerate(reads):
            if index == 0:
                continue
            stream = self._stream(index)
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                results.append(read())
        first = reads[0]()
        for index in range(1, len(reads)):
            main.wait_stream(self._stream(index))
        return [first, *results]

    def _stream(self, index: int) -> torch.cuda.Stream:
        while len(self.streams) <= index:
            self.streams.append(torch.cuda.Stream(self.device))
        return self.streams[index]


def _restore(state: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
