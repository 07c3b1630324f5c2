"""LoRA: runners of a policy and of its base, which is the reference, in one forward pass or in two.

In one pass the batch holds the policy's rows, then the reference's. Each adapted layer adds its low-rank update to the
first rows only; the reference's rows pass the base layer alone, so their log-probabilities equal, bit for bit, those of
the base in that batch. peft's own mixed batches (`adapter_names`) do the same by index lists built in every layer,
which costs the host more than the update and cannot be captured in a graph.

One pass serves layers of plain LoRA around a linear layer. A model may reorder its rows before them (flattened with the
tokens, sorted by expert); a comparison with two forward passes detects that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..core.split_adapters import laid_out
from ..core.tokens import count_positions
from ..core.upstream import plain_lora_layers
from ..ops import decode_window
from .attention import reads_ranges_only
from .batch import Span
from .caches import StaticRowsCache
from .contexts import eval_mode, exact_products, locked, no_autocast
from .decode_state import DecodeState
from .model_info import ModelInfo
from .peft_models import adapted_layers, adapters_off
from .probes import output_dtypes, plain_ids
from .request import Prompts
from .runners import Runner, last_logits, rows_within

PADDING, TOKENS = (2, 0, 1), 5  # of the compared texts; TOKENS is no multiple of twice their number
#: Tolerance of the comparison in shares of the spread of a layer's inputs; rows in another order differ by more than 1.
ROUNDING, ROUNDING_16_BIT = 0.01, 0.2


# ---- runners ---------------------------------------------------------------------------------------------------------


class OnePassRunner:
    """The policy's rows with the adapter and the reference's without, in one batch."""

    roles = ("policy", "reference")

    def __init__(self, info: ModelInfo, rows: int, length: int, state: DecodeState) -> None:
        self.info = info
        self.layers: list[Any] = []  # the adapted ones
        self.cache = StaticRowsCache(info.layers, rows, length, state, info.device)
        self.spans: dict[str, Span] = {}

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        self.spans = {role: spans[role] for role in self.roles}
        self.layers = adapted_layers(self.info.model)
        count = len(prompts.ids)
        policy, reference = (fan_out[slice(*self.spans[role])] for role in self.roles)
        both = torch.cat([policy, reference + count])
        self.cache.begin_prefill(both, masked_slots=not reads_ranges_only(self.info.model))
        ids, mask, positions = (
            torch.cat([value, value]) for value in (prompts.ids, prompts.mask, count_positions(prompts.mask))
        )
        logits = self._last_logits(count, ids, mask if prompts.padded else None, positions)
        self.cache.end_prefill()
        return {"policy": logits[policy], "reference": logits[reference + count]}

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        mask, policy_rows = state.attention_mask(), self._policy_rows
        starts, ends = state.slot_ranges()
        with decode_window(None if starts is None else self._both(starts), self._both(ends)):
            logits = self._last_logits(
                policy_rows,
                self._both(tokens[:, None]),
                None if mask is None else self._both(mask),
                self._both(state.positions),
            )
        return {"policy": logits[:policy_rows], "reference": logits[policy_rows:]}

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        policy, reference = (rows_within(rows, self.spans[role]) for role in self.roles)
        self.cache.compact(torch.cat([policy, reference + self._policy_rows]))
        self.spans = {role: spans[role] for role in self.roles}

    @property
    def _policy_rows(self) -> int:
        return self.spans["policy"][1] - self.spans["policy"][0]

    def _both(self, per_row: torch.Tensor) -> torch.Tensor:
        return torch.cat([per_row[slice(*self.spans[role])] for role in self.roles])

    def _last_logits(
        self, policy_rows: int, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        with adapters_on_first_rows(self.layers, policy_rows, len(ids)):
            return last_logits(self.info, input_ids=ids, attention_mask=mask, position_ids=positions, cache=self.cache)


class BaseRunner:
    """The base of an adapted model, where one pass cannot serve both: a second runner of the model, adapters off."""

    def __init__(self, adapted_model: Any, runner: Runner) -> None:
        self.adapted_model, self.runner, self.roles = adapted_model, runner, runner.roles

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted_model):
            return self.runner.prefill(prompts, fan_out, spans)

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted_model):
            return self.runner.decode(tokens, state)

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        self.runner.compact(rows, spans)


class RowsMixedError(RuntimeError):
    """An adapted layer whose input does not begin with the batch's rows."""


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
    layers, texts = adapted_layers(policy), _texts(info)
    rows = len(texts["input_ids"])
    twice = {name: torch.cat([value, value]) for name, value in texts.items()}
    with (
        locked(info.model), no_autocast(info.device), eval_mode(info.model), exact_products(), _random_adapters(layers),
        output_dtypes(info.model) as dtypes,
    ):  # fmt: skip
        of_policy = _layer_inputs(info, layers, texts)
        with adapters_off(policy):
            of_base = _layer_inputs(info, layers, texts)
        try:
            with adapters_on_first_rows(layers, rows, 2 * rows):
                of_both = _layer_inputs(info, layers, twice)
        except RowsMixedError as error:
            return str(error)
    tolerance = ROUNDING if dtypes <= {torch.float32, torch.float64} else ROUNDING_16_BIT
    if len(of_policy) == len(of_base) == len(of_both) and all(
        _is_both(*inputs, tolerance) for inputs in zip(of_both, of_policy, of_base, strict=True)
    ):
        return None
    return f"{info.name} mixes the rows of a batch on their way to an adapted layer"


def _is_both(both: torch.Tensor, policy: torch.Tensor, base: torch.Tensor, tolerance: float) -> bool:
    if policy.shape != base.shape or both.shape != (2 * len(policy), *policy.shape[1:]):
        return False
    expected, actual = (torch.nan_to_num(value).float() for value in (torch.cat([policy, base]), both))
    spread = (expected - expected.mean(0)).abs().mean()
    rounding = 4 * torch.finfo(both.dtype).eps * expected.abs().mean()
    return bool((actual - expected).abs().mean() <= tolerance * spread + rounding)


def _texts(info: ModelInfo) -> dict[str, torch.Tensor]:
    """Short texts, padded where the model may be given padding."""
    count = len(PADDING) * TOKENS
    ids = plain_ids(info).repeat(count)[:count].view(-1, TOKENS)
    padding = torch.tensor(PADDING, dtype=torch.int64, device=info.device) * (info.padding_fault is None)
    mask = (torch.arange(TOKENS, dtype=torch.int64, device=info.device) >= padding[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": count_positions(mask)}


def _layer_inputs(info: ModelInfo, layers: list[Any], texts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The layers' inputs in a forward pass, call by call, and the logits."""
    tensors: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, inputs: tensors.append(inputs[0])) for layer in layers]
    options: dict[str, Any] = {**texts, "use_cache": False}
    accepted = {name: value for name, value in options.items() if name in info.accepted}
    try:
        logits: torch.Tensor = info.model(**accepted, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*tensors, logits]


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
