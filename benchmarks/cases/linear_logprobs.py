"""linear_logprobs: log-probabilities and gradients from hidden states and heads, against fully stored logits."""

from __future__ import annotations

import torch

from ..harness.case import Baseline, Case, Inputs, Shape
from ..rivals.models import growth_shapes, least_bytes, linear_shape, make_models, matmul_flops
from ..rivals.scores import cut_cross_entropy, full_logits, liger, of_both, true_scores, why_not


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    models = make_models(shape, device, generator)
    alone = shape.sizes.get("reference") == "logprobs"
    return Inputs(models[:3] if alone else tuple(models), {"kl": True} if shape.sizes.get("kl") == "exact" else {})


CASE = Case(
    name="linear_logprobs",
    op="linear_logprobs",
    shapes={
        "tiny": [
            linear_shape(6, 3, 8, 999, "float32"),
            linear_shape(6, 3, 8, 999, "bfloat16", head="frozen"),
            linear_shape(6, 3, 8, 999, "float32", kl="exact"),
        ],
        "standard": [
            linear_shape(512, 128, 256, 32_000, "float32", "cpu"),
            linear_shape(512, 128, 256, 32_000, "float32", "cpu", head="frozen"),
            linear_shape(512, 128, 256, 32_000, "bfloat16", "cpu"),
            linear_shape(256, 64, 128, 8_000, "float32", "cpu"),
            linear_shape(8192, 512, 4096, 128_256, "bfloat16", "cuda"),
            linear_shape(8192, 512, 4096, 128_256, "bfloat16", "cuda", head="frozen"),
            linear_shape(8192, 512, 896, 151_936, "bfloat16", "cuda"),
            linear_shape(8192, 512, 896, 151_936, "bfloat16", "cuda", kl="exact"),
        ],
        "growth": [
            *growth_shapes(
                "cpu",
                "float32",
                {"tokens": 512, "length": 128, "hidden": 256, "vocabulary": 32_000},
                {"tokens": (128, 256, 512, 1024), "vocabulary": (8_000, 16_000, 32_000, 64_000)},
            ),
            *growth_shapes(
                "cuda",
                "bfloat16",
                {"tokens": 8192, "length": 512, "hidden": 896, "vocabulary": 151_936},
                {"tokens": (2048, 4096, 8192, 16384), "vocabulary": (32_000, 64_000, 151_936)},
            ),
        ],
    },
    make=make,
    truth=true_scores,
    baselines={
        "eager": Baseline(full_logits),
        "Liger": Baseline(of_both(liger), why_not=why_not("liger_kernel")),
        "cut_cross_entropy": Baseline(of_both(cut_cross_entropy), why_not=why_not("cut_cross_entropy")),
    },
    compiled=lambda: torch.compile(full_logits),
    bytes_moved=least_bytes,
    flops=matmul_flops,
    modes=("forward", "backward", "full"),
    gradients_of=(0, 1),
)
