"""Properties of a model that the engine needs before the first token, found by a forward pass of one token.

The pass shows what every layer stores, so that memory is planned exactly for any architecture, and the width of the
head. A model whose state is not in keys and values is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..core.modes import eval_mode
from ..core.upstream import cache_argument, keeps_recurrent_state, uncompiled
from .caches import LayerShape, ProbeLayer
from .contexts import no_autocast
from .peft_models import check_served

OP = "RolloutEngine"
CACHED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


@dataclass(frozen=True)
class ModelInfo:
    role: str  # policy, reference or opponent
    model: torch.nn.Module  # the module whose forward is called
    accepted: frozenset[str]  # names of its forward's arguments
    cache_argument: str | None  # the one that takes a Cache
    layers: tuple[LayerShape | None, ...]  # empty where the whole text is read every step
    vocabulary: int  # columns of the head
    weights: int  # parameters that are multiplied with every token of a prompt
    dtype: torch.dtype
    device: torch.device
    max_positions: int | None  # the longest text it can place; None: no limit known
    rotation_turn: int | None  # longer texts are rotated otherwise, from their first token on (longrope)
    counted_slots: int | None  # from this many on, padding is counted as text by the queries (Llama 4)
    padding_fault: str | None = None  # what is wrong with padded prompts, as the end of a sentence; None: nothing
    decode_attention: bool = False  # whether its steps may take that kernel

    @property
    def cached(self) -> bool:
        return bool(self.layers)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def cache_bytes(self, rows: int, length: int) -> int:
        return sum(rows * length * shape.bytes for shape in self.layers if shape is not None)


def inspect_model(role: str, model: Any, use_cache: bool, op: str = OP) -> ModelInfo:
    """Check that the engine can decode with a model, and return its description."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: {role}: expected a causal language model; got {type(model).__name__}")
    inner = _without_peft(model)
    check_served(role, model, op)
    config: Any = getattr(inner, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{op}: {role}: expected a decoder-only model; got {type(inner).__name__}")
    accepted = frozenset(inspect.signature(uncompiled(inner).forward).parameters)
    parameter = next(inner.parameters())
    if use_cache and (reason := _why_not_cached(inner)):
        raise ValueError(
            f"{op}: {role}: expected a model whose past lies in keys and values; {type(inner).__name__} {reason} "
            "(use_cache=False reads the whole text every step)"
        )
    layers, logits = _read_one_token(inner, parameter.device, accepted, use_cache)
    _check_logits(role, inner, logits, op)
    if use_cache and not any(layers):
        raise ValueError(
            f"{op}: {role}: expected a model that writes keys and values; {type(inner).__name__} wrote none"
        )
    text_config = config.get_text_config(decoder=True)
    return ModelInfo(
        role=role,
        model=inner,
        accepted=accepted,
        cache_argument=cache_argument(uncompiled(inner).forward),
        layers=layers,
        vocabulary=logits.shape[-1],
        weights=_weights_per_token(inner),
        dtype=parameter.dtype,
        device=logits.device if parameter.device.type == "meta" else parameter.device,
        max_positions=_max_positions(text_config),
        rotation_turn=_rotation_turn(text_config),
        counted_slots=_counted_slots(text_config),
    )


def has_key_value_cache(model: Any) -> bool:
    """Return whether the engine can decode with the model's cache; else it takes `use_cache=False`.

    Args:
        model: a causal language model of transformers, or a peft model around one.
    """
    return _why_not_cached(_without_peft(model)) is None


def _without_peft(model: Any) -> Any:
    """Return the model in whose layers peft has put its adapters; peft's own forward does not name its arguments."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def _why_not_cached(model: Any) -> str | None:
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None  # refused for that by inspect_model
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    if other := sorted(set(types) - CACHED_LAYER_TYPES):
        return f"has layers of {', '.join(other)}"
    if keeps_recurrent_state(model):
        return "keeps a recurrent state"
    return None if cache_argument(uncompiled(model).forward) else "takes no cache"


def _read_one_token(
    model: Any, device: torch.device, accepted: frozenset[str], use_cache: bool
) -> tuple[tuple[LayerShape | None, ...], Any]:
    """Return what every layer stored, and the logits, if there are any."""
    token = torch.zeros(1, 1, dtype=torch.int64, device="cpu" if device.type == "meta" else device)
    cache = Cache(layer_class_to_replicate=ProbeLayer)
    inputs: dict[str, Any] = {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": use_cache}
    if use_cache and (name := cache_argument(uncompiled(model).forward)):
        inputs[name] = cache
    with no_autocast(token.device), eval_mode(model):
        outputs = model(**{name: value for name, value in inputs.items() if name in accepted}, return_dict=True)
    return tuple(getattr(layer, "shape", None) for layer in cache.layers), getattr(outputs, "logits", None)


def _check_logits(role: str, model: Any, logits: Any, op: str) -> None:
    """Check the logits of one row and one token; a token classifier returns logits too, but has no such head."""
    shape = None if logits is None else tuple(logits.shape)
    if shape is None:
        got = "has no head that gives logits"
    elif len(shape) != 3 or shape[:2] != (1, 1):
        got = f"gives logits of shape {shape} for one token, not (1, 1, vocabulary)"
    elif model.get_output_embeddings() is None and shape[2] < getattr(
        model.config.get_text_config(decoder=True), "vocab_size", 0
    ):
        got = f"gives {shape[2]} logits a token, fewer than its vocabulary has"
    else:
        return
    raise TypeError(f"{op}: {role}: expected a causal language model; {type(model).__name__} {got}")


def _weights_per_token(model: Any) -> int:
    """Count the parameters, without the embedding table, which is looked up, and the head, which reads one token."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(getattr(layer, "weight", None)) for layer in ends}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)


def _max_positions(config: Any) -> int | None:
    """Return the length of a position table, or that of training; XLNet's -1 stands for no bound."""
    bounds = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((bound for bound in bounds if isinstance(bound, int) and bound > 0), None)


def _rotation_turn(config: Any) -> int | None:
    lengths = [
        part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for part in rotations(config)
        if part.get("rope_type") == "longrope"
    ]
    return min((length for length in lengths if length is not None), default=None)


def rotations(config: Any) -> list[Any]:
    """Return a text model's settings of rotary positions: one, or one for each type of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, Mapping)]


def _counted_slots(config: Any) -> int | None:
    """Return Llama 4's `floor_scale`: queries are scaled by filled cache slots, padding included, in such steps."""
    without_rotation = not all(getattr(config, "no_rope_layers", None) or (0,))
    scales = getattr(config, "attn_temperature_tuning", False) and without_rotation
    return getattr(config, "floor_scale", None) if scales else None


def clone_with_parameters(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], op: str = OP
) -> torch.nn.Module:
    """Clone a model's modules around other parameters, given by name.

    Their storage is used as it is, so that an average updated in place decodes with its latest values. Parameters that
    are not named are the model's own, which must then be frozen.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(parameters) - set(own))
    if unknown:
        raise ValueError(f"{op}: opponent: expected names of the policy's parameters; got {unknown[0]!r}")
    replacements = {id(own[name]): value for name, value in parameters.items()}
    memo: dict[int, Any] = {}
    for name, parameter in own.items():
        value = replacements.get(id(parameter))
        if value is None and parameter.requires_grad:
            raise ValueError(f"{op}: opponent: expected every trained parameter; {name!r} is missing")
        if value is not None and (value.shape, value.device) != (parameter.shape, parameter.device):
            expected = f"{tuple(parameter.shape)} on {parameter.device}"
            raise ValueError(f"{op}: opponent: {name}: expected {expected}; got {tuple(value.shape)} on {value.device}")
        memo[id(parameter)] = parameter if value is None else torch.nn.Parameter(value.detach(), requires_grad=False)
    return deepcopy(model, memo)
