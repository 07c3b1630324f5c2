"""mirror_descent: K steps on G games of A actions in one launch, against a loop of batched PyTorch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..harness.case import Baseline, Case, Inputs, Shape
from ..harness.check import ROUNDINGS, accuracy_check

TAU = 0.1
Step = Callable[..., torch.Tensor]


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    games, actions, steps = (int(shape.sizes[name]) for name in ("games", "actions", "steps"))

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=torch.float64, device=device, generator=generator)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, shape.torch_dtype)

    scores = normal(games, actions, actions)
    return Inputs(
        args=(
            place(torch.log_softmax(normal(games, actions), dim=-1)),
            place(torch.sigmoid(scores - scores.transpose(1, 2))),  # P(a > b) + P(b > a) = 1
            place(torch.log_softmax(normal(games, actions), dim=-1)),
        ),
        kwargs={"tau": TAU, "step_sizes": place(torch.linspace(1.0, 0.2, steps, dtype=torch.float64))},
    )


def one_step(
    log_policy: torch.Tensor,  # (G, A)
    preference: torch.Tensor,  # (G, A, A)
    log_reference: torch.Tensor,  # (G, A)
    step_size: torch.Tensor,  # ()
    pull: torch.Tensor,  # () or (G, 1): step size times tau
    opponent: str,
) -> torch.Tensor:
    mixture = torch.lerp(log_policy, log_reference, pull)
    against = torch.softmax(mixture if opponent == "mixture" else log_policy, dim=-1)
    chances = torch.bmm(preference, against.unsqueeze(-1)).squeeze(-1)
    return torch.log_softmax(torch.addcmul(mixture, step_size, chances), dim=-1)


def play(
    step: Step,
    log_policy: torch.Tensor,
    preference: torch.Tensor,
    log_reference: torch.Tensor,
    *,
    tau: float | torch.Tensor,
    step_sizes: torch.Tensor,
    opponent: str = "mixture",
) -> torch.Tensor:
    """Run the loop without host synchronisation: step sizes stay tensors."""
    pulls = step_sizes * tau if isinstance(tau, float) else step_sizes[:, None, None] * tau[:, None]
    for step_size, pull in zip(step_sizes.unbind(), pulls.unbind(), strict=True):
        log_policy = step(log_policy, preference, log_reference, step_size, pull, opponent)
    return log_policy


def eager(*args: Any, **kwargs: Any) -> torch.Tensor:
    return play(one_step, *args, **kwargs)


def compiled() -> Callable[..., torch.Tensor]:
    """Compile one step and loop in Python: unrolling a hundred steps takes minutes to compile and is no faster."""
    step = torch.compile(one_step)
    return lambda *args, **kwargs: play(step, *args, **kwargs)


def bytes_moved(shape: Shape, mode: str) -> float:
    """Count, for any number of steps, one read of the preferences and both policies and one write of the result."""
    games, actions = int(shape.sizes["games"]), int(shape.sizes["actions"])
    return float(shape.torch_dtype.itemsize * games * (actions * actions + 3 * actions))


def flops(shape: Shape, mode: str) -> float:
    """Count the matrix-vector products; the softmaxes' exponentials do not run on a matmul unit."""
    games, actions, steps = (int(shape.sizes[name]) for name in ("games", "actions", "steps"))
    return float(2 * steps * games * actions * actions)


def _standard(games: int, actions: int, dtype: str) -> list[Shape]:
    return [
        Shape({"games": games, "actions": actions, "steps": steps}, dtype, devices=(device,))
        for device, steps in (("cpu", 20), ("cuda", 100))
    ]


CASE = Case(
    name="mirror_descent",
    op="mirror_descent",
    shapes={
        "tiny": [Shape({"games": 3, "actions": 5, "steps": 4}, dtype) for dtype in ("float32", "float64")],
        "standard": [
            *_standard(1024, 64, "float32"),
            *_standard(1024, 64, "float64"),
            *_standard(256, 128, "float32"),
            *_standard(4096, 16, "float32"),
            Shape({"games": 8, "actions": 2048, "steps": 100}, "float32", devices=("cuda",)),
        ],
    },
    make=make,
    truth=eager,
    baselines={"eager": Baseline(eager)},
    compiled=compiled,
    bytes_moved=bytes_moved,
    flops=flops,
    check=accuracy_check(roundings={**ROUNDINGS, "float64": 1e-12}),
)
