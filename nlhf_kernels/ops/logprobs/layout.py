"""What the backends of logprobs agree on: the order of the outputs and the settings of a call."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

import torch

IGNORED = -100  # a target that is not scored: its outputs and gradients are 0
ELSEWHERE = -(2**31)  # in backward, over a slice of the vocabulary: a target that is a token of another slice


class Output(IntEnum):
    """Rows of `values` (5, N): what the caller sees. What was not asked for is 0."""

    POLICY = 0
    REFERENCE = 1
    ENTROPY = 2
    KL = 3
    MIXTURE = 4


class Normalizer(IntEnum):
    """Rows of `normalizers` (6, N): what backward needs to know a probability again from its logit.

    Maximum and logarithm of the sum stay apart: their sum, log-sum-exp, loses the digits of a probability where all
    logits carry a large common offset.
    """

    POLICY_MAX = 0
    POLICY_LOG_SUM = 1
    REFERENCE_MAX = 2
    REFERENCE_LOG_SUM = 3
    MIXTURE_MAX = 4
    MIXTURE_LOG_SUM = 5


class Want(IntFlag):
    """Outputs that cost more than the log-probabilities."""

    ENTROPY = 1
    KL = 2
    MIXTURE = 4


class Transform(NamedTuple):
    """What a model does to the products of its head: scale * x, then softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none


class Settings(NamedTuple):
    """The numbers of a call; `flat()` is how they travel through an operator's schema."""

    temperature: float = 1.0
    policy: Transform = Transform()
    reference: Transform = Transform()
    wanted: int = 0

    def flat(self) -> tuple[list[float], int]:
        return [self.temperature, *self.policy, *self.reference], self.wanted

    @staticmethod
    def of(numbers: list[float], wanted: int) -> Settings:
        if len(numbers) != 5:
            raise ValueError(f"logprobs: numbers: expected temperature, scale and softcap twice; got {len(numbers)}")
        temperature, *rest = numbers
        return Settings(temperature, Transform(*rest[:2]), Transform(*rest[2:]), wanted)

    def wants(self, output: Want) -> bool:
        return bool(self.wanted & output)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of outputs and arithmetic for logits of `dtype`."""
    return torch.promote_types(dtype, torch.float32)
