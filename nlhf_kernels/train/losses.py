"""The loss of an experience: one forward pass of the policy's body, and a fused loss on its hidden states."""

from __future__ import annotations

from typing import Any

import torch

from ..core.modes import eval_mode
from ..engine.peft_models import adapters_off
from ..ops import Head, linear_logprobs, linear_nash_pg_loss, linear_preference_loss
from .config import NashConfig
from .experience import Experience
from .heads import apply_at_head, head_of, hidden_states


class PolicyLoss:
    """The loss of a micro-batch: policy gradient, IPO or DPO, as set by the algorithm.

    Args:
        config: the run's configuration.
        policy: the trained model.
        reference: the frozen reference; None: the policy's own base, adapters off.
        anchor: mirror prox's snapshot, a model; None for other algorithms.
    """

    def __init__(self, config: NashConfig, policy: Any, reference: Any, anchor: Any) -> None:
        self.config, self.policy, self.reference, self.anchor = config, policy, reference, anchor

    def __call__(self, model: Any, experience: Experience, tau: float, normalizer: float) -> torch.Tensor:
        """Return the loss of one micro-batch, divided by `normalizer`.

        Args:
            model: the policy in the wrapper that trains it.
            experience: the micro-batch.
            tau: coefficient of the KL penalty.
            normalizer: pairs of the whole update.
        """
        reference: dict[str, Any] = {"reference_logprobs": experience.reference_logprobs}
        of_pairs = self.config.algorithm_spec.trains_pairs
        if not of_pairs and self.config.kl == "exact":
            reference = self._reference_states(experience)
        elif not of_pairs and self.anchor is not None:
            tau, reference = self._towards_anchor(experience, tau)

        def loss(states: torch.Tensor) -> torch.Tensor:
            hidden, head = _of_answers(states, experience), head_of(self.policy)
            if of_pairs:
                return self._of_pairs(hidden, head, experience, tau, normalizer)
            return self._policy_gradient(hidden, head, experience, tau, normalizer, reference)

        return apply_at_head(model, experience.input_ids[:, :-1], experience.attention_mask[:, :-1], loss)

    def _of_pairs(
        self, hidden: torch.Tensor, head: Head, experience: Experience, tau: float, normalizer: float
    ) -> torch.Tensor:
        preference = (0.5 + experience.advantage).clamp(0, 1)
        return linear_preference_loss(
            hidden,
            head,
            experience.targets,
            preference=preference.float().to(hidden.device),
            reference_logprobs=experience.reference_logprobs,
            tau=tau,
            kind=self.config.algorithm_spec.loss,
            normalizer=normalizer,
            backend=self.config.backend,
        ).loss

    def _policy_gradient(
        self,
        hidden: torch.Tensor,
        head: Head,
        experience: Experience,
        tau: float,
        normalizer: float,
        reference: dict[str, Any],
    ) -> torch.Tensor:
        return linear_nash_pg_loss(
            hidden,
            head,
            experience.targets,
            advantage=experience.advantage.to(hidden.device),
            tau=tau,
            kl=self.config.kl,
            normalizer=normalizer,
            backend=self.config.backend,
            **reference,
        ).loss

    @torch.no_grad()
    def _reference_states(self, experience: Experience) -> dict[str, Any]:
        """Return the reference's hidden states and head, which the exact KL needs."""
        if self.reference is not None:
            hidden, head = _answer_states(self.reference, experience), head_of(self.reference)
        else:  # one frozen head for both
            with eval_mode(self.policy), adapters_off(self.policy):
                hidden, head = _answer_states(self.policy, experience), None
        return {"reference_hidden": hidden, "reference_head": head}

    @torch.no_grad()
    def _towards_anchor(self, experience: Experience, tau: float) -> tuple[float, dict[str, Any]]:
        """Return one coefficient and one reference for the penalties towards the reference mu and the anchor.

        tau log(pi / mu) + a log(pi / anchor) is (tau + a) log(pi / m), where log m is between log mu and log anchor.
        """
        hidden, targets = _answer_states(self.anchor, experience), experience.targets
        anchor_logprobs = linear_logprobs(hidden, head_of(self.anchor), targets, backend=self.config.backend).policy
        price = tau + self.config.anchor_weight
        share = self.config.anchor_weight / price if price else 0.0
        return price, {"reference_logprobs": torch.lerp(experience.reference_logprobs, anchor_logprobs, share)}


def _answer_states(model: Any, experience: Experience) -> torch.Tensor:  # (R, T, D)
    """Return the hidden states that predict the answers' tokens, contiguous, as the losses need them."""
    hidden = hidden_states(model, experience.input_ids[:, :-1], experience.attention_mask[:, :-1])
    return _of_answers(hidden, experience)


def _of_answers(states: torch.Tensor, experience: Experience) -> torch.Tensor:  # (R, S, D) -> (R, T, D)
    return states[:, -experience.targets.shape[1] :].contiguous()
