"""Two language models' last layers as benchmark inputs, and the costs of scoring tokens with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..harness.case import Shape
from .scores import true_scores

SPREAD = 3.0  # of the logits: some tokens are likely, as a model's are, so that errors in their share show
DRIFT = 0.1  # how far the policy has moved from its reference


class Models(NamedTuple):
    hidden: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (V, D)
    targets: torch.Tensor  # (B, T)
    reference_hidden: torch.Tensor  # (B, T, D)
    reference_weight: torch.Tensor  # (V, D)

    def reference_logprobs(self) -> torch.Tensor:  # (B, T)
        """As a rollout hands them back: float32."""
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
    """`tokens` in sequences of `length`. `options`: head="frozen", reference="logprobs" (known from the rollout),
    kl="exact". For one device, or for both."""
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
    """`base`, and one size at a time at other values, the rest as in `base`."""
    shapes = (
        Shape({**base, name: value}, dtype, modes=("full",), devices=(device,))
        for name, values in sweeps.items()
        for value in values
    )
    return list({shape.label: shape for shape in shapes}.values())


def matmul_flops(shape: Shape, mode: str) -> float:
    """2 N D V a product: the logits of both models (of one, where the reference's scores are given), the gradients."""
    batch, length, width, vocabulary = _sizes(shape)
    forward = 1 if shape.sizes.get("reference") == "logprobs" else 2
    backward = 1 if shape.sizes.get("head") == "frozen" else 2
    products = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
    return 2.0 * products * batch * length * width * vocabulary


def least_bytes(shape: Shape, mode: str) -> float:
    """Hidden states and heads read once a pass, gradients written; no logits."""
    batch, length, width, vocabulary = _sizes(shape)
    models = 1 if shape.sizes.get("reference") == "logprobs" else 2
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
