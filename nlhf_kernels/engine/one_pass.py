"""Whether the adapter's rows and the base's can go through one forward pass, and how they do.

The batch holds the policy's rows, then the reference's. Each adapted layer adds its low-rank update to the first rows
only; the reference's rows see the base layer alone, so their log-probabilities are the base's to the last bit of that
batch. peft's own mixed batches (`adapter_names`) do the same by index lists made anew in every layer, which costs the
host more than the update and cannot be captured in a graph.

Only layers of plain LoRA around a linear layer are known to be such sums. What a model makes of its rows on the way to
them (flattened with the tokens, sorted by expert) shows in a comparison with its two own forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..core.upstream import plain_lora_layers
from .models import ModelFacts, evaluating, in_turn, plainly
from .peft_models import adapted_layers, adapters_off
from .probes import exact_products, plain_ids, precisions

PADDING, TOKENS = (2, 0, 1), 5  # of the compared texts; TOKENS is no multiple of twice their number
#: What rounding may do, of the spread of a layer's inputs; vectors in another order move by more than the spread.
ROUNDING, ROUNDING_OF_HALVES = 0.01, 0.2


class RowsMixedError(RuntimeError):
    """An adapted layer whose input does not begin with the batch's rows."""


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


def why_one_pass_differs(policy: Any, facts: ModelFacts) -> str | None:
    """Why a batch of the policy's rows, then the reference's, is not that to every adapted layer; None where it is.

    A padded batch of short texts is read in one pass and in two. What the layers get, and the logits, must be those of
    the policy, then those of its base.
    """
    if next(facts.model.parameters()).device.type == "meta":
        return None
    layers, texts = adapted_layers(policy), _texts(facts)
    rows = len(texts["input_ids"])
    twice = {name: torch.cat([value, value]) for name, value in texts.items()}
    with (
        in_turn(facts.model), plainly(facts.device), evaluating(facts.model), exact_products(), _strong(layers),
        precisions(facts.model) as dtypes,
    ):  # fmt: skip
        own = _seen(facts, layers, texts)
        with adapters_off(policy):
            base = _seen(facts, layers, texts)
        try:
            with adapter_on_first_rows(layers, rows, 2 * rows):
                both = _seen(facts, layers, twice)
        except RowsMixedError as error:
            return str(error)
    tolerance = ROUNDING if dtypes <= {torch.float32, torch.float64} else ROUNDING_OF_HALVES
    if len(own) == len(base) == len(both) and all(map(_is_both, both, own, base, [tolerance] * len(both))):
        return None
    return f"{facts.name} mixes the rows of a batch on their way to an adapted layer"


def _is_both(both: torch.Tensor, own: torch.Tensor, base: torch.Tensor, tolerance: float) -> bool:
    if own.shape != base.shape or both.shape != (2 * len(own), *own.shape[1:]):
        return False
    expected, got = (torch.nan_to_num(value).float() for value in (torch.cat([own, base]), both))
    spread = (expected - expected.mean(0)).abs().mean()
    rounding = 4 * torch.finfo(both.dtype).eps * expected.abs().mean()
    return bool((got - expected).abs().mean() <= tolerance * spread + rounding)


def _texts(facts: ModelFacts) -> dict[str, torch.Tensor]:
    """Padded where the model may be given padding."""
    count = len(PADDING) * TOKENS
    ids = plain_ids(facts).repeat(count)[:count].view(-1, TOKENS)
    padding = torch.tensor(PADDING, dtype=torch.int64, device=facts.device) * (facts.padding is None)
    mask = (torch.arange(TOKENS, dtype=torch.int64, device=facts.device) >= padding[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _seen(facts: ModelFacts, layers: list[Any], texts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the layers get in a forward pass, call by call, and the logits."""
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in layers]
    options: dict[str, Any] = {**texts, "use_cache": False}
    accepted = {name: value for name, value in options.items() if name in facts.accepted}
    try:
        logits: torch.Tensor = facts.model(**accepted, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*seen, logits]


@contextmanager
def _strong(layers: list[Any]) -> Iterator[None]:
    """Adapters that move what they are added to: those of a new run are zero, and would hide a mistake."""
    noise = torch.Generator("cpu").manual_seed(0)  # its own: the caller's randomness stays where it is
    parts = [part for layer in layers for adapters in (layer.lora_A, layer.lora_B) for part in adapters.values()]
    weights = {parameter: parameter.data for part in parts for parameter in part.parameters()}
    scalings = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        for parameter, data in weights.items():
            drawn = torch.randn(data.shape, generator=noise, dtype=torch.float32, device="cpu")
            parameter.data = (drawn * data.shape[-1] ** -0.5).to(data)
        for layer, scaling in scalings:
            layer.scaling.update(dict.fromkeys(scaling, 1.0))
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data
        for layer, scaling in scalings:
            layer.scaling.update(scaling)


@contextmanager
def adapter_on_first_rows(layers: list[Any], rows: int, batch: int) -> Iterator[None]:
    """Plain LoRA layers act on the first `rows` of a batch of `batch`. Restored afterwards, whatever happens."""
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
        tokens, rest = divmod(x.shape[0], batch)  # a model may have flattened its rows of tokens: (batch * tokens, N)
        if rest:
            raise RowsMixedError(f"an adapted layer gets {x.shape[0]} vectors from a batch of {batch} rows")
        first = rows * tokens
        for name in active if first else ():
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            update = lora_b(lora_a(x[:first].to(lora_a.weight.dtype))) * layer.scaling[name]
            result[:first] = (result[:first] + update).to(result.dtype)
        return result

    return forward
