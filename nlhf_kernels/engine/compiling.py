"""Whether compiling the models' steps repays its time: the engine's own steps, timed, against what compiling takes.

Compiling is not done in the background. Tracing runs the models' Python code, which a rollout or a training step would
change meanwhile: training flags, attention, the forwards of joint products.
"""

from __future__ import annotations

import time

clock = time.perf_counter

#: Seconds that torch.compile took per layer: 19 s for two models of 24 layers, 31 s for two of 28 (an H200).
SECONDS_PER_LAYER = 0.5
COMPILATIONS = 2  # a batch that shrinks as rows end is compiled for other numbers of rows, too
#: Share of a step that compiling saved at least: 22 % at 7B, 51 % at 0.5B, of steps without fused layers (an H200). Of
#: steps with them it is not measured.
SAVED_SHARE = 0.2
COMPILED_DEVICES = ("cuda",)  # where that was measured


class CompileDecision:
    """Decides at the start of a rollout, by the fastest steps of earlier ones, whether to compile from then on.

    Args:
        layers (int): of all models together.
    """

    def __init__(self, layers: int) -> None:
        self.cost = COMPILATIONS * SECONDS_PER_LAYER * layers  # seconds
        self.seconds_per_step: float | None = None

    def record(self, seconds: float, steps: int) -> None:
        """Take note of a rollout's steps. The fastest rollout counts: the first ones also record graphs."""
        if steps > 0:
            fastest = self.seconds_per_step or float("inf")
            self.seconds_per_step = min(fastest, seconds / steps)

    def repays(self, steps: int) -> bool:
        """Return whether `steps` steps to come are expected to save more than compiling costs."""
        return self.seconds_per_step is not None and SAVED_SHARE * self.seconds_per_step * steps > self.cost

    def __str__(self) -> str:
        return f"{1e3 * (self.seconds_per_step or 0.0):.2f} ms each; compiling takes about {self.cost:.0f} s"
