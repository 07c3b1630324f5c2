"""Shared code of the rollout engine's tests: more tiny architectures, and errors against full forward passes."""

from __future__ import annotations

import torch

from nlhf_kernels.core.upstream import attention_name, eager_masks_copy_from_host
from nlhf_kernels.engine import RolloutSettings
from tests.support.tiny_models import _SHAPE, ARCHITECTURES, _config, chosen, random_model, teacher_forced

_GQA = {**_SHAPE, "num_key_value_heads": 2}

#: Every kind of position, mask, head and block that the engine supports.
TINY = {
    **{name: make for name, make in ARCHITECTURES.items() if name != "mamba"},
    "qwen3": _config("Qwen3Config", **_GQA, head_dim=8),
    "gemma3": _config(
        "Gemma3TextConfig", **_GQA, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": _config("Phi3Config", **_GQA),
    "granite": _config("GraniteConfig", **_GQA, logits_scaling=2.0, residual_multiplier=0.5),
    "mixtral": _config("MixtralConfig", **_GQA, num_local_experts=4, num_experts_per_tok=2),
    "falcon": _config("FalconConfig", num_hidden_layers=2, num_attention_heads=4, alibi=True),  # ALiBi, one kv head
    "cohere": _config("CohereConfig", **_GQA, logit_scale=0.5),
    "llama_tied": _config("LlamaConfig", **_GQA, tie_word_embeddings=True),
}

_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 8, "attn_temperature_tuning": False}
#: (batch, tokens, width) becomes (batch * tokens, width) before some linear layers.
FLATTENING = {
    "opt": TINY["opt"],
    "qwen2_moe": _config("Qwen2MoeConfig", **_GQA, **_MOE, num_experts=4, shared_expert_intermediate_size=24),
    "llama4": _config("Llama4TextConfig", **_GQA, **_LLAMA4),
    "jetmoe": _config(
        "JetMoeConfig", **(_GQA | {"intermediate_size": 24}), kv_channels=8, num_local_experts=4, num_experts_per_tok=2
    ),
}


def tiny(architecture: str, seed: int = 1, hidden: int = 32) -> torch.nn.Module:
    return random_model({**ARCHITECTURES, **TINY, **FLATTENING}[architecture](hidden), seed)


def tiny_pair(architecture: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    return tiny(architecture, seed=1, hidden=32), tiny(architecture, seed=2, hidden=48)


def settings(steps: int, **options) -> RolloutSettings:
    return RolloutSettings(steps, **{"seed": 3, "end_ids": (), **options})


def can_be_recorded(model: torch.nn.Module) -> bool:
    """Return whether the installed transformers makes this model's masks as a captured graph permits."""
    return attention_name(model.config) != "eager" or not eager_masks_copy_from_host()


def worst_error(responses, policy, reference, rows: list[torch.Tensor], beta: float, samples: int = 1) -> float:
    """Return the largest error of the reported log-probabilities against full forward passes, in nats."""
    errors = []
    for row in range(len(rows) * samples):
        prompt, count = rows[row // samples], int(responses.lengths[row])
        tokens = responses.tokens[row, :count]
        one = teacher_forced(policy, prompt, tokens)
        two = one if reference is None else teacher_forced(reference, prompt, tokens)
        mixture = ((1 - beta) * one + beta * two).log_softmax(-1)
        pairs = [(one, responses.policy_logprobs), (mixture, responses.mixture_logprobs)]
        pairs += [] if reference is None else [(two, responses.reference_logprobs)]
        errors += [(chosen(truth, tokens) - got[row, :count]).abs().max() for truth, got in pairs]
    return float(torch.stack(errors).max())
