"""linear_preference_loss: the same losses from hidden states and heads, through linear_logprobs."""

from __future__ import annotations

import torch

from ...core.checks import Sizes, check_number, check_option, check_tensor
from ..linear_logprobs.head import Head
from ..linear_logprobs.op import linear_logprobs
from ..logprobs.layout import IGNORED
from ..logprobs.op import DTYPES
from ..nash_pg_loss.op import Scalar
from ..nash_pg_loss.sequences import Sequences, check_layout, layout_symbols
from .op import KINDS, PreferenceLoss, preference_loss

_OP = "linear_preference_loss"


def linear_preference_loss(
    hidden: torch.Tensor,  # (2 B, T, D): B preferred responses, then B others; or (N, D) with cu_seqlens
    head: Head | torch.Tensor,  # the policy's; its weight (V, D) alone is fine
    targets: torch.Tensor,  # (2 B, T) or (N,) int64; -100: not part of the response
    preference: torch.Tensor | None = None,  # (B,) P(y > y') in [0, 1]; None: y was preferred, always
    reference_hidden: torch.Tensor | None = None,  # as hidden
    reference_head: Head | torch.Tensor | None = None,  # None: the policy's, as a constant
    *,
    tau: float,
    kind: str = "ipo",
    per_token: bool = False,
    reference_logprobs: torch.Tensor | None = None,  # as targets; instead of reference_hidden
    mask: torch.Tensor | None = None,  # as targets; 0: not part of the response
    cu_seqlens: torch.Tensor | None = None,  # (2 B + 1,) offsets of packed sequences, from 0 to N
    normalizer: Scalar | None = None,  # None: the number of pairs
    temperature: float = 1.0,
    chunk_bytes: int | None = None,  # of logits held at a time; None: 512 MiB on a GPU, 64 MiB on a CPU
    backend: str | None = None,
) -> PreferenceLoss:
    """`preference_loss` of the log-ratios of response b and response B + b. per_token divides them by their lengths.

    Heads may be DTensors that tensor-parallel processes share, as in `linear_logprobs`.
    """
    sizes: Sizes = {}
    symbols = layout_symbols(cu_seqlens)
    check_tensor(_OP, "hidden", hidden, (*symbols, "hidden"), DTYPES, sizes)
    check_number(_OP, "tau", tau, 0.0, open_low=True)
    check_option(_OP, "kind", kind, KINDS)
    layout = check_layout(_OP, targets, mask, cu_seqlens, sizes, hidden.device)
    if layout.sequences % 2:
        raise ValueError(f"{_OP}: hidden: expected B preferred responses, then B others; got {layout.sequences}")
    if (reference_hidden is None) is (reference_logprobs is None):
        got = "neither" if reference_hidden is None else "both"
        raise ValueError(f"{_OP}: reference_logprobs: expected either them or reference_hidden; got {got}")
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
    reference = scored.reference
    if reference_logprobs is not None:
        check_tensor(_OP, "reference_logprobs", reference_logprobs, symbols, DTYPES, sizes, hidden.device)
        reference = reference_logprobs.detach().reshape(-1).masked_fill(layout.targets == IGNORED, 0)
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
