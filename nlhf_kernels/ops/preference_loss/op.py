"""preference_loss: IPO and DPO, with hard or soft preferences, over the log-ratios of two responses a prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core.checks import Sizes, check_number, check_option, check_tensor
from ...core.registry import Backend, Op, register
from ..logprobs.layout import real_dtype
from ..logprobs.op import DTYPES
from ..nash_pg_loss.op import Scalar, as_probabilities, check_normalizer

KINDS = ("ipo", "dpo")
_NOTHING_TO_FUSE = (
    "a few operations on one number a pair; what costs is the log-ratios, which linear_preference_loss "
    "takes from linear_logprobs"
)


class PreferenceLoss(NamedTuple):
    """The loss and its parts, which are detached.

    Args:
        loss (()): to minimise.
        margin ((B,)): h = log pi(y) / mu(y) - log pi(y') / mu(y').
        first ((B,)): log pi(y) / mu(y); per token where lengths were given.
        second ((B,)): likewise of y'.
    """

    loss: torch.Tensor
    margin: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


class PreferenceLossProblem(NamedTuple):
    device: torch.device


OP = register(
    Op(
        name="preference_loss",
        backends=(Backend("torch", "nlhf_kernels.ops.preference_loss.oracle:preference_loss"),),
        order={"cuda": ("torch",), "cpu": ("torch",)},
        describe=lambda first, *_, **__: PreferenceLossProblem(first.device),
        absent=dict.fromkeys(("triton", "cuda", "cpu"), _NOTHING_TO_FUSE),
    )
)


def preference_loss(
    first: torch.Tensor,
    second: torch.Tensor,
    preference: torch.Tensor | None = None,
    *,
    tau: float,
    kind: str = "ipo",
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalizer: Scalar | None = None,
) -> PreferenceLoss:
    """Return IPO's or DPO's loss of log-ratios, summed over pairs and divided by the normalizer.

    With h = first - second and p = preference:

        ipo   p (h - 1 / (2 tau))^2 + (1 - p) (h + 1 / (2 tau))^2
        dpo   -p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h)

    A fixed data set and p = 1 are IPO and DPO as published. Online IPO is "ipo" with y, y' drawn from the policy and
    judged; IPO-MD the same with y, y' drawn from its mixture with the reference: only the sampler differs.
    Differentiable in the log-ratios.

    Args:
        first ((B,)): log pi(y) / mu(y), summed over the response.
        second ((B,)): log pi(y') / mu(y').
        preference ((B,)): P(y > y'), in [0, 1]; None: y is preferred in every pair.
        tau: price of leaving the reference, above 0.
        kind: "ipo" or "dpo".
        lengths (pair of (B,)): tokens of y and of y', which make both log-ratios means per token.
        normalizer (number or ()): what the sum is divided by; None is the number of pairs.
    """
    op = "preference_loss"
    sizes: Sizes = {}
    check_tensor(op, "first", first, ("pairs",), DTYPES, sizes)
    check_tensor(op, "second", second, ("pairs",), DTYPES, sizes, first.device)
    check_number(op, "tau", tau, 0.0, open_low=True)
    check_option(op, "kind", kind, KINDS)
    p: torch.Tensor | float = 1.0
    if preference is not None:
        check_tensor(op, "preference", preference, ("pairs",), DTYPES, sizes, first.device)
        p = as_probabilities(op, "preference", preference)
    if lengths is not None:
        first, second = (_per_token(op, *pair, sizes) for pair in zip((first, second), lengths, strict=True))
    divisor = check_normalizer(op, normalizer, sizes["pairs"], first.device)
    margin = first.double() - second.double()
    if kind == "ipo":
        target = 1 / (2 * tau)
        each = p * (margin - target) ** 2 + (1 - p) * (margin + target) ** 2
    else:
        log_sigmoid = torch.nn.functional.logsigmoid
        each = -p * log_sigmoid(tau * margin) - (1 - p) * log_sigmoid(-tau * margin)
    real = real_dtype(first.dtype)
    loss = (each.sum() / divisor).to(real)
    return PreferenceLoss(loss, margin.detach().to(real), first.detach(), second.detach())


def _per_token(op: str, log_ratio: torch.Tensor, length: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    check_tensor(op, "lengths", length, ("pairs",), (torch.int64, torch.int32), sizes, log_ratio.device)
    mean: torch.Tensor = log_ratio / length.clamp(min=1)  # an empty response has log-ratio 0, whatever it is divided by
    return mean
