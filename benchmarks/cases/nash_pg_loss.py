"""nash_pg_loss from hidden states: the Nash-MD loss of whole sequences with its gradients, against stored logits.

The function measured is linear_nash_pg_loss; given stored logits, the loss adds a negligible cost to theirs (case
logprobs). linear_nash_pg_loss computes its gradients in the forward pass and only scales them in backward, so timing
backward alone would be meaningless.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ..harness.case import Baseline, Case, Inputs, Shape
from ..rivals.models import growth_shapes, least_bytes, linear_shape, make_models, matmul_flops
from ..rivals.scores import OfBoth, cut_cross_entropy, full_logits, liger, of_both, true_scores, why_not

TAU = 0.01


class Loss(NamedTuple):
    """The fields of the library's NashPGLoss, in its order; only `loss` is differentiable."""

    loss: torch.Tensor  # ()
    policy_logprobs: torch.Tensor  # (B, T)
    reference_logprobs: torch.Tensor
    weights: torch.Tensor
    kl: torch.Tensor | None


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    models = make_models(shape, device, generator)
    preference = torch.rand(models.targets.shape[0], device=device, generator=generator)
    kwargs: dict[str, Any] = {"tau": TAU, "kl": shape.sizes.get("kl", "sequence")}
    if shape.sizes.get("reference") == "logprobs":
        return Inputs((*models[:3], preference), kwargs | {"reference_logprobs": models.reference_logprobs()})
    return Inputs((*models[:3], preference, *models[3:]), kwargs)


def loss(
    scores: OfBoth,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    preference: torch.Tensor,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | None = None,
    *,
    tau: float,
    kl: str,
    reference_logprobs: torch.Tensor | None = None,
) -> Loss:
    """Compute the loss in plain PyTorch from the log-probabilities that `scores` returns."""
    policy, reference, divergence = scores(
        hidden, weight, targets, reference_hidden, reference_weight, kl=kl == "exact"
    )
    reference = reference if reference_logprobs is None else reference_logprobs
    assert reference is not None, "the reference's model or its log-probabilities are given"
    with torch.no_grad():
        ratio = policy - reference
        if kl == "to_go":
            price = ratio.sum(1, keepdim=True) - ratio.cumsum(1) + ratio
        elif divergence is None:
            price = ratio.sum(1, keepdim=True)
        else:
            price = divergence.sum(1, keepdim=True) - divergence.cumsum(1)
        weights = (preference.unsqueeze(1) - 0.5 - tau * price).expand_as(policy)
    total = -(weights * policy).sum()
    if divergence is not None:
        total, divergence = total + tau * divergence.sum(), divergence.detach()
    return Loss(total / len(targets), policy.detach(), reference.detach(), weights, divergence)


eager = partial(loss, full_logits)


MODEL_7B, MODEL_HALF_B = (4096, 128_256), (896, 151_936)  # hidden size and vocabulary
OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {"head": "frozen"},
    {"reference": "logprobs"},
    {"head": "frozen", "reference": "logprobs"},
)

CASE = Case(
    name="nash_pg_loss",
    op="linear_logprobs",
    function="linear_nash_pg_loss",
    shapes={
        "tiny": [
            linear_shape(6, 3, 8, 999, "float32"),
            linear_shape(6, 3, 8, 999, "bfloat16", head="frozen"),
            linear_shape(6, 3, 8, 999, "float32", reference="logprobs"),
            linear_shape(6, 3, 8, 999, "float32", kl="exact"),
            linear_shape(6, 3, 8, 999, "float32", kl="to_go"),
        ],
        "standard": [
            linear_shape(512, 128, 256, 32_000, "float32", "cpu"),
            linear_shape(512, 128, 256, 32_000, "float32", "cpu", head="frozen"),
            linear_shape(512, 128, 256, 32_000, "float32", "cpu", reference="logprobs"),
            linear_shape(512, 128, 256, 32_000, "bfloat16", "cpu"),
            linear_shape(256, 64, 128, 8_000, "float32", "cpu"),
            *(
                linear_shape(8192, 512, width, vocabulary, "bfloat16", "cuda", **options)
                for width, vocabulary in (MODEL_7B, MODEL_HALF_B)
                for options in OPTIONS
            ),
            linear_shape(8192, 512, *MODEL_HALF_B, "bfloat16", "cuda", kl="exact"),
            linear_shape(8192, 512, *MODEL_HALF_B, "bfloat16", "cuda", kl="to_go"),
        ],
        "growth": [
            *growth_shapes(
                "cpu",
                "float32",
                {"tokens": 512, "length": 128, "hidden": 256, "vocabulary": 32_000},
                {
                    "tokens": (128, 256, 512, 1024),
                    "length": (32, 64, 128, 256, 512),
                    "vocabulary": (8_000, 16_000, 32_000, 64_000),
                },
            ),
            *growth_shapes(
                "cuda",
                "bfloat16",
                {"tokens": 8192, "length": 512, "hidden": 896, "vocabulary": 151_936},
                {
                    "tokens": (2048, 4096, 8192, 16384),
                    "length": (128, 512, 2048, 8192),
                    "vocabulary": (32_000, 64_000, 151_936),
                },
            ),
        ],
    },
    make=make,
    truth=partial(loss, true_scores),
    baselines={
        "eager": Baseline(eager),
        "Liger": Baseline(partial(loss, of_both(liger)), why_not=why_not("liger_kernel")),
        "cut_cross_entropy": Baseline(partial(loss, of_both(cut_cross_entropy)), why_not=why_not("cut_cross_entropy")),
    },
    compiled=lambda: torch.compile(eager),
    bytes_moved=least_bytes,
    flops=matmul_flops,
    modes=("forward", "full"),
    gradients_of=(0, 1),
)
