"""CUDA graphs: a decode step, recorded once per (rows of every player, cache bucket), and a pass over prompts, once per
shape; both are replayed from then on.

`Graphs` stores what is recorded and is independent of CUDA; `CudaRecorder` records. A recorder gets a step and the
small tensors that the step advances, and returns a function that replays it; recording must leave those tensors
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

BUCKET = 256  # cache slots a graph reads: fewer waste attention on masked slots, more cost graphs and memory
KEPT_PASSES = 16  # recorded passes over prompts
IDLE_PASSES = 256  # passes over prompts after which a recorded one that served none of them makes room for another
WARM_UPS = 2  # steps run before recording: libraries allocate and tune on their first calls
#: Other threads go on using the device during a capture: loaders pin memory, NCCL's watchdog polls events, judges run.
CAPTURE_ERROR_MODE = "thread_local"
Run = Callable[[], None]
Result = TypeVar("Result")


class Recorder(Protocol):
    def record(self, step: Run, state: Sequence[torch.Tensor]) -> Run:
        """Return a function that replays `step`, or `step` itself where it is not recorded. The tensors of `state`,
        which a step advances, are unchanged when this returns."""

    def run_concurrently(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run forward passes that do not depend on each other and return their results."""


class Graphs:
    def __init__(self, recorder: Recorder, bucket: int = BUCKET) -> None:
        self.recorder, self.slots = recorder, bucket
        self.recorded: dict[Hashable, Run] = {}
        self.recorded_passes: dict[Hashable, Run] = {}  # over prompts
        self._passes = 0  # over prompts, recorded or not
        self._last_used: dict[Hashable, int] = {}  # the number of a pass's last use
        self._numbers: dict[Hashable, int] = {}

    def bucket(self, length: int) -> int:
        """Round a length up to whole buckets."""
        return -(-length // self.slots) * self.slots

    def number_of(self, state: Hashable) -> int:
        """Return a number that stands for a state of the models in keys: its hundreds of addresses are hashed once."""
        return self._numbers.setdefault(state, len(self._numbers))

    def clear(self) -> None:
        """Forget all that is recorded."""
        self.recorded.clear()
        self.recorded_passes.clear()
        self._last_used.clear()
        self._numbers.clear()

    def run(self, key: Hashable, step: Run, state: Sequence[torch.Tensor]) -> None:
        replay = self.recorded.get(key) or self.recorder.record(step, state)
        if replay is not step:  # an unrecorded step is bound to its rollout and must not be stored for the next
            self.recorded[key] = replay
        replay()

    def run_pass(self, key: Hashable, read: Run, state: Sequence[torch.Tensor]) -> None:
        """Run a pass over prompts, which is recorded when it comes a second time: a shape that came once may never come
        again, and recording takes as long as three passes."""
        self._passes += 1
        replay = self.recorded_passes.get(key)
        if replay is None and key in self._last_used and self._make_room():
            replay = self._record_pass(read, state)
            if replay is not read:
                self.recorded_passes[key] = replay
        self._last_used[key] = self._passes
        (replay or read)()

    def _record_pass(self, read: Run, state: Sequence[torch.Tensor]) -> Run:
        try:
            return self.recorder.record(read, state)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # code of a model that may not run during a capture
            raise RuntimeError(
                f"recording a pass over prompts failed ({error}); RolloutEngine(graphs='steps') reads them unrecorded"
            ) from error

    def _make_room(self) -> bool:
        """Whether another pass may be kept; if need be, the one that has been idle for longest is forgotten."""
        if len(self.recorded_passes) < KEPT_PASSES:
            return True
        oldest = min(self.recorded_passes, key=self._last_used.__getitem__)
        if self._passes - self._last_used[oldest] <= IDLE_PASSES:
            return False
        del self.recorded_passes[oldest]
        return True


class EagerRecorder:
    """Records nothing: for compiled models without graphs, which need static shapes too."""

    def record(self, step: Run, state: Sequence[torch.Tensor]) -> Run:
        return step

    def run_concurrently(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        return [call() for call in calls]


class CudaRecorder:
    """Graphs share one memory pool, as they replay one after another; each model's forward has a stream of its own.

    The pool ends with the last graph: PyTorch asserts that a pool given to a capture has a live graph, unless all of
    its memory has been returned by then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: list[torch.cuda.Stream] = []
        self.graphs: WeakSet[Any] = WeakSet()

    def record(self, step: Run, state: Sequence[torch.Tensor]) -> Run:
        before = [tensor.clone() for tensor in state]
        current = torch.cuda.current_stream(self.device)
        side = self._stream(0)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        current.wait_stream(side)
        graph, live = torch.cuda.CUDAGraph(), next(iter(self.graphs), None)
        pool = None if live is None else live.pool()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=CAPTURE_ERROR_MODE):
            step()
        self.graphs.add(graph)
        return graph.replay

    def run_concurrently(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        main = torch.cuda.current_stream(self.device)
        results = []
        for index, call in enumerate(calls[1:], 1):
            stream = self._stream(index)
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                results.append(call())
        first = calls[0]()
        for index in range(1, len(calls)):
            main.wait_stream(self._stream(index))
        return [first, *results]

    def _stream(self, index: int) -> torch.cuda.Stream:
        while len(self.streams) <= index:
            self.streams.append(torch.cuda.Stream(self.device))
        return self.streams[index]
