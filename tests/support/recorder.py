"""A recorder with the semantics of CUDA graphs on the CPU, and engines that use it."""

from __future__ import annotations

from nlhf_kernels.engine import RolloutEngine


class FakeRecorder:
    """Warm-ups without side effects, then replays of one call with the host state of its recording."""

    def __init__(self) -> None:
        self.engine: RolloutEngine | None = None
        self.records = self.replays = 0

    def record(self, step, state):
        self.records += 1
        before = [tensor.clone() for tensor in state]
        step()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        decode_state = self.engine._space.state
        recorded = decode_state.filled, decode_state.padded

        def replay() -> None:
            now = decode_state.filled, decode_state.padded
            decode_state.filled, decode_state.padded = recorded  # a graph does not see later host state
            step()
            decode_state.filled, decode_state.padded = now
            self.replays += 1

        return replay

    def run_concurrently(self, calls):
        return [call() for call in calls]


def recorded(policy, reference=None, bucket=8, graphs="steps", **options) -> tuple[RolloutEngine, FakeRecorder]:
    recorder = FakeRecorder()
    recorder.engine = RolloutEngine(policy, reference, recorder=recorder, bucket=bucket, graphs=graphs, **options)
    return recorder.engine, recorder
