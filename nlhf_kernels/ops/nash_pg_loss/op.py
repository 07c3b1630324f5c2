"""nash_pg_loss: the Nash-MD policy-gradient loss, from the logits of both models."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core.checks import Sizes, check_number, check_option, check_tensor
from ...core.registry import built_on
from ..logprobs.layout import IGNORED, Output
from ..logprobs.op import DTYPES, LogprobsProblem, check_constant, logprobs
from ..logprobs.op import OP as LOGPROBS
from .sequences import Layout, Sequences, check_layout, layout_symbols
from .weights import KL_MODES, surrogate, token_weights

Scalar = float | torch.Tensor


class NashPGLoss(NamedTuple):
    """The loss, and what it was made of: detached, shaped like the targets, 0 where ignored."""

    loss: torch.Tensor  # ()
    policy_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    weights: torch.Tensor  # what each log-probability was multiplied with
    kl: torch.Tensor | None  # over the vocabulary, per token; with kl="exact"
    entropy: torch.Tensor | None  # where asked for


def _describe(
    policy_logits: torch.Tensor, targets: Any = None, preference: Any = None, reference_logits: Any = None, **_: Any
) -> LogprobsProblem:
    logits = [policy_logits] if reference_logits is None else [policy_logits, reference_logits]
    return LogprobsProblem(policy_logits.device, tuple(model.dtype for model in logits))


OP = built_on(LOGPROBS, "nash_pg_loss", _describe)


def nash_pg_loss(
    policy_logits: torch.Tensor,  # (B, T, V), or (N, V) with cu_seqlens
    targets: torch.Tensor,  # (B, T) or (N,) int64; -100: not part of the response
    preference: torch.Tensor | None = None,  # (B,) P(y > y'), in [0, 1]; or advantage
    reference_logits: torch.Tensor | None = None,  # as policy_logits
    *,
    advantage: torch.Tensor | None = None,  # (B,), any finite numbers; instead of preference and baseline
    tau: float,
    kl: str = "sequence",
    reference_logprobs: torch.Tensor | None = None,  # as targets; instead of reference_logits
    mask: torch.Tensor | None = None,  # as targets; 0: not part of the response
    cu_seqlens: torch.Tensor | None = None,  # (B + 1,) offsets of packed sequences, from 0 to N
    baseline: Scalar | None = None,  # number, () or (B,), with preference; None: 1/2
    normalizer: Scalar | None = None,  # None: the number of sequences
    temperature: float = 1.0,
    entropy: bool = False,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> NashPGLoss:
    """-sum over sequences and tokens of log pi(y_n) (advantage - tau * price_n), over the normalizer.

    The advantage is given, or a preference is, which stands for P(y > y') - baseline.

    kl says what price_n is: "sequence" the whole sequence's log(pi / mu), as in the paper; "to_go" that of this token
    and later ones; "exact" the exact KL at later tokens, with tau times the exact KL of every token added to the loss;
    all three are unbiased, in this order of variance. "token", the same token's log(pi / mu), is biased and there to
    reproduce runs of TRL up to 1.13. The temperature is that of the log-probabilities trained on.

    With gradient accumulation give every micro-batch the same normalizer, the sequences of the whole batch: the
    gradients then add up to that batch's. overwrite_logits is `logprobs`'.
    """
    op = "nash_pg_loss"
    sizes: Sizes = {}
    symbols = layout_symbols(cu_seqlens)
    check_tensor(op, "policy_logits", policy_logits, (*symbols, "vocabulary"), DTYPES, sizes)
    device = policy_logits.device
    if reference_logits is not None:
        check_tensor(op, "reference_logits", reference_logits, (*symbols, "vocabulary"), DTYPES, sizes, device)
    terms = check_terms(
        op, targets, mask, cu_seqlens, advantage, preference, baseline, normalizer, tau, kl,
        (reference_logits, reference_logprobs), sizes, device,
    )  # fmt: skip
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
        values = torch.stack([torch.zeros_like(reference) if (row := rows.get(o)) is None else row for o in Output])
        sequences = Sequences.from_offsets(terms.layout.offsets(device), targets.numel())
        weights = token_weights(kl, tau, terms.advantage, values, sequences)
        weights = weights.masked_fill(terms.layout.targets == IGNORED, 0)
    total = surrogate(kl, tau, weights, scored.policy, scored.kl) / terms.normalizer
    return as_result(total, values, weights, scored.entropy, targets.shape, kl)


class Terms(NamedTuple):
    """The checked arguments beside the models."""

    layout: Layout
    advantage: torch.Tensor  # (B,) float64; NaN where a preference is outside [0, 1]
    normalizer: Scalar
    reference_logprobs: torch.Tensor | None  # (N,), 0 where ignored


def check_terms(
    op: str,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    advantage: torch.Tensor | None,
    preference: torch.Tensor | None,
    baseline: Scalar | None,
    normalizer: Scalar | None,
    tau: float,
    kl: str,
    reference: tuple[torch.Tensor | None, torch.Tensor | None],
    sizes: Sizes,
    device: torch.device,
) -> Terms:
    check_number(op, "tau", tau, 0.0)
    check_option(op, "kl", kl, KL_MODES)
    layout = check_layout(op, targets, mask, cu_seqlens, sizes, device)
    advantage = _check_advantage(op, advantage, preference, baseline, sizes, device)
    model, given = reference
    if (model is None) is (given is None):
        got = "neither" if model is None else "both"
        raise ValueError(f"{op}: reference_logprobs: expected either them or the reference model's; got {got}")
    if kl == "exact" and model is None:
        raise ValueError(f"{op}: kl: 'exact' needs the reference model, over the vocabulary; got reference_logprobs")
    if given is not None:
        check_tensor(op, "reference_logprobs", given, layout.symbols, DTYPES, sizes, device)
        check_constant(op, "reference_logprobs", given)
        given = given.detach().reshape(-1).masked_fill(layout.targets == IGNORED, 0)
    return Terms(layout, advantage, check_normalizer(op, normalizer, layout.sequences, device), given)


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
    check_probabilities(op, "preference", preference)
    if isinstance(baseline, torch.Tensor):
        shape = ("sequences",) if baseline.ndim else ()
        baseline = check_tensor(op, "baseline", baseline, shape, DTYPES, sizes, device).detach().double()
    else:
        baseline = 0.5 if baseline is None else check_number(op, "baseline", baseline)
    probability = preference.detach().double()
    return torch.where((probability >= 0) & (probability <= 1), probability, torch.nan) - baseline


def check_normalizer(op: str, normalizer: Scalar | None, count: int, device: torch.device) -> Scalar:
    """What sums are divided by; `count` where none is given."""
    if isinstance(normalizer, torch.Tensor):
        allowed = (*DTYPES, torch.int64, torch.int32)
        return check_tensor(op, "normalizer", normalizer, (), allowed, {}, device).detach()
    return max(count, 1) if normalizer is None else check_number(op, "normalizer", normalizer, 0.0, open_low=True)


def check_probabilities(op: str, name: str, value: torch.Tensor) -> None:
    """On the CPU, where looking costs no synchronisation; elsewhere, and in a compiled graph, wrong ones become NaN."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((value >= 0) & (value <= 1))
        if bool(wrong.any()):
            raise ValueError(f"{op}: {name}: expected probabilities in [0, 1]; got {float(value[wrong][0])}")


def as_result(
    total: torch.Tensor,
    values: torch.Tensor,  # (5, N)
    weights: torch.Tensor,  # (N,)
    entropy: torch.Tensor | None,  # (N,)
    shape: Any,
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
