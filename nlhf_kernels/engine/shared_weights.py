"""LoRA over a base that is also the reference: one forward pass serves both, and reads the base's weights once.

The batch holds the policy's rows, then the reference's. Each adapted layer adds its low-rank update to the first rows
only; the reference's rows see the base layer alone, so their log-probabilities are the base's to the last bit of that
batch. peft's own mixed batches (`adapter_names`) do the same by index lists made anew in every layer, which costs the
host more than the update and cannot be captured in a graph. Adapters that are more than a plain sum (DoRA, embeddings,
saved modules) take two passes over the one model instead, adapters switched off for the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..ops import decode_window
from .caches import StaticRowsCache
from .clock import Clock
from .models import ModelFacts
from .readers import CachedReader, Span, call, check_places, prompt_positions
from .request import Prompts


def is_adapted(model: Any) -> bool:
    """A peft model, whose base can be the reference."""
    return callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config")


def adapted_layers(model: torch.nn.Module) -> list[Any]:
    """peft's layers that hold adapters: modules that say which are active, around a base layer."""
    return [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")]


def why_not_one_pass(model: torch.nn.Module) -> str | None:
    """Why the adapter's rows and the base's cannot go through one forward pass; None where they can."""
    saved = [
        name for name, m in model.named_modules() if hasattr(m, "modules_to_save") and hasattr(m, "original_module")
    ]
    if saved:
        return f"{saved[0]} is a trained copy of a module (modules_to_save), not a sum with the base's"
    for layer in adapted_layers(model):
        if not isinstance(layer.base_layer, torch.nn.Linear) or not hasattr(layer, "lora_A"):
            return f"{type(layer).__name__} around {type(layer.base_layer).__name__} is no plain LoRA of a linear layer"
        if getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()):
            return "a LoRA variant (DoRA or another) is more than a sum with the base's output"
        if layer.merged:
            return "an adapter is merged into the base's weights"
    return None


def check_base(model: Any, op: str) -> None:
    if any(layer.merged for layer in adapted_layers(model)):
        raise ValueError(f"{op}: policy: expected an adapter beside the base's weights; got one merged into them")
    for name, config in model.peft_config.items():
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ValueError(
                f"{op}: policy: expected an adapter that leaves its base as it is; got bias={bias!r} in {name!r}, "
                "which trains the base's own biases"
            )


def adapter_state(model: torch.nn.Module) -> tuple[Any, ...]:
    """What a recorded step holds of the adapters, beside their weights: which act, and how strongly."""
    layers = adapted_layers(model)
    return tuple(
        (layer.disable_adapters, tuple(layer.active_adapters), tuple(getattr(layer, "scaling", {}).items()))
        for layer in layers
    )


@contextmanager
def adapter_on_first_rows(layers: list[Any], rows: int) -> Iterator[None]:
    """Plain LoRA layers act on the first `rows` of their input. Restored afterwards, whatever happens."""
    for layer in layers:
        layer.forward = _forward_on_first_rows(layer, rows)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _forward_on_first_rows(layer: Any, rows: int) -> Callable[..., torch.Tensor]:
    active = [name for name in layer.active_adapters if name in layer.lora_A] if not layer.disable_adapters else []

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = layer.base_layer(x, *args, **kwargs)
        for name in active if rows else ():
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            update = lora_b(lora_a(x[:rows].to(lora_a.weight.dtype))) * layer.scaling[name]
            result[:rows] = (result[:rows] + update).to(result.dtype)
        return result

    return forward


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """peft's own switch, with what it does to requires_grad undone."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class SharedReader:
    """The policy's rows with the adapter and the reference's without, in one batch."""

    names = ("policy", "reference")

    def __init__(self, facts: ModelFacts, rows: int, length: int, clock: Clock) -> None:
        self.facts, self.layers = facts, adapted_layers(facts.model)
        self.cache = StaticRowsCache(facts.layers, rows, length, clock, facts.device)
        self.spans: dict[str, Span] = {}

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        self._take(spans)
        check_places(self.facts, prompts)
        count = len(prompts.ids)
        policy, reference = (fan_out[slice(*self.spans[name])] for name in self.names)
        self.cache.start(torch.cat([policy, reference + count]))
        twice = [torch.cat([value, value]) for value in (prompts.ids, prompts.mask, prompt_positions(prompts))]
        logits = self._call(count, twice[0], twice[1] if prompts.padded else None, twice[2])
        self.cache.begin_steps()
        return {"policy": logits[policy], "reference": logits[reference + count]}

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        mask, split = clock.read_mask(), self._policy_rows
        starts, ends = clock.read_ranges()
        with decode_window(None if starts is None else self._both(starts), self._both(ends)):
            logits = self._call(
                split,
                self._both(tokens[:, None]),
                None if mask is None else self._both(mask),
                self._both(clock.positions),
            )
        return {"policy": logits[:split], "reference": logits[split:]}

    def keep(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        kept = []
        for name, offset in (("policy", 0), ("reference", self._policy_rows)):
            first, stop = self.spans[name]
            kept.append(rows[(rows >= first) & (rows < stop)] - first + offset)
        self.cache.keep(torch.cat(kept))
        self._take(spans)

    def _take(self, spans: Mapping[str, Span]) -> None:
        self.spans = {name: spans[name] for name in self.names}

    @property
    def _policy_rows(self) -> int:
        return self.spans["policy"][1] - self.spans["policy"][0]

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[slice(*self.spans[name])] for name in self.names])

    def _call(
        self, policy_rows: int, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        with adapter_on_first_rows(self.layers, policy_rows):
            return call(
                self.facts,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                cache=self.cache,
            )


class BaseReader(CachedReader):
    """The base of an adapted model, where one pass cannot serve both: the model's own forward, adapters off."""

    def __init__(self, adapted: Any, facts: ModelFacts, rows: int, length: int, clock: Clock) -> None:
        super().__init__(replace(facts, role="reference"), rows, length, clock)
        self.adapted = adapted

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted):
            return super().start(prompts, fan_out, spans)

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted):
            return super().step(tokens, clock)
