"""What the backends of logprobs share: inputs, the order of the outputs, how both are allocated."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

import torch

IGNORED = -100  # a target that is not scored: its outputs and gradients are 0
ELSEWHERE = -(2**31)  # in backward, over a slice of the vocabulary: a target that is a token of another slice


class Output(IntEnum):
    """Rows of `values` (5, N): the caller's outputs, 0 where not requested."""

    POLICY = 0
    REFERENCE = 1
    ENTROPY = 2
    KL = 3
    MIXTURE = 4


class Normalizer(IntEnum):
    """Rows of `normalizers` (6, N): what backward needs to recompute a probability from its logit.

    Maximum and logarithm of the sum stay apart: their sum, log-sum-exp, loses the digits of a probability where all
    logits carry a large common offset.
    """

    POLICY_MAX = 0
    POLICY_LOG_SUM = 1
    REFERENCE_MAX = 2
    REFERENCE_LOG_SUM = 3
    MIXTURE_MAX = 4
    MIXTURE_LOG_SUM = 5


class Extra(IntFlag):
    """Outputs beside the log-probabilities, computed on request."""

    ENTROPY = 1
    KL = 2
    MIXTURE = 4


class Transform(NamedTuple):
    """From the products x of a model's head to its logits: scale * x, then softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none


class Settings(NamedTuple):
    """The scalar settings of a call."""

    temperature: float = 1.0
    policy: Transform = Transform()
    reference: Transform = Transform()
    extras: int = 0  # of Extra

    def computes(self, extra: Extra) -> bool:
        return bool(self.extras & extra)


class LogprobsInputs(NamedTuple):
    policy: torch.Tensor  # (N, V) logits; elements of a row lie side by side
    reference: torch.Tensor | None  # (N, V), likewise; a constant
    targets: torch.Tensor  # (N,) int64
    beta: torch.Tensor | None  # () or (N,), in the dtype of the outputs
    settings: Settings
    backend: str


class LogprobsBackwardInputs(NamedTuple):
    values: torch.Tensor  # (5, N), see Output
    normalizers: torch.Tensor  # (6, N), see Normalizer
    upstream: torch.Tensor  # (5, N), the gradient of `values`
    forward: LogprobsInputs


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of outputs and arithmetic for logits of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def empty_outputs(inputs: LogprobsInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate values (5, N) and normalizers (6, N)."""
    policy = inputs.policy
    real, rows = real_dtype(policy.dtype), policy.shape[0]
    return policy.new_empty((len(Output), rows), dtype=real), policy.new_empty((len(Normalizer), rows), dtype=real)
