"""The oracle: the Nash-MD policy-gradient loss sequence by sequence, from its equations (README.md, section 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def nash_pg_loss(
    policy_logits: Sequence[torch.Tensor],  # one (T_b, V) per sequence
    targets: Sequence[torch.Tensor],  # one (T_b,) per sequence; -100: not part of the response
    preference: torch.Tensor,  # (B,)
    reference_logits: Sequence[torch.Tensor],
    *,
    tau: float,
    kl: str = "sequence",
    baseline: float = 0.5,
    normalizer: float | None = None,
) -> torch.Tensor:  # ()
    total = policy_logits[0].new_zeros(())
    for b, (z, y, r) in enumerate(zip(policy_logits, targets, reference_logits, strict=True)):
        scored = y != -100
        log_p, log_q = z[scored].log_softmax(-1), r[scored].log_softmax(-1)
        chosen = y[scored].unsqueeze(1)
        log_pi, log_mu = log_p.gather(1, chosen).squeeze(1), log_q.gather(1, chosen).squeeze(1)
        ratio = (log_pi - log_mu).detach()
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        for n in range(len(log_pi)):
            price = {
                "sequence": ratio.sum(),
                "to_go": ratio[n:].sum(),
                "exact": divergence[n + 1 :].sum().detach(),
                "token": ratio[n],
            }[kl]
            total = total - log_pi[n] * (preference[b] - baseline - tau * price)
        if kl == "exact":
            total = total + tau * divergence.sum()
    return total / (normalizer or len(policy_logits))
