"""From experience to a loss: one forward pass of the policy's body, and the fused losses on its hidden states."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.models import evaluating
from ..engine.peft_models import adapters_off
from ..ops import Head, linear_logprobs, linear_nash_pg_loss, linear_preference_loss
from .config import NashConfig
from .experience import Experience
from .heads import head_of, hidden_states


class Learner:
    """`reference` None: the policy's own base, adapters off. `anchor`: mirror prox's snapshot, a model."""

    def __init__(self, config: NashConfig, policy: Any, reference: Any, anchor: Any) -> None:
        self.config, self.policy, self.reference, self.anchor = config, policy, reference, anchor

    def loss(self, model: Any, made: Experience, tau: float, normalizer: float) -> torch.Tensor:
        """`model`: the policy in whatever wrapper trains it. The normalizer is pairs, of the whole batch."""
        hidden = _answers(hidden_states(model, made.input_ids[:, :-1], made.attention_mask[:, :-1]), made)
        head = head_of(self.policy)
        if self.config.plan.loss == "ipo":
            return self._ipo(hidden, head, made, tau, normalizer)
        return self._policy_gradient(hidden, head, made, tau, normalizer)

    def _ipo(self, hidden: torch.Tensor, head: Head, made: Experience, tau: float, normalizer: float) -> torch.Tensor:
        preference = (0.5 + made.advantage).clamp(0, 1)
        return linear_preference_loss(
            hidden,
            head,
            made.targets,
            preference=preference.float().to(hidden.device),
            reference_logprobs=made.reference_logprobs,
            tau=tau,
            normalizer=normalizer,
            backend=self.config.backend,
        ).loss

    def _policy_gradient(
        self, hidden: torch.Tensor, head: Head, made: Experience, tau: float, normalizer: float
    ) -> torch.Tensor:
        reference: dict[str, Any] = {"reference_logprobs": made.reference_logprobs}
        if self.config.kl == "exact":
            reference = self._reference_states(made)
        elif self.anchor is not None:
            tau, reference = self._between(made, tau)
        return linear_nash_pg_loss(
            hidden,
            head,
            made.targets,
            advantage=made.advantage.to(hidden.device),
            tau=tau,
            kl=self.config.kl,
            normalizer=normalizer,
            backend=self.config.backend,
            **reference,
        ).loss

    @torch.no_grad()
    def _reference_states(self, made: Experience) -> dict[str, Any]:
        inputs = made.input_ids[:, :-1], made.attention_mask[:, :-1]
        if self.reference is not None:
            hidden, head = hidden_states(self.reference, *inputs), head_of(self.reference)
        else:  # one frozen head for both
            with evaluating(self.policy), adapters_off(self.policy):
                hidden, head = hidden_states(self.policy, *inputs), None
        return {"reference_hidden": _answers(hidden, made), "reference_head": head}

    @torch.no_grad()
    def _between(self, made: Experience, tau: float) -> tuple[float, dict[str, Any]]:
        """tau log(pi / mu) + a log(pi / anchor) is (tau + a) log(pi / m), with m between mu and the anchor."""
        inputs = made.input_ids[:, :-1], made.attention_mask[:, :-1]
        hidden = _answers(hidden_states(self.anchor, *inputs), made)
        anchored = linear_logprobs(hidden, head_of(self.anchor), made.targets, backend=self.config.backend).policy
        price = tau + self.config.anchor_weight
        share = self.config.anchor_weight / price if price else 0.0
        return price, {"reference_logprobs": torch.lerp(made.reference_logprobs, anchored, share)}


def _answers(hidden: torch.Tensor, made: Experience) -> torch.Tensor:  # (R, T, D)
    """The states that predict the answer's tokens. A slice is copied: the losses want rows that lie together."""
    return hidden[:, -made.targets.shape[1] :].contiguous()
