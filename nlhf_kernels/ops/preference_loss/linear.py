"""linear_preference_loss: the same losses from hidden states and heads, through linear_logprobs."""

from __future__ import annotations

import torch

from ...core.checks import Sizes, check_number, check_option, check_tensor
from ..linear_logprobs.head import Head
from ..linear_logprobs.op import linear_logprobs
from ..logprobs.layout import IGNORED
from ..logprobs.op import DTYPES
from ..nash_pg_loss.op import Scalar, check_reference
from ..nash_pg_loss.sequences import Sequences, check_layout, layout_symbols
from .op import KINDS, PreferenceLoss, preference_loss

_OP = "linear_preference_loss"


def linear_preference_loss(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    targets: torch.Tensor,
    preference: torch.Tensor | None = None,
    reference_hidden: torch.Tensor | None = None,
    reference_head: Head | torch.Tensor | None = None,
    *,
    tau: float,
    kind: str = "ipo",
    per_token: bool = False,
    reference_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: Scalar | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> PreferenceLoss:
    """`preference_loss` of the log-ratios of response b and response B + b.

    Heads may be DTensors that tensor-parallel processes share, as in `linear_logprobs`.

    Args:
        hidden ((2 B, T, D), or (N, D) with cu_seqlens): of B preferred responses, then of B others.
        head: the policy's, a Head or its weight (V, D) alone.
        targets ((2 B, T) or (N,) int64): token ids; -100 is not part of the response.
        preference ((B,)): P(y > y'), in [0, 1]; None: y is preferred in every pair.
        reference_hidden ((2 B, T, D') or (N, D')): the reference's hidden states, a constant.
        reference_head: the reference's; None takes the policy's, as a constant.
        tau: price of leaving the reference, above 0.
        kind: "ipo" or "dpo".
        per_token: divides the log-ratios by the responses' lengths.
        reference_logprobs (as targets): instead of reference_hidden.
        mask (as targets): 0 is not part of the response.
        cu_seqlens ((2 B + 1,)): offsets of packed sequences, from 0 to N.
        normalizer (number or ()): what the sum is divided by; None is the number of pairs.
        temperature: of the log-probabilities trained on.
        chunk_bytes: bytes of logits held at a time; None takes 64 MiB on a CPU, on a GPU 512 MiB to 2 GiB, as its free
            memory permits.
        backend: see `use_backend`; None leaves the choice to it.
    """
    sizes: Sizes = {}
    symbols = layout_symbols(cu_seqlens)
    check_tensor(_OP, "hidden", hidden, (*symbols, "hidden"), DTYPES, sizes)
    check_number(_OP, "tau", tau, 0.0, open_low=True)
    check_option(_OP, "kind", kind, KINDS)
    layout = check_layout(_OP, targets, mask, cu_seqlens, sizes, hidden.device)
    if layout.sequences % 2:
        raise ValueError(f"{_OP}: hidden: expected B preferred responses, then B others; got {layout.sequences}")
    given = check_reference(_OP, reference_hidden, reference_logprobs, layout, sizes, hidden.device)
    scored = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        layout.targets,
        None if reference_hidden is None else reference_hidden.reshape(-1, reference_hidden.shape[-1]),
        reference_head,
        temperature=temperature,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    reference = scored.reference if given is None else given
    assert reference is not None, "checked: one of the two is given"
    sequences = Sequences.from_offsets(layout.offsets(hidden.device), layout.targets.numel())
    ratios = sequences.sums(scored.policy - reference)
    pairs = layout.sequences // 2
    lengths = sequences.sums((layout.targets != IGNORED).double()).long()
    result = preference_loss(
        ratios[:pairs],
        ratios[pairs:],
        preference,
        tau=tau,
        kind=kind,
        lengths=(lengths[:pairs], lengths[pairs:]) if per_token else None,
        normalizer=normalizer,
    )
    return PreferenceLoss(*(part.to(scored.policy.dtype) for part in result))
