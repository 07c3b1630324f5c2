"""nash_pg_loss: the Nash-MD policy-gradient loss, from the logits of both models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...core.checks import Sizes, check_number, check_option, check_tensor
from ...core.registry import built_on
from ..logprobs.layout import IGNORED, Output
from ..logprobs.op import DTYPES, LogprobsProblem, check_constant, logprobs, problem_of
from ..logprobs.op import OP as LOGPROBS
from .sequences import Layout, Sequences, check_layout, layout_symbols
from .weights import KL_MODES, surrogate, token_weights

Scalar = float | torch.Tensor
_OUTPUTS = tuple(Output)  # torch.compile of torch 2.11 cannot iterate over an enum


class NashPGLoss(NamedTuple):
    """The loss and its parts, which are detached and 0 at targets that are not part of a response.

    Args:
        loss (()): to minimise.
        policy_logprobs (as targets): log pi of every token.
        reference_logprobs (as targets): log mu of every token.
        weights (as targets): the factor of each log pi.
        kl (as targets): over the vocabulary, with kl="exact"; else None.
        entropy (as targets): of the policy, where asked for; else None.
    """

    loss: torch.Tensor
    policy_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    weights: torch.Tensor
    kl: torch.Tensor | None
    entropy: torch.Tensor | None


def _describe(
    policy_logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    preference: torch.Tensor | None = None,
    reference_logits: torch.Tensor | None = None,
    **_: object,
) -> LogprobsProblem:
    return problem_of(policy_logits, reference_logits)


OP = built_on(LOGPROBS, "nash_pg_loss", _describe)


def nash_pg_loss(
    policy_logits: torch.Tensor,
    targets: torch.Tensor,
    preference: torch.Tensor | None = None,
    reference_logits: torch.Tensor | None = None,
    *,
    advantage: torch.Tensor | None = None,
    tau: float,
    kl: str = "sequence",
    reference_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    baseline: Scalar | None = None,
    normalizer: Scalar | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> NashPGLoss:
    """Return -sum over sequences and tokens of log pi(y_n) (advantage - tau * price_n), over the normalizer.

    Pass either the advantage, or a preference, whose advantage is P(y > y') - baseline.

    kl says what price_n is: "sequence" the whole sequence's log(pi / mu), as in the paper; "to_go" that of this token
    and later ones; "exact" the exact KL at later tokens, with tau times the exact KL of every token added to the loss;
    all three are unbiased, in this order of variance. "token", the same token's log(pi / mu), is biased and there to
    reproduce runs of TRL up to 1.13.

    With gradient accumulation pass every micro-batch the same normalizer, the sequences of the whole batch: the
    gradients then add up to that batch's.

    Args:
        policy_logits ((B, T, V), or (N, V) with cu_seqlens): float32, bfloat16, float16 or float64.
        targets ((B, T) or (N,) int64): token ids; -100 is not part of the response.
        preference ((B,)): P(y > y'), in [0, 1]; or advantage.
        reference_logits (as policy_logits): a constant.
        advantage ((B,)): any finite numbers, instead of preference and baseline.
        tau: price of leaving the reference, per nat.
        kl: "sequence", "to_go", "exact" or "token".
        reference_logprobs (as targets): instead of reference_logits.
        mask (as targets): 0 is not part of the response.
        cu_seqlens ((B + 1,)): offsets of packed sequences, from 0 to N.
        baseline (number, () or (B,)): subtracted from the preference; None is 1/2.
        normalizer (number or ()): what the sum is divided by; None is the number of sequences.
        temperature: of the log-probabilities trained on.
        entropy: asks for the policy's entropy.
        overwrite_logits: backward writes over the policy's logits, as for `logprobs`.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = "nash_pg_loss"
    sizes: Sizes = {}
    symbols = layout_symbols(cu_seqlens)
    check_tensor(op, "policy_logits", policy_logits, (*symbols, "vocabulary"), DTYPES, sizes)
    device = policy_logits.device
    if reference_logits is not None:
        check_tensor(op, "reference_logits", reference_logits, (*symbols, "vocabulary"), DTYPES, sizes, device)
    terms = check_terms(
        op,
        sizes,
        device,
        targets=targets,
        mask=mask,
        cu_seqlens=cu_seqlens,
        advantage=advantage,
        preference=preference,
        baseline=baseline,
        normalizer=normalizer,
        tau=tau,
        kl=kl,
        reference_model=reference_logits,
        reference_logprobs=reference_logprobs,
    )
    scored = logprobs(
        policy_logits.reshape(-1, policy_logits.shape[-1]),
        terms.layout.targets,
        None if reference_logits is None else reference_logits.reshape(-1, policy_logits.shape[-1]),
        kl=kl == "exact",
        entropy=entropy,
        temperature=temperature,
        overwrite_logits=overwrite_logits,
        backend=backend,
    )
    reference = scored.reference if reference_logits is not None else terms.reference_logprobs
    assert reference is not None, "checked: one of the two is given"
    with torch.no_grad():
        rows = {Output.POLICY: scored.policy, Output.REFERENCE: reference, Output.KL: scored.kl}
        values = torch.stack([torch.zeros_like(reference) if (row := rows.get(o)) is None else row for o in _OUTPUTS])
        sequences = Sequences.from_offsets(terms.layout.offsets(device), targets.numel())
        weights = token_weights(kl, tau, terms.advantage, values, sequences)
        weights = weights.masked_fill(terms.layout.targets == IGNORED, 0)
    total = surrogate(kl, tau, weights, scored.policy, scored.kl) / terms.normalizer
    return as_result(total, values, weights, scored.entropy, targets.shape, kl)


class Terms(NamedTuple):
    """The checked arguments other than the models'."""

    layout: Layout
    advantage: torch.Tensor  # (B,) float64; NaN where a preference is outside [0, 1]
    normalizer: Scalar
    reference_logprobs: torch.Tensor | None  # (N,), 0 where ignored


def check_terms(
    op: str,
    sizes: Sizes,
    device: torch.device,
    *,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    advantage: torch.Tensor | None,
    preference: torch.Tensor | None,
    baseline: Scalar | None,
    normalizer: Scalar | None,
    tau: float,
    kl: str,
    reference_model: torch.Tensor | None,  # its logits or hidden states
    reference_logprobs: torch.Tensor | None,
) -> Terms:
    check_number(op, "tau", tau, 0.0)
    check_option(op, "kl", kl, KL_MODES)
    layout = check_layout(op, targets, mask, cu_seqlens, sizes, device)
    advantage = _check_advantage(op, advantage, preference, baseline, sizes, device)
    given = check_reference(op, reference_model, reference_logprobs, layout, sizes, device)
    if kl == "exact" and reference_model is None:
        raise ValueError(f"{op}: kl: 'exact' needs the reference model, over the vocabulary; got reference_logprobs")
    normalizer = check_normalizer(op, normalizer, layout.sequences, device)
    return Terms(layout, advantage, normalizer, given)


def check_reference(
    op: str,
    model: torch.Tensor | None,  # its logits or hidden states
    logprobs: torch.Tensor | None,  # as targets
    layout: Layout,
    sizes: Sizes,
    device: torch.device,
) -> torch.Tensor | None:  # (N,)
    """Check that one of the two is given; return the log-probabilities, 0 where ignored, if it is they."""
    if (model is None) is (logprobs is None):
        got = "neither" if model is None else "both"
        raise ValueError(f"{op}: reference_logprobs: expected either them or the reference model's; got {got}")
    if logprobs is None:
        return None
    check_tensor(op, "reference_logprobs", logprobs, layout.symbols, DTYPES, sizes, device)
    check_constant(op, "reference_logprobs", logprobs)
    return logprobs.detach().reshape(-1).masked_fill(layout.targets == IGNORED, 0)


def _check_advantage(
    op: str,
    advantage: torch.Tensor | None,
    preference: torch.Tensor | None,
    baseline: Scalar | None,
    sizes: Sizes,
    device: torch.device,
) -> torch.Tensor:  # (B,) float64
    if (advantage is None) is (preference is None):
        got = "neither" if advantage is None else "both"
        raise ValueError(f"{op}: advantage: expected either it or preference; got {got}")
    if advantage is not None:
        if baseline is not None:
            raise ValueError(f"{op}: baseline: expected with preference only; got it with advantage")
        check_constant(op, "advantage", check_tensor(op, "advantage", advantage, ("sequences",), DTYPES, sizes, device))
        return advantage.detach().double()
    preference = check_tensor(op, "preference", preference, ("sequences",), DTYPES, sizes, device)
    probability = as_probabilities(op, "preference", preference)
    if isinstance(baseline, torch.Tensor):
        shape = ("sequences",) if baseline.ndim else ()
        check_constant(op, "baseline", check_tensor(op, "baseline", baseline, shape, DTYPES, sizes, device))
        baseline = baseline.detach().double()
    else:
        baseline = 0.5 if baseline is None else check_number(op, "baseline", baseline)
    return probability - baseline


def check_normalizer(op: str, normalizer: Scalar | None, count: int, device: torch.device) -> Scalar:
    """Return what sums are divided by: `normalizer`, or `count` where it is None."""
    if isinstance(normalizer, torch.Tensor):
        allowed = (*DTYPES, torch.int64, torch.int32)
        return check_tensor(op, "normalizer", normalizer, (), allowed, {}, device).detach()
    return max(count, 1) if normalizer is None else check_number(op, "normalizer", normalizer, 0.0, open_low=True)


def as_probabilities(op: str, name: str, value: torch.Tensor) -> torch.Tensor:  # float64
    """Return constants in [0, 1]. Others raise on the CPU, where reading them needs no synchronisation; elsewhere, and
    in a compiled graph, they become NaN."""
    check_constant(op, name, value)
    value = value.detach().double()
    inside = (value >= 0) & (value <= 1)
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(inside.all()):
        raise ValueError(f"{op}: {name}: expected probabilities in [0, 1]; got {float(value[~inside][0])}")
    return torch.where(inside, value, torch.nan)


def as_result(
    total: torch.Tensor,
    values: torch.Tensor,  # (5, N)
    weights: torch.Tensor,  # (N,)
    entropy: torch.Tensor | None,  # (N,)
    shape: Sequence[int],
    kl: str,
) -> NashPGLoss:
    values = values.detach()
    return NashPGLoss(
        total.to(values.dtype),
        values[Output.POLICY].reshape(shape),
        values[Output.REFERENCE].reshape(shape),
        weights.to(values.dtype).reshape(shape),
        values[Output.KL].reshape(shape) if kl == "exact" else None,
        None if entropy is None else entropy.detach().reshape(shape),
    )
