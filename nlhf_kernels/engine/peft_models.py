"""peft models: which are supported, which of their layers hold adapters, and their base, adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..core.upstream import ADAPTERS_PER_TOKEN, INITS_BESIDE_BASE, modules_of


def is_adapted(model: Any) -> bool:
    """Whether this is a peft model, whose base can be the reference."""
    return callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config")


def adapted_layers(model: torch.nn.Module) -> list[Any]:
    """Return peft's layers that hold adapters: modules around a base layer, with a list of active adapters."""
    # A module without an attribute looks for it in three dictionaries first; its class answers at once.
    return [m for m in modules_of(model) if hasattr(type(m), "active_adapters") and hasattr(m, "base_layer")]


def check_served(role: str, model: Any, op: str) -> None:
    """Refuse adapters that do not act within layers on every token by itself.

    Rollouts call the model inside a peft model, one token at a time.
    """
    for name, config in model.peft_config.items() if is_adapted(model) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"{op}: {role}: expected LoRA or no adapter; got prompt learning, which lengthens prompts")
        if kind not in ADAPTERS_PER_TOKEN:
            raise ValueError(
                f"{op}: {role}: expected LoRA or another adapter that acts within layers, on every token by itself; "
                f"got {kind} in {name!r} (merge it, where it can be merged)"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"{op}: {role}: expected an adapter that acts on every token; got alora_invocation_tokens in {name!r}, "
                "which acts from certain tokens on (aLoRA)"
            )


def check_base(model: Any, op: str) -> None:
    """Check that without its adapters the model is the one that they were put on."""
    if any(layer.merged for layer in adapted_layers(model)):
        raise ValueError(f"{op}: policy: expected an adapter beside the base's weights; got one merged into them")
    for name, config in model.peft_config.items():
        bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
        changes = {
            f"bias={bias!r} in {name!r}, which trains the base's own biases": bias != "none",
            f"init_lora_weights={init!r} in {name!r}, which changes the base's weights": init not in INITS_BESIDE_BASE,
            f"layer_replication in {name!r}, which repeats the base's layers": getattr(
                config, "layer_replication", None
            ),
        }
        for change, applies in changes.items():
            if applies:
                expected = "an adapter that leaves its base as it is, or a reference beside it"
                raise ValueError(f"{op}: policy: expected {expected}; got {change}")


def adapter_state(model: torch.nn.Module) -> tuple[Any, ...]:
    """Return the state of the adapters that a recorded step assumes beside their weights: active ones and scales."""
    layers = adapted_layers(model)
    return tuple(
        (layer.disable_adapters, tuple(layer.active_adapters), tuple(getattr(layer, "scaling", {}).items()))
        for layer in layers
    )


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switch adapters off by peft's own context, and undo what that does to requires_grad."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
