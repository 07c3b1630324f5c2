"""Passes over prompts that are recorded, as steps are: which ones that pays for, their shapes and their inputs.

A recorded pass saves the models' Python code, so it pays where the host needs longer for a pass than the GPU. It reads
prompts from tensors of one address, whose width is a multiple of PROMPT_BUCKET, so that a few graphs serve all widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .model_info import ModelInfo
from .request import Prompts

PROMPT_BUCKET = 64  # tokens: more pad prompts by more, fewer need more graphs

#: Seconds of Python code and launches per layer: an estimate, from layers of Qwen2 so small that nothing else counts.
#: `benchmarks.rollout` times recorded and unrecorded passes beside each other.
HOST_SECONDS_PER_LAYER = 0.4e-3
#: Floating-point operations a second in 16 bits: half of what an H200 reached in products of 8192 x 8192 matrices,
#: since a layer's are smaller. Products in float32 take 16 times as long (NVIDIA's data sheet: 989 and 67 TFLOP/s).
FLOPS_PER_SECOND = 3.5e14
FLOAT32_FACTOR = 16


def widened(prompts: Prompts, width: int) -> Prompts:
    """Return the prompts with padding on the left up to this width."""
    padding = width - prompts.width
    if not padding:
        return prompts
    ids, mask = (torch.nn.functional.pad(values, (padding, 0)) for values in (prompts.ids, prompts.mask))
    return Prompts(ids, mask, padded=True)


def host_takes_longer(models: Sequence[ModelInfo], passes: Sequence[ModelInfo], tokens: int) -> bool:
    """Estimate whether reading takes the host longer than the GPU.

    Args:
        models: those that read the prompts.
        passes: of them, those whose code runs: one of two in one pass.
        tokens: of all prompts, padding included.
    """
    host = HOST_SECONDS_PER_LAYER * sum(len(info.layers) for info in passes)
    operations = [2 * info.weights * tokens * (FLOAT32_FACTOR if info.dtype.itemsize > 2 else 1) for info in models]
    return sum(operations) / FLOPS_PER_SECOND < host


class PromptInputs:
    """The tensors that recorded passes read: at one address, and contiguous at every shape of up to `tokens` tokens."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.mask = torch.zeros(tokens, dtype=torch.int64, device=device)

    @staticmethod
    def bytes(tokens: int) -> int:
        return 2 * 8 * tokens

    def load(self, prompts: Prompts) -> Prompts:
        """Copy prompts in, and return them as views of these tensors."""
        ids, mask = (
            buffer[: values.numel()].view(values.shape).copy_(values)
            for buffer, values in ((self.ids, prompts.ids), (self.mask, prompts.mask))
        )
        return Prompts(ids, mask, prompts.padded)
