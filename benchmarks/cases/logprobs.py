"""logprobs: log-probabilities of given tokens and their gradient, from stored logits, against PyTorch and TRL."""

from __future__ import annotations

from typing import Any

import torch

from ..harness.case import GRADIENT_MODES, Baseline, Case, Function, Inputs, Shape, Variant
from ..rivals.models import DRIFT, SPREAD, growth_shapes
from ..rivals.scores import from_logits, selective_from_logits, true_from_logits, without_kl


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    """Make the inputs for the shape's `models`: policy, policy+reference, or policy+reference+kl."""
    tokens, length, vocabulary = (int(shape.sizes[name]) for name in ("tokens", "length", "vocabulary"))
    sizes = (tokens // length, length, vocabulary)

    def normal(spread: float) -> torch.Tensor:
        return torch.randn(sizes, device=device, generator=generator).mul_(spread)

    policy = normal(SPREAD)
    targets = torch.randint(vocabulary, sizes[:2], device=device, generator=generator)
    args: tuple[torch.Tensor, ...] = (policy.to(shape.torch_dtype, copy=True), targets)
    if "reference" in str(shape.sizes["models"]):
        args += (policy.add_(normal(DRIFT * SPREAD)).to(shape.torch_dtype),)
    kwargs = {"kl": True} if "kl" in str(shape.sizes["models"]) else {}
    return Inputs(args, kwargs, {0: args[0].clone()})


class _AsComputed(torch.autograd.Function):
    """Return a leaf's memory as a non-leaf, which the library may overwrite; `restore` puts the logits back."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def in_place(function: Function) -> Function:
    """Return `function` with its gradient written over the logits."""

    def call(policy: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(_AsComputed.apply(policy), *args, overwrite_logits=True, **kwargs)

    return call


def restore(inputs: Inputs) -> None:
    inputs.args[0].copy_(inputs.spare[0])


def bytes_moved(shape: Shape, mode: str) -> float:
    """Count the bytes: forward reads all logits; backward reads the policy's (for KL also the reference's) logits and
    writes a gradient."""
    sizes = shape.sizes
    logits = int(sizes["tokens"]) * int(sizes["vocabulary"])
    forward = 2 if "reference" in str(sizes["models"]) else 1
    backward = 3 if "kl" in str(sizes["models"]) else 2
    passes = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
    return float(passes * logits * shape.torch_dtype.itemsize)


def _shape(tokens: int, length: int, vocabulary: int, dtype: str, models: str, device: str = "") -> Shape:
    sizes: dict[str, int | float | str] = {"tokens": tokens, "length": length, "vocabulary": vocabulary}
    return Shape(sizes | {"models": models}, dtype, devices=(device,) if device else ("cpu", "cuda"))


POLICY, BOTH, KL = "policy", "policy+reference", "policy+reference+kl"

CASE = Case(
    name="logprobs",
    op="logprobs",
    shapes={
        "tiny": [
            _shape(6, 3, 999, "float32", POLICY),
            _shape(6, 3, 999, "bfloat16", BOTH),
            _shape(6, 3, 999, "float32", KL),
        ],
        "standard": [
            *(_shape(2048, 512, 32_000, dtype, POLICY, "cpu") for dtype in ("float32", "bfloat16")),
            *(_shape(2048, 512, 32_000, dtype, KL, "cpu") for dtype in ("float32", "bfloat16")),
            *(_shape(8192, 512, 128_256, "bfloat16", models, "cuda") for models in (BOTH, KL)),
            _shape(8192, 512, 151_936, "bfloat16", BOTH, "cuda"),
            _shape(4096, 512, 128_256, "float32", POLICY, "cuda"),
        ],
        "growth": [
            *growth_shapes(
                "cpu",
                "float32",
                {"tokens": 1024, "length": 256, "vocabulary": 32_000, "models": POLICY},
                {"tokens": (256, 512, 1024, 2048), "vocabulary": (8_000, 16_000, 32_000, 64_000)},
            ),
            *growth_shapes(
                "cuda",
                "bfloat16",
                {"tokens": 4096, "length": 512, "vocabulary": 128_256, "models": BOTH},
                {"tokens": (1024, 2048, 4096, 8192), "vocabulary": (32_000, 64_000, 128_256, 256_512)},
            ),
        ],
    },
    make=make,
    truth=true_from_logits,
    baselines={
        "eager": Baseline(from_logits),
        "TRL's selective": Baseline(selective_from_logits, why_not=without_kl),
    },
    compiled=lambda: torch.compile(from_logits),
    bytes_moved=bytes_moved,
    flops=lambda shape, mode: 0.0,  # no matrix product: exponentials and additions
    modes=("forward", "backward", "full"),
    gradients_of=(0,),
    restore=restore,
    variants={"in place": Variant(in_place, GRADIENT_MODES)},
)
