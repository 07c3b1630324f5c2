"""What the engine must know of a model before the first token, found by looking: one forward pass of one token.

The pass shows what every layer stores (so memory is planned exactly, for any architecture) and the width of the head;
a model that keeps its past elsewhere than in keys and values cannot pass it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from ..core.upstream import cache_argument, keeps_recurrent_state, uncompiled
from .caches import LayerShape, ProbeLayer
from .peft_models import check_served

OP = "RolloutEngine"
ATTENDING = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
}  # layer types with keys and values
_turns: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
_making = Lock()  # of the above


@dataclass(frozen=True)
class ModelFacts:
    role: str
    model: torch.nn.Module  # the module whose forward is called
    accepted: frozenset[str]  # names of its forward's arguments
    cache_argument: str | None  # the one that takes a Cache
    layers: tuple[LayerShape | None, ...]  # empty where the whole text is read every step
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    positions: int | None  # the longest text it can place; None: no limit known
    turns: int | None  # texts longer than this are rotated otherwise, from their first token on (longrope)
    counted_slots: int | None  # from this many on, padding is counted as text by the queries (Llama 4)
    padding: str | None = None  # what is wrong with padded prompts, as the end of a sentence; None: nothing
    decode_attention: bool = False  # whether its steps may take the kernel of that name

    @property
    def cached(self) -> bool:
        return bool(self.layers)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def cache_bytes(self, rows: int, length: int) -> int:
        return sum(rows * length * shape.bytes for shape in self.layers if shape is not None)


def inspect_model(role: str, model: Any, use_cache: bool, op: str = OP) -> ModelFacts:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: {role}: expected a causal language model; got {type(model).__name__}")
    inner = _unwrapped(model)
    check_served(role, model, op)
    config: Any = getattr(inner, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{op}: {role}: expected a decoder-only model; got {type(inner).__name__}")
    accepted = _accepted(inner)
    parameter = next(inner.parameters())
    if use_cache and (reason := _keeps_state_elsewhere(inner)):
        raise ValueError(
            f"{op}: {role}: expected a model whose past lies in keys and values; {type(inner).__name__} {reason} "
            "(use_cache=False reads the whole text every step)"
        )
    layers, logits = _probe(inner, parameter.device, accepted, use_cache)
    _check_logits(role, inner, logits, op)
    if use_cache and not any(layers):
        raise ValueError(
            f"{op}: {role}: expected a model that writes keys and values; {type(inner).__name__} wrote none"
        )

    text = config.get_text_config(decoder=True)
    return ModelFacts(
        role=role,
        model=inner,
        accepted=accepted,
        cache_argument=cache_argument(_forward(inner)),
        layers=layers,
        vocabulary=logits.shape[-1],
        dtype=parameter.dtype,
        device=logits.device if parameter.device.type == "meta" else parameter.device,
        positions=_positions(text),
        turns=_rotation_turns(text),
        counted_slots=_counted_slots(text),
    )


def _check_logits(role: str, model: Any, logits: Any, op: str) -> None:
    """One row and one token were read. A classifier of tokens has logits, too, but no output embeddings."""
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


def has_key_value_cache(model: Any) -> bool:
    """Whether the engine can decode with a cache."""
    return _keeps_state_elsewhere(_unwrapped(model)) is None


def _unwrapped(model: Any) -> Any:
    """The model in whose layers peft has put its adapters: peft's own forward says nothing of its arguments."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def rotations(config: Any) -> list[Any]:
    """A text model's settings of rotary positions: one, or one for each type of layers."""
    given = getattr(config, "rope_parameters", None) or {}
    return [given] if "rope_type" in given else [part for part in given.values() if isinstance(part, Mapping)]


def _positions(config: Any) -> int | None:
    """The bound of a table of positions, or of what a model was trained for. XLNet says -1 for no bound."""
    bounds = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((bound for bound in bounds if isinstance(bound, int) and bound > 0), None)


def _counted_slots(config: Any) -> int | None:
    """Llama 4 scales queries by how many slots its cache has filled, padding among them, in steps of `floor_scale`."""
    without_rotation = not all(getattr(config, "no_rope_layers", None) or (0,))
    scales = getattr(config, "attn_temperature_tuning", False) and without_rotation
    return getattr(config, "floor_scale", None) if scales else None


def _rotation_turns(config: Any) -> int | None:
    places = [
        part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for part in rotations(config)
        if part.get("rope_type") == "longrope"
    ]
    return min((place for place in places if place is not None), default=None)


def _accepted(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(_forward(model)).parameters)


def _forward(model: Any) -> Any:
    """The method that a compiled model stands for."""
    return uncompiled(model).forward


def _keeps_state_elsewhere(model: Any) -> str | None:
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None  # refused for that, elsewhere
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    if other := sorted(set(types) - ATTENDING):
        return f"has layers of {', '.join(other)}"
    if keeps_recurrent_state(model):
        return "keeps a recurrent state"
    return None if cache_argument(_forward(model)) else "takes no cache"


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Whatever the caller is in: caches outlive a rollout, so their dtype is not autocast's, and no tensor of theirs is
    one that only torch.inference_mode may write to."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _probe(
    model: Any, device: torch.device, accepted: frozenset[str], use_cache: bool
) -> tuple[tuple[LayerShape | None, ...], Any]:
    """One token read: what every layer stored, and the logits, if there are any."""
    token = torch.zeros(1, 1, dtype=torch.int64, device="cpu" if device.type == "meta" else device)
    cache = Cache(layer_class_to_replicate=ProbeLayer)
    inputs: dict[str, Any] = {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": use_cache}
    if use_cache and (name := cache_argument(_forward(model))):
        inputs[name] = cache
    with plainly(token.device), evaluating(model):
        outputs = model(**{name: value for name, value in inputs.items() if name in accepted}, return_dict=True)
    return tuple(getattr(layer, "shape", None) for layer in cache.layers), getattr(outputs, "logits", None)


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Dropout off, and gradient checkpointing with it, which would switch the caches off. Every submodule's own flag
    comes back, as some may have been frozen in evaluation mode."""
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def in_turn(*models: torch.nn.Module) -> Iterator[None]:
    """These models are one thread's: what it changes in them for a while is put back before the next one looks."""
    with _making:
        locks = [_turns.setdefault(model, RLock()) for model in sorted(set(models), key=id)]
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        yield


def twin(model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], op: str = OP) -> torch.nn.Module:
    """`model` with other parameters, by name: their storage is used as it is, so that an average updated in place plays
    with its latest values. Parameters that are not named are the model's own, which must then be frozen."""
    named = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(parameters) - set(named))
    if unknown:
        raise ValueError(f"{op}: opponent: expected names of the policy's parameters; got {unknown[0]!r}")
    given = {id(named[name]): value for name, value in parameters.items()}
    memo: dict[int, Any] = {}
    for name, parameter in named.items():
        value = given.get(id(parameter))
        if value is None and parameter.requires_grad:
            raise ValueError(f"{op}: opponent: expected every trained parameter; {name!r} is missing")
        if value is not None and (value.shape, value.device) != (parameter.shape, parameter.device):
            expected = f"{tuple(parameter.shape)} on {parameter.device}"
            raise ValueError(f"{op}: opponent: {name}: expected {expected}; got {tuple(value.shape)} on {value.device}")
        memo[id(parameter)] = parameter if value is None else torch.nn.Parameter(value.detach(), requires_grad=False)
    return deepcopy(model, memo)
