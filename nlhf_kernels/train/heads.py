"""Hidden states instead of logits: the model's own forward pass, its head replaced by a recorder, and that head.

The losses want what goes into the output layer, not what comes out: (rows, tokens, vocabulary) logits are what costs.
Replacing the output layer's forward works for every architecture, under adapters, checkpointing and wrappers alike.
What the model does with its logits afterwards (scaling, soft caps) is read off its configuration, and proven once, on
random hidden states, by comparing with the logits the model itself gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..ops import Head

OP = "NashTrainer"


def unwrapped(model: Any) -> Any:
    """The causal language model inside wrappers of processes and of peft."""
    while isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Counted over a row's own tokens, as the engine does."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(
    model: Any,  # any wrapper: its forward pass is the one that is called
    input_ids: torch.Tensor,  # (R, S)
    attention_mask: torch.Tensor,  # (R, S)
) -> torch.Tensor:  # (R, S, D): what the output layer would read
    inner = unwrapped(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(inner).forward).parameters:
        inputs["position_ids"] = positions(attention_mask)
    seen: list[torch.Tensor] = []

    def record(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states[..., :1]

    with _forward_of(inner.get_output_embeddings(), record):
        model(**inputs)
    return seen[0]


@contextmanager
def _forward_of(module: Any, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def head_of(model: Any) -> Head:
    """The output layer as the losses take it: weight, bias, scale, soft cap. Its tensors are the model's own."""
    inner = unwrapped(model)
    layer, config = inner.get_output_embeddings(), inner.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, float(scale), float(getattr(config, "final_logit_softcapping", None) or 0.0))


@torch.no_grad()
def check_head(model: Any, name: str) -> int:
    """That `head_of` gives the logits which the model gives. Returns the width of the vocabulary."""
    inner = unwrapped(model)
    layer = getattr(inner, "get_output_embeddings", lambda: None)()
    if type(layer) is not torch.nn.Linear or not layer.weight.is_floating_point():
        raise ValueError(
            f"{OP}: {name}: expected one linear output layer, with no adapter on it, whose logits the losses can "
            f"compute in pieces; got {type(layer).__name__}"
        )
    width = layer.weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        states = torch.randn(1, 1, layer.in_features, dtype=torch.float32, device="cpu").to(layer.weight)
        states = 8 * states / layer.weight.norm(dim=1).mean().clamp(min=1e-3)  # logits of a size where caps show
    token = torch.zeros(1, 1, dtype=torch.int64, device=layer.weight.device)
    original = layer.forward
    with _forward_of(layer, lambda _: original(states)):
        given = inner(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits.flatten().float()
    head = head_of(inner)
    computed = head.scale * original(states).flatten().float()
    if head.softcap:
        computed = head.softcap * torch.tanh(computed / head.softcap)
    allowed = 64 * torch.finfo(layer.weight.dtype).eps * max(float(computed.abs().max()), 1e-6)
    if given.shape != computed.shape or not bool(((given - computed).abs() <= allowed).all()):
        raise ValueError(
            f"{OP}: {name}: expected logits = cap tanh(scale (W h + b) / cap), with scale and cap from the "
            f"configuration; {type(inner).__name__} does something else with them"
        )
    return width
