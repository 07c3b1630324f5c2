"""Estimated operations and messages of an update on one rank, counted from configurations, not measured.

Only matrix products and attention are counted, and only bytes that leave a rank. Texts are as long as they can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import NashConfig
from .layout import Layout
from .memory_plan import Models, micro_batch, recomputes
from .model_shapes import ModelShapes
from .setup import rollout_dtype


@dataclass(frozen=True)
class UpdateCost:
    """The cost of an update on one rank.

    Args:
        rollout_flops: of reading prompts and sampling answers, by all models of the rollouts.
        loss_flops: of the forward and backward passes.
        sent_by_fsdp: bytes that gathering weights and reducing gradients sends.
        sent_by_tensor_parallelism: bytes that summing layers' outputs sends.
    """

    rollout_flops: float
    loss_flops: float
    sent_by_fsdp: float
    sent_by_tensor_parallelism: float


def update_cost(models: Models, args: NashConfig, layout: Layout) -> UpdateCost:
    """Return the cost of an update with all its micro-batches.

    Args:
        models: of the run.
        args: of the run.
        layout: of its processes.
    """
    policy, steps = models.policy, args.gradient_accumulation_steps
    prompt, new = args.max_prompt_length, args.max_new_tokens
    players = args.algorithm_spec.players(0.0, args.samples_per_prompt, None)
    answers = args.per_device_train_batch_size * sum(player.samples for player in players)
    prompts = args.per_device_train_batch_size * (2 if args.algorithm_spec.own_parameters else 1)
    reference = models.reference or policy
    prompt_work = _flops(policy, prompt) * prompts + _flops(reference, prompt) * args.per_device_train_batch_size
    played = sum(_flops(model, prompt + new) - _flops(model, prompt) for model in (policy, reference))
    rows, tokens = micro_batch(args)
    passes = 4 if recomputes(args) else 3  # a backward pass is two forward passes
    half = (rollout_dtype(args) or policy.dtype).itemsize
    whole, ring = policy.bytes(Layout(tp_size=layout.tp_size), size=lambda _: half), _ring(layout.fsdp_size)
    layers = int(policy.config.get_text_config(decoder=True).num_hidden_layers)
    reductions = 2 * layers * policy.width * half * 2 * _ring(layout.tp_size)  # two a layer, each sent twice round
    texts = rows * tokens * (passes - 1) + (prompts + args.per_device_train_batch_size) * prompt + 2 * answers * new
    return UpdateCost(
        rollout_flops=steps * (prompt_work + answers * played) / layout.tp_size,
        loss_flops=steps * passes * rows * _flops(policy, tokens) / layout.tp_size,
        sent_by_fsdp=ring * (steps * 3 * whole + whole),  # forward, backward, gradients; once for the rollout
        sent_by_tensor_parallelism=steps * reductions * texts,
    )


def _ring(processes: int) -> float:
    """Return the share of a message that every process sends in a ring."""
    return (processes - 1) / processes


def _flops(model: ModelShapes, tokens: int) -> float:
    """Return the operations of a forward pass over one text: two per matrix entry and token, and causal attention."""
    text = model.config.get_text_config(decoder=True)
    matrices = sum(
        math.prod(value.shape)
        for name, value in model.parameters.items()
        if len(value.shape) == 2 and "embed" not in name
    )
    if not any("lm_head" in name for name in model.parameters):  # a tied head is a product, too
        matrices += model.vocabulary * model.width
    width: int = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    layers: int = text.num_hidden_layers
    return 2.0 * matrices * tokens + 2.0 * layers * width * tokens**2
