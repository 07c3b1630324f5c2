"""Create, load and merge peft's adapters, and extract their base's weights.

peft initialises missing weights at random and drops unexpected ones, with a warning at most; here both are errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import split_adapters
from .optional import need

CONFIG = "adapter_config.json"
NAME = "default"  # of a model's only adapter


def is_adapter(name: str, where: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether a folder, or a name on the hub, holds an adapter; `where` as in `from_pretrained`."""
    if Path(name).is_dir():
        return (Path(name) / str(where.get("subfolder", "")) / CONFIG).is_file()
    find = need("transformers.utils.peft_utils", "a model").find_adapter_config_file
    try:
        return bool(find(name, **where))
    except (OSError, ValueError):
        return False  # loading it raises with the reason


def base_of(name: str, where: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the base's folder or name on the hub, from the adapter's configuration."""
    return str(_configuration(name, where).base_model_name_or_path or "")


def new_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    """Return `model` with a new adapter, whose initial weights depend on the seed alone."""
    peft = need("peft", "peft_config")
    if split := split_adapters.is_split(model):
        split_adapters.check_splittable(peft_config)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft_config)
    if split:
        split_adapters.fit(adapted, peft_config, seed)
    return adapted


def attach(base: Any, name: str, *, trainable: bool, where: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return `base` with the adapter of a folder or a name on the hub."""
    if split_adapters.is_split(base):
        raise ValueError(f"expected a new adapter where tensor parallelism splits the base; got that of {name}")
    configuration = _configuration(name, where)
    configuration.inference_mode = not trainable
    model = new_adapter(base, configuration, seed=0)
    loaded = model.load_adapter(name, NAME, is_trainable=trainable, **where)
    check_keys(f"the adapter on {type(base).__name__}", loaded.missing_keys, loaded.unexpected_keys)
    return model


def merged(model: Any) -> Any:
    """Return the base with the adapter added to its weights; `model` cannot be used afterwards."""
    names = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        weight = getattr(getattr(layer, "base_layer", None), "weight", None)
        if names[id(weight)] > 1:
            raise ValueError(f"expected an adapter on weights that no other layer shares; got one on {name}")
    if not callable(getattr(model.base_model, "merge_and_unload", None)):
        kind = model.peft_config[NAME].peft_type.value
        raise ValueError(f"expected an adapter that can be added to its base's weights, LoRA say; got {kind}")
    return model.merge_and_unload(safe_merge=True)


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the base's own weights by its own names, without the adapters; nothing is copied."""
    adapters = tuple(f".{name}." for name in model.peft_config)
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in model.get_base_model().state_dict().items()
        if not any(part in f".{name}." for part in adapters)
    }


def check_keys(model: str, missing: Any, wrong: Any) -> None:
    for keys, what in ((missing, "is missing"), (wrong, "is of another model")):
        if keys:
            raise ValueError(f"expected every weight of {model}; {sorted(map(str, keys))[0]} {what}")


def _configuration(name: str, where: Mapping[str, Any]) -> Any:
    return need("peft", "an adapter").PeftConfig.from_pretrained(name, **where)
