"""LoRA: runners of a policy and of its base, which is the reference, in one forward pass (one_pass.py) or in two.

In one pass each adapted layer adds its low-rank update to the first rows only; the reference's rows pass the base layer
alone, so their log-probabilities equal, bit for bit, those of the base in that batch. peft's own mixed batches
(`adapter_names`) do the same by index lists built in every layer, which costs the host more than the update and cannot
be captured in a graph. One pass serves layers of plain LoRA around a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..core.modes import eval_mode
from ..core.split_adapters import laid_out
from ..core.upstream import plain_lora_layers
from .batch import Span
from .contexts import exact_products, locked, no_autocast
from .decode_state import DecodeState
from .model_info import ModelInfo
from .one_pass import OnePassRunner, RowsMixedError, are_joined, module_inputs, short_texts, vectors_of
from .peft_models import adapted_layers, adapters_off
from .probes import output_dtypes
from .request import Prompts
from .runners import Runner

# ---- runners ---------------------------------------------------------------------------------------------------------


class AdapterRunner(OnePassRunner):
    """The policy's rows with the adapter and the reference's without."""

    def assign(self, spans: Mapping[str, Span]) -> None:
        self.layers = adapted_layers(self.info.model)
        super().assign(spans)

    def split(self, first: int, rows: int) -> AbstractContextManager[None]:
        return adapters_on_first_rows(self.layers, first, rows)


class BaseRunner:
    """The base of an adapted model, where one pass cannot serve both: a second runner of the model, adapters off."""

    def __init__(self, adapted_model: Any, runner: Runner) -> None:
        self.adapted_model, self.runner, self.roles = adapted_model, runner, runner.roles

    def assign(self, spans: Mapping[str, Span]) -> None:
        self.runner.assign(spans)

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted_model):
            return self.runner.prefill(prompts, fan_out)

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted_model):
            return self.runner.decode(tokens, state)

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        self.runner.compact(rows, spans)


@contextmanager
def adapters_on_first_rows(layers: list[Any], rows: int, batch: int) -> Iterator[None]:
    """Apply plain LoRA layers to the first `rows` of a batch of `batch` rows only."""
    for layer in layers:
        layer.forward = _forward_on_first_rows(layer, rows, batch)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _forward_on_first_rows(layer: Any, rows: int, batch: int) -> Callable[..., torch.Tensor]:
    active = [name for name in layer.active_adapters if name in layer.lora_A] if not layer.disable_adapters else []

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = layer.base_layer(x, *args, **kwargs)
        first = vectors_of(rows, batch, x.shape[0])
        for name in active if first else ():
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            update = lora_b(lora_a(x[:first].to(lora_a.weight.dtype))) * layer.scaling[name]
            result[:first] = (result[:first] + update).to(result.dtype)
        return result

    return forward


# ---- whether one pass serves both ------------------------------------------------------------------------------------


def why_not_one_pass(model: torch.nn.Module) -> str | None:
    """Why the adapters are more than a sum with a linear layer's output; None where they are such sums."""
    saved = [
        name for name, m in model.named_modules() if hasattr(m, "modules_to_save") and hasattr(m, "original_module")
    ]
    if saved:
        return f"{saved[0]} is a trained copy of a module (modules_to_save), not a sum with the base's"
    for layer in adapted_layers(model):
        if type(layer) not in plain_lora_layers():
            return f"{type(layer).__name__} around {type(layer.base_layer).__name__} is no plain LoRA of a linear layer"
        if getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()):
            return "a LoRA variant (DoRA or another) is more than a sum with the base's output"
        if layer.merged:
            return "an adapter is merged into the base's weights"
        if "forward" in vars(layer):
            return "a layer's forward has been replaced, by accelerate's hooks or another's"
    return None


def why_one_pass_differs(policy: Any, info: ModelInfo) -> str | None:
    """Why adapted layers would not get the policy's rows, then the reference's; None where they do.

    A padded batch of short texts is read in one pass and in two. The inputs of the adapted layers, and the logits, must
    be those of the policy, then those of its base.
    """
    if next(info.model.parameters()).device.type == "meta":
        return None
    layers, texts = adapted_layers(policy), short_texts(info)
    rows = len(texts["input_ids"])
    twice = {name: torch.cat([value, value]) for name, value in texts.items()}
    with (
        locked(info.model), no_autocast(info.device), eval_mode(info.model), exact_products(), _random_adapters(layers),
        output_dtypes(info.model) as dtypes,
    ):  # fmt: skip
        of_policy = module_inputs(info, layers, texts)
        with adapters_off(policy):
            of_base = module_inputs(info, layers, texts)
        try:
            with adapters_on_first_rows(layers, rows, 2 * rows):
                of_both = module_inputs(info, layers, twice)
        except RowsMixedError as error:
            return str(error)
    if are_joined(of_both, of_policy, of_base, dtypes):
        return None
    return f"{info.name} mixes the rows of a batch on their way to an adapted layer"


@contextmanager
def _random_adapters(layers: list[Any]) -> Iterator[None]:
    """Set the adapters to random weights for the comparison: a new run's are zero and would hide an error."""
    generator = torch.Generator("cpu").manual_seed(0)  # its own: torch's default one is the caller's
    parts = [part for layer in layers for adapters in (layer.lora_A, layer.lora_B) for part in adapters.values()]
    weights = {parameter: parameter.data for part in parts for parameter in part.parameters()}
    scalings = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        for parameter, data in weights.items():
            noise = torch.randn(data.shape, generator=generator, dtype=torch.float32, device="cpu")
            noise = (noise * data.shape[-1] ** -0.5).to(data.device, data.dtype)
            parameter.data = laid_out(noise, data)
        for layer, scaling in scalings:
            layer.scaling.update(dict.fromkeys(scaling, 1.0))
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data
        for layer, scaling in scalings:
            layer.scaling.update(scaling)
