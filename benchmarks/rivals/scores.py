"""Log-probabilities of given tokens as computed by PyTorch, TRL, Liger, QuACK and Apple's cut_cross_entropy.

Their names are those of liger-kernel 0.8.5, quack-kernels 0.6.5 and cut-cross-entropy 25.1.1.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ..harness.case import Inputs

TRUTH_BLOCK = 1 << 30  # bytes of float64 logits that the truth holds at a time

OfModel = Callable[..., torch.Tensor]  # (hidden (B, T, D), weight (V, D), targets (B, T)) -> (B, T)


class Scores(NamedTuple):
    """The fields of the library's Logprobs, in its order."""

    policy: torch.Tensor  # (B, T)
    reference: torch.Tensor | None
    kl: torch.Tensor | None  # over the vocabulary


OfBoth = Callable[..., Scores]  # (hidden, weight, targets, reference_hidden, reference_weight, kl=) -> Scores


def real(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def from_logits(
    policy: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None, *, kl: bool = False, **_: Any
) -> Scores:
    """Score in plain PyTorch: log_softmax in float32, gather; the exact KL as a sum over the vocabulary."""
    index = targets.unsqueeze(-1)
    log_p = real(policy).log_softmax(-1)
    log_q = None if reference is None else real(reference).log_softmax(-1)
    divergence = None if log_q is None or not kl else (log_p.exp() * (log_p - log_q)).sum(-1)
    of_reference = None if log_q is None else log_q.gather(-1, index).squeeze(-1)
    return Scores(log_p.gather(-1, index).squeeze(-1), of_reference, divergence)


def selective(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score as TRL's selective_log_softmax: sequence by sequence; half precision uses the full, rounded log_softmax."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(sequence, dim=-1) for sequence in logits])
    scored = [
        sequence.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        for sequence, index in zip(logits, targets, strict=True)
    ]
    return torch.stack(scored)


def selective_from_logits(
    policy: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None, **_: Any
) -> Scores:
    return Scores(selective(policy, targets), None if reference is None else selective(reference, targets), None)


def full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | None = None,
    *,
    kl: bool = False,
) -> Scores:
    """Compute both models' full logits, then `from_logits`."""
    reference = None
    if reference_hidden is not None and reference_weight is not None:
        reference = torch.nn.functional.linear(reference_hidden, reference_weight)
    return from_logits(torch.nn.functional.linear(hidden, weight), targets, reference, kl=kl)


def of_both(of_model: OfModel) -> OfBoth:
    """Score both models with a function that scores one."""

    def score(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        reference_hidden: torch.Tensor | None = None,
        reference_weight: torch.Tensor | None = None,
        **_: Any,
    ) -> Scores:
        policy, reference = of_model(hidden, weight, targets), None
        if reference_hidden is not None:
            with torch.no_grad():
                reference = of_model(reference_hidden, reference_weight, targets)
        return Scores(policy, reference, None)

    return score


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score as Liger's fused linear losses (GRPO, PPO) score a chunk of sequences."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    scored: torch.Tensor = LigerFusedLinearPPOBase.chunk_forward(hidden, weight, targets)
    return scored


def liger_triton(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score with Liger's fused linear cross entropy in Triton; with reduction="none" backward computes it again."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return -loss(weight, hidden.flatten(0, 1), targets.flatten()).view_as(targets)


def liger_sm90(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score with Liger's scaled cross-entropy for Hopper: bfloat16, logits never stored, computed again in backward."""
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # its check waits for the device; ours has none
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    loss = LigerFusedScaledCrossEntropySM90Function.apply(hidden.flatten(0, 1), weight, targets.flatten(), 1.0, -100)
    return -loss.view_as(targets)


def liger_sm90_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the scores with Liger's fused linear cross-entropy for Hopper: logits stored, gradients made from them."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import LigerFusedLinearCrossEntropySM90Function

    return -LigerFusedLinearCrossEntropySM90Function.apply(hidden.flatten(0, 1), weight, targets.flatten(), -100, "sum")


def quack(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score with PyTorch's product and QuACK's cross-entropy, whose gradient overwrites the stored logits."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    flat = hidden.flatten(0, 1), weight, None, targets.flatten()
    loss: torch.Tensor = linear_cross_entropy_func(*flat, reduction="none", inplace_backward=True)
    return -loss.view_as(targets)


def quack_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the scores with QuACK's chunked linear cross-entropy: it reduces, and makes its gradients in forward."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: torch.Tensor = chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), reduction="sum")
    return -loss


def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score without the gradient filter, which would skip nearly all entries of random data and their work."""
    from cut_cross_entropy import linear_cross_entropy

    loss: torch.Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)
    return -loss


def why_not(module: str) -> Callable[[Inputs], tuple[str, ...]]:
    """Make the `why_not` of a third-party rival that needs a GPU and does not compute the KL over the vocabulary."""

    def reasons(inputs: Inputs) -> tuple[str, ...]:
        found = []
        if importlib.util.find_spec(module) is None:
            found.append(f"{module} does not import (pip install {module.replace('_', '-')})")
        if inputs.args[0].device.type != "cuda":
            found.append(f"the tensors are on {inputs.args[0].device}, {module} needs a GPU")
        return (*found, *without_kl(inputs))

    return reasons


def without_kl(inputs: Inputs) -> tuple[str, ...]:
    asked = inputs.kwargs.get("kl") in (True, "exact")
    return ("it does not compute the KL over the vocabulary",) if asked else ()


def _by_blocks(score: Callable[[slice], Scores], targets: torch.Tensor, vocabulary: int) -> Scores:
    """Call `score(rows)` on blocks of tokens that fit into TRUTH_BLOCK; recompute each block in backward."""
    count = max(1, TRUTH_BLOCK // (8 * vocabulary))
    blocks = [slice(first, first + count) for first in range(0, targets.numel(), count)]
    columns = zip(*(checkpoint(score, rows, use_reentrant=False) for rows in blocks), strict=True)
    policy, reference, kl = (None if column[0] is None else torch.cat(column).view_as(targets) for column in columns)
    assert policy is not None, "every model is scored"
    return Scores(policy, reference, kl)


def true_from_logits(
    policy: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None, *, kl: bool = False, **_: Any
) -> Scores:
    """Compute `from_logits` by blocks, so that the truth of large shapes fits into memory."""

    def score(rows: slice) -> Scores:
        other = None if reference is None else reference.flatten(0, 1)[rows]
        return from_logits(policy.flatten(0, 1)[rows], targets.flatten()[rows], other, kl=kl)

    return _by_blocks(score, targets, policy.shape[-1])


def true_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | None = None,
    *,
    kl: bool = False,
) -> Scores:
    """Compute `full_logits` by blocks, so that the truth of large shapes fits into memory."""

    def score(rows: slice) -> Scores:
        other = None if reference_hidden is None else reference_hidden.flatten(0, 1)[rows]
        return full_logits(hidden.flatten(0, 1)[rows], weight, targets.flatten()[rows], other, reference_weight, kl=kl)

    return _by_blocks(score, targets, weight.shape[0])
