"""preference_loss from hidden states: IPO on pairs of responses with its gradients, against stored logits.

The function measured is linear_preference_loss: preference_loss itself is a few operations on one number per pair.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..harness.case import Baseline, Case, Inputs, Shape
from ..rivals.models import least_bytes, linear_shape, make_models, matmul_flops
from ..rivals.scores import OfBoth, full_logits, true_scores

TAU = 0.1


class Loss(NamedTuple):
    """The fields of the library's PreferenceLoss, in its order; only `loss` is differentiable."""

    loss: torch.Tensor  # ()
    margin: torch.Tensor  # (B,)
    first: torch.Tensor
    second: torch.Tensor


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    """Make the inputs; the shape's `tokens` counts both responses of every pair."""
    models = make_models(shape, device, generator)
    preference = torch.rand(models.targets.shape[0] // 2, device=device, generator=generator)
    return Inputs((*models[:3], preference, *models[3:]), {"tau": TAU})


def loss(
    scores: OfBoth,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    preference: torch.Tensor,
    reference_hidden: torch.Tensor,
    reference_weight: torch.Tensor,
    *,
    tau: float,
) -> Loss:
    """Compute the IPO loss from the log-probabilities that `scores` returns."""
    policy, reference, _ = scores(hidden, weight, targets, reference_hidden, reference_weight)
    assert reference is not None, "both models were given"
    first, second = (policy - reference).sum(1).chunk(2)
    margin, target = first - second, 1 / (2 * tau)
    each = preference * (margin - target) ** 2 + (1 - preference) * (margin + target) ** 2
    return Loss(each.mean(), margin.detach(), first.detach(), second.detach())


eager = partial(loss, full_logits)


CASE = Case(
    name="preference_loss",
    op="linear_logprobs",
    function="linear_preference_loss",
    shapes={
        "tiny": [linear_shape(12, 3, 8, 999, dtype) for dtype in ("float32", "bfloat16")],
        "standard": [
            linear_shape(512, 128, 256, 32_000, "float32", "cpu"),
            linear_shape(8192, 512, 4096, 128_256, "bfloat16", "cuda"),
            linear_shape(8192, 512, 896, 151_936, "bfloat16", "cuda"),
            linear_shape(8192, 512, 896, 151_936, "bfloat16", "cuda", head="frozen"),
        ],
    },
    make=make,
    truth=partial(loss, true_scores),
    baselines={"eager": Baseline(eager)},
    compiled=lambda: torch.compile(eager),
    bytes_moved=least_bytes,
    flops=matmul_flops,
    modes=("forward", "backward", "full"),
    gradients_of=(0, 1),
)
