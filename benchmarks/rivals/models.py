"""The last layers of two language models as benchmark inputs, and the costs of scoring tokens with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..harness.case import Shape
from .scores import true_scores

SPREAD = 3.0  # of the logits: some tokens are likely, as in a trained model, so that errors in them are visible
DRIFT = 0.1  # how far the policy has moved from its reference


class Models(NamedTuple):
    hidden: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (V, D)
    targets: torch.Tensor  # (B, T)
    reference_hidden: torch.Tensor  # (B, T, D)
    reference_weight: torch.Tensor  # (V, D)

    def reference_logprobs(self) -> torch.Tensor:  # (B, T)
        """Return the reference's log-probabilities in float32, as a rollout does."""
        with torch.no_grad():
            return true_scores(self.reference_hidden, self.reference_weight, self.targets).policy.float()


def make_models(shape: Shape, device: torch.device, generator: torch.Generator) -> Models:
    batch, length, width, vocabulary = _sizes(shape)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, generator=generator)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(shape.torch_dtype)

    hidden, weight = normal(batch, length, width), normal(vocabulary, width) * (SPREAD / width**0.5)
    targets = torch.randint(vocabulary, (batch, length), device=device, generator=generator)
    reference_hidden = placed(hidden + DRIFT * normal(batch, length, width))
    return Models(placed(hidden), placed(weight), targets, reference_hidden, placed(weight).clone())


def linear_shape(
    tokens: int, length: int, width: int, vocabulary: int, dtype: str, device: str = "", **options: str
) -> Shape:
    """Make a shape of `tokens` in sequences of `length`, for one device or both.

    `options` are head="frozen", reference="logprobs" (known from the rollout) and kl="exact".
    """
    sizes: dict[str, int | float | str] = {
        "tokens": tokens,
        "length": length,
        "hidden": width,
        "vocabulary": vocabulary,
    }
    devices = (device,) if device else ("cpu", "cuda")
    return Shape(sizes | options, dtype, devices=devices, gradients_of=(0,) if options.get("head") == "frozen" else ())


def growth_shapes(
    device: str, dtype: str, base: Mapping[str, int | float | str], sweeps: Mapping[str, tuple[int, ...]]
) -> list[Shape]:
    """Return `base` and shapes that differ from it in one size."""
    shapes = (
        Shape({**base, name: value}, dtype, modes=("full",), devices=(device,))
        for name, values in sweeps.items()
        for value in values
    )
    return list({shape.label: shape for shape in shapes}.values())


def _models(shape: Shape) -> int:
    """Return how many models are scored: one if the reference's scores are given or there is no reference."""
    return 1 if shape.sizes.get("reference") == "logprobs" or "upstream" in shape.sizes else 2


def matmul_flops(shape: Shape, mode: str) -> float:
    """Count 2 N D V per product: logits of the models that are scored, and gradients."""
    batch, length, width, vocabulary = _sizes(shape)
    forward = _models(shape)
    backward = 1 if shape.sizes.get("head") == "frozen" else 2
    products = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
    return 2.0 * products * batch * length * width * vocabulary


def least_bytes(shape: Shape, mode: str) -> float:
    """Count one read of hidden states and heads per pass and one write of the gradients; no logits."""
    batch, length, width, vocabulary = _sizes(shape)
    models = _models(shape)
    hidden, weight = batch * length * width, vocabulary * width
    forward = models * (hidden + weight)
    backward = 2 * hidden + weight * (1 if shape.sizes.get("head") == "frozen" else 2)
    entries = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
    return float(shape.torch_dtype.itemsize * entries)


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    tokens, length, width, vocabulary = (
        int(shape.sizes[name]) for name in ("tokens", "length", "hidden", "vocabulary")
    )
    return tokens // length, length, width, vocabulary
