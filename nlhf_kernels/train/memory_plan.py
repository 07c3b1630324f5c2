"""The memory of a training run on one rank, by part, for any layout of processes, from configurations alone.

Sizes of models are those of `model_shapes.py`; those that depend on a text's length are of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..engine.graphs import BUCKET
from ..engine.joint_products import GROUPS
from ..engine.memory import COPIES_SHARE, rollout_parts, rows_by_model
from ..engine.recorded_prompts import PROMPT_BUCKET, PromptInputs
from ..ops.linear_logprobs.chunks import CHUNK_BYTES, chunk_bytes_with, chunk_rows
from .config import NashConfig
from .layout import Layout, share_of
from .model_shapes import ModelShapes, Parameter, activation_bytes, layer_shapes, plain_name
from .setup import rollout_dtype

#: Bytes of an optimizer's state per trained parameter, where it has one number per parameter in the parameter's dtype:
#: how many of them. The names are those of transformers' `optim`.
_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "nadam": 2, "radam": 2}


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Args:
        policy: the trained model.
        reference: None: the policy's base where it has adapters.
        eval_opponent: compared with the policy in evaluations; None: no model.
        judges: bytes of the judge's models, on every rank.
    """

    policy: ModelShapes
    reference: ModelShapes | None
    eval_opponent: ModelShapes | None = None
    judges: int = 0


@dataclass(frozen=True)
class RankPlan:
    """The allocations of one rank.

    Args:
        layout: of the processes.
        parts: part -> bytes, at the peak of an update.
    """

    layout: Layout
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self.parts.values())


def plan_rank(
    models: Models, args: NashConfig, layout: Layout, device: str = "cuda", memory: int | None = None
) -> RankPlan:
    """Return the allocations of a rank in the backward pass of an update, with the rollout's buffers still allocated.

    Args:
        models: of the run.
        args: of the run.
        layout: of its processes.
        device: "cuda" or "cpu": determines the budget for logits, and whether steps are recorded.
        memory: bytes of a GPU; some of them decide on more logits at a time and joint products. None: neither.
    """
    half, memory = rollout_dtype(args), memory if device == "cuda" else None
    parts = _trained_state(models.policy, args, layout) | _players(models, args, layout, half)
    parts |= _rollout(models, args, layout, half, device) | _loss(models, args, layout)
    if memory is not None and (copies := _joint_products(models, args, layout, half)) <= COPIES_SHARE * memory:
        parts["joint products"] = copies
    free = None if memory is None else max(0, memory - sum(parts.values()))
    parts["chunk of logits"] = _chunk(models.policy, args, layout, device, free)
    return RankPlan(layout, {name: size for name, size in parts.items() if size})


def micro_batch(args: NashConfig) -> tuple[int, int]:
    """Return the rows of a micro-batch and the tokens that are read of each, at most.

    Args:
        args: of the run.
    """
    rows = args.per_device_train_batch_size * args.samples_per_prompt * (1 + args.algorithm_spec.trains_pairs)
    return rows, args.max_prompt_length + args.max_new_tokens - 1


# ---- the parts -------------------------------------------------------------------------------------------------------


def _trained_state(policy: ModelShapes, args: NashConfig, layout: Layout) -> dict[str, int]:
    trained = policy.bytes(layout, trained=True)
    parts = {
        "policy": policy.bytes(layout),
        "gradients": trained,
        "optimizer": policy.bytes(layout, trained=True, size=lambda value: _state_bytes(str(args.optim), value)),
    }
    if layout.fsdp_size > 1:
        half = 2 if args.bf16 or args.fp16 else policy.dtype.itemsize
        parts["gathered layers"] = _gathered(policy, layout) * half
    elif layout.data_parallel > 1:
        parts["gradient buckets"] = trained  # DDP's, beside the gradients
    return parts


def _state_bytes(optim: str, parameter: Parameter) -> float:
    """Return the bytes of the optimizer's state for one number of a parameter."""
    name = optim.rpartition(".")[2].lower()
    count = next((count for prefix, count in _STATES.items() if name.startswith(prefix)), 2)  # unknown: as AdamW's
    if "adafactor" in name:
        if len(parameter.shape) < 2:
            return 4.0
        rows, columns = parameter.shape[-2:]
        return 4.0 * (rows + columns) / (rows * columns)
    return float(count * (1 if "8bit" in name else parameter.itemsize))


def _gathered(policy: ModelShapes, layout: Layout) -> int:
    """Return the parameters that FSDP2 gathers: two layers at a time (the next is prefetched), and always the head."""
    within = Layout(tp_size=layout.tp_size)
    layers: dict[str, int] = {}
    for name, parameter in policy.parameters.items():
        short = plain_name(name)
        number = next((part for part in short.split(".") if part.isdigit()), "")
        layers[number] = layers.get(number, 0) + share_of(short, parameter.shape, policy.plan, within)
    head = policy.vocabulary * policy.width // layout.tp_size
    largest = max((size for number, size in layers.items() if number), default=0)
    return 2 * largest + head


def _players(models: Models, args: NashConfig, layout: Layout, half: torch.dtype | None) -> dict[str, int]:
    """Return the bytes of the models that sample answers: whole per tensor-parallel group, never sharded by FSDP2."""
    within = Layout(tp_size=layout.tp_size)

    def playing_bytes(model: ModelShapes, trained: bool = False) -> int:
        return model.bytes(within, trained=trained, size=lambda value: half.itemsize if half else value.itemsize)

    policy, parts = models.policy, {}
    if (half is not None and half != policy.dtype) or layout.fsdp_size > 1:
        parts["policy in rollouts"] = playing_bytes(policy)
    if models.reference is not None:
        parts["reference"] = playing_bytes(models.reference)
        if layout.fsdp_size > 1:
            parts["reference, split"] = models.reference.bytes(layout)
    if args.algorithm_spec.own_parameters:
        parts["opponent in rollouts"] = playing_bytes(policy, trained=True)
        if args.algorithm_spec.opponent == "average":
            if half is not None or layout.fsdp_size > 1 or policy.dtype != torch.float32:  # else one tensor is both
                parts["opponent's average"] = policy.bytes(layout, trained=True, size=lambda _: 4)
        else:
            parts["opponent's anchor"] = policy.bytes(layout, trained=True)
            if layout.fsdp_size > 1:
                parts["opponent's snapshots, split"] = policy.bytes(layout, trained=True)
                parts["anchor that scores"] = playing_bytes(policy, trained=True)
    if models.eval_opponent is not None:
        parts["eval_opponent"] = playing_bytes(models.eval_opponent)
    if models.judges:
        parts["judge"] = models.judges
    return parts


def _rollout(models: Models, args: NashConfig, layout: Layout, half: torch.dtype | None, device: str) -> dict[str, int]:
    prompts = args.per_device_train_batch_size
    players = args.algorithm_spec.players(0.0, args.samples_per_prompt, None)
    rows = rows_by_model(prompts, players, mixes=True)
    width = args.max_prompt_length
    if device == "cuda":  # recorded prompts and steps
        width = -(-width // PROMPT_BUCKET) * PROMPT_BUCKET
    length = width + args.max_new_tokens
    if device == "cuda":
        length = -(-length // BUCKET) * BUCKET
    policy = models.policy
    shapes = {"policy": policy, "opponent": policy, "reference": models.reference or policy}
    caches = {}
    for role, count in rows.items():
        layers = layer_shapes(shapes[role], layout.tp_size, half)
        caches[f"{role} cache"] = sum(count * length * layer.bytes for layer in layers)
    itemsize = (half or policy.dtype).itemsize
    every = prompts * sum(player.samples for player in players)
    vocabulary = -(-policy.vocabulary // layout.tp_size)  # of a rank's slice
    if layout.tp_size > 1 and (args.top_k or args.top_p != 1):
        vocabulary += policy.vocabulary  # filters need all logits, which are gathered from slices
    parts = rollout_parts(caches, rows, every, length, args.max_new_tokens, vocabulary, itemsize, kept_logprobs=2)
    return parts | ({"prompts": PromptInputs.bytes(every * length)} if device == "cuda" else {})


def _joint_products(models: Models, args: NashConfig, layout: Layout, half: torch.dtype | None) -> int:
    """Return the bytes of the engine's copies of layers of one input, side by side: query, key and value; gate, up."""
    opponents = [models.policy] if args.algorithm_spec.own_parameters else []
    total = 0
    for model in (models.policy, *opponents, models.reference):
        if model is None or model.lora or layout.tp_size > 1:
            continue
        places = {tuple(name.removesuffix(".weight").rsplit(".", 1)): each for name, each in model.parameters.items()}
        for names in GROUPS:
            for place in {place[0] for place in places if place[-1] in names}:
                group = [places.get((place, name)) for name in names]
                total += sum(
                    math.prod(each.shape) * (half.itemsize if half else each.itemsize)
                    for each in group
                    if each is not None and None not in group
                )
    return total


def _chunk(policy: ModelShapes, args: NashConfig, layout: Layout, device: str, free: int | None) -> int:
    """Return the bytes of logits that the loss holds at a time."""
    exact = args.kl == "exact" and not args.algorithm_spec.trains_pairs
    compute = rollout_dtype(args) or policy.dtype
    vocabulary = -(-policy.vocabulary // layout.tp_size)  # a rank scores its slice
    budget = CHUNK_BYTES[device]  # of slices, always
    if free is not None and layout.tp_size == 1:
        budget = chunk_bytes_with(free, policy.width, exact)
    rows = chunk_rows(micro_batch(args)[0] * args.max_new_tokens, vocabulary, compute.itemsize, exact, budget)
    return rows * vocabulary * compute.itemsize * (2 if exact else 1)


def _loss(models: Models, args: NashConfig, layout: Layout) -> dict[str, int]:
    rows, tokens = micro_batch(args)
    policy = models.policy
    scored = rows * args.max_new_tokens
    compute = rollout_dtype(args) or policy.dtype
    vocabulary = -(-policy.vocabulary // layout.tp_size)  # a rank scores its slice
    trained = next((value.trained for name, value in policy.parameters.items() if "lm_head" in name), not policy.lora)
    activations = activation_bytes(policy, rows, tokens, rollout_dtype(args), layout, recomputes(args))
    if args.gradient_accumulation_steps == 1:  # no gradient is there when the backward pass begins
        layers = int(getattr(policy.config.get_text_config(decoder=True), "num_hidden_layers", 1))
        activations = max(activations - policy.bytes(layout, trained=True), activations // layers)
    return {
        "activations": activations,
        "head's gradient": 4 * vocabulary * policy.width * (1 if trained else 0),
        "states for the head": 2 * scored * policy.width * compute.itemsize + rows * tokens * policy.width * 4,
    }


def recomputes(args: NashConfig) -> bool:
    """Return whether the backward pass computes activations again.

    Args:
        args: of the run.
    """
    return bool(getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False))
