"""Hidden states instead of logits: the model's own forward pass with its head replaced by a recorder, and that head.

The fused losses take the output layer's input, so that (rows, tokens, vocabulary) logits are never stored. Replacing
the output layer's forward works for every architecture, under adapters, checkpointing and wrappers alike. A scale or
soft cap that the model applies to its logits afterwards is determined once, on random hidden states, and checked
against the logits that the model itself returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..core.tokens import count_positions
from ..core.upstream import plain_class
from ..engine.contexts import replaced_forward
from ..engine.sharded import fsdp_modules
from ..ops import Head
from .sharded import reshard, whole

OP = "NashTrainer"
_scales: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # of models whose heads have been checked


def unwrapped(model: Any) -> Any:
    """Return the causal language model inside wrappers of processes and of peft."""
    while isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Return the input of the output layer, (R, S, D).

    Args:
        model: in any wrapper, whose forward pass is called.
        input_ids ((R, S)): tokens.
        attention_mask ((R, S)): 0 at padding.
    """
    return apply_at_head(model, input_ids, attention_mask, lambda states: states)


def apply_at_head(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Call `function` on the hidden states in place of the output layer; return its result.

    Within the forward pass, FSDP2 has gathered the output layer's weights, which it may release afterwards.

    Args:
        model: in any wrapper, whose forward pass is called.
        input_ids ((R, S)): tokens.
        attention_mask ((R, S)): 0 at padding.
        function: (R, S, D), the input of the output layer -> a tensor.
    """
    inner = unwrapped(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(inner).forward).parameters:
        inputs["position_ids"] = count_positions(attention_mask)
    results: list[torch.Tensor] = []

    def record(states: torch.Tensor) -> torch.Tensor:
        results.append(function(states))
        return states[..., :1]

    with replaced_forward(inner.get_output_embeddings(), record):
        model(**inputs)
    return results[0]


def head_of(model: Any) -> Head:
    """Return the output layer as the losses take it: weight, bias, scale, soft cap. Its tensors are the model's own."""
    inner = unwrapped(model)
    if inner not in _scales:
        check_head(inner, "model")
    layer = inner.get_output_embeddings()
    return Head(layer.weight, layer.bias, _scales[inner], _cap(inner))


@torch.no_grad()
def check_head(model: Any, name: str) -> int:
    """Check that `head_of` computes the model's own logits; return the width of the vocabulary.

    Args:
        model: a causal language model, in any wrapper.
        name: the argument that errors name.
    """
    inner = unwrapped(model)
    layer = getattr(inner, "get_output_embeddings", lambda: None)()
    if layer is None or getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{OP}: {name}: expected a causal language model, with an output layer over the vocabulary; got a "
            f"{type(inner).__name__}"
        )
    if plain_class(layer) is not torch.nn.Linear or not layer.weight.is_floating_point():
        raise ValueError(
            f"{OP}: {name}: expected one linear output layer, with no adapter on it, whose logits the losses can "
            f"compute in pieces; got {type(layer).__name__}"
        )
    root = next(fsdp_modules(model), inner)  # peft's model around the base, where accelerate has sharded that
    logits, products = _probe(root, layer)
    reshard(root)
    cap = _cap(inner)
    for scale in _candidates(inner, logits, products):
        computed = scale * products
        if cap:
            computed = cap * torch.tanh(computed / cap)
        allowed = 64 * torch.finfo(layer.weight.dtype).eps * max(float(computed.abs().max()), 1e-6)
        if logits.shape == computed.shape and bool(((logits - computed).abs() <= allowed).all()):
            _scales[inner] = scale
            return int(layer.weight.shape[0])
    raise ValueError(
        f"{OP}: {name}: expected logits = cap tanh(scale (W h + b) / cap), with one scale and the configuration's cap; "
        f"{type(inner).__name__} does something else with them"
    )


def _probe(model: Any, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:  # each (2, V) float32
    """Return the model's logits and the output layer's products for random hidden states of two magnitudes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randn(1, 2, layer.in_features, dtype=torch.float32, device="cpu")
    device, original = layer.weight.device, layer.forward
    products: list[torch.Tensor] = []

    def product_of_noise(_: torch.Tensor) -> torch.Tensor:
        weight = layer.weight  # gathered, within a forward pass
        states = noise.to(device, weight.dtype)
        states = 8 * states / whole(weight.norm(dim=1).mean()).clamp(min=1e-3)  # logits of a size where caps act
        states[:, 1] *= 0.25  # a factor that depends on the states' magnitude is no scale
        products.append(original(states))
        return products[0]

    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False), replaced_forward(layer, product_of_noise):
        outputs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return outputs.logits[0].float(), products[0][0].float()


def _candidates(inner: Any, logits: torch.Tensor, products: torch.Tensor) -> Iterator[float]:
    """Yield scales to try: a configuration may name one that the model applies to the states, not to the logits."""
    config = _text(inner)
    if isinstance(scale := getattr(config, "logit_scale", None), int | float):
        yield float(scale)
    if isinstance(divisor := getattr(config, "logits_scaling", None), int | float) and divisor:
        yield 1 / divisor
    yield 1.0
    if logits.shape == products.shape:
        yield float((logits.double() * products.double()).sum() / products.double().square().sum())


def _cap(inner: Any) -> float:
    return float(getattr(_text(inner), "final_logit_softcapping", None) or 0.0)


def _text(inner: Any) -> Any:
    return inner.config.get_text_config(decoder=True)
