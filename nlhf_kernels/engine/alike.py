"""Whether two models are built alike: the same modules, numbers and buffers, and parameters of the same shapes.

One model's code then does with the other's parameters what the other's own code does (pairs.py).
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.upstream import parameters_of
from .model_info import ModelInfo, rotations
from .peft_models import adapted_layers

#: What may differ between configurations of models that run alike. Padding may not: some models look for its id.
NAMES = {
    *("_name_or_path", "architectures", "transformers_version"),
    *("bos_token_id", "dtype", "eos_token_id", "torch_dtype", "use_cache"),
}
#: Likewise among the attributes of modules.
STATES = {"training", "gradient_checkpointing", "name_or_path"}


def why_not_alike(policy: ModelInfo, reference: ModelInfo) -> str | None:
    """Why the policy's code cannot run with the reference's parameters; None where nothing speaks against it."""
    one, two = policy.model, reference.model
    if one is two:
        return "policy and reference are one model"
    if not policy.cached or not reference.cached:
        return "a model reads the whole text every step"
    if adapted_layers(one) or adapted_layers(two):
        return "a model has adapters, and the other is not its base"
    if any(part.get("rope_type") in ("dynamic", "longrope") for part in rotations(_text_config(one))):
        return "the rotation of positions depends on a model's longest text so far"
    differences = _why_configs_differ(one.config, two.config) or _why_modules_differ(one, two)
    if differences is None and _findings(policy) != _findings(reference):
        return "they store or read other things in a pass"
    return differences


def owns_parameters(module: torch.nn.Module) -> bool:
    """Whether parameters are the module's own, not those of modules within it."""
    return next(module.parameters(recurse=False), None) is not None


def why_parameters_differ(model: torch.nn.Module, other: torch.nn.Module) -> str | None:
    """Why two models' parameters do not fit the same code; None where they do."""
    own, others = (
        [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters_of(each)]
        for each in (model, other)
    )
    return None if own == others else "their parameters differ in number, shape, dtype or device"


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _findings(info: ModelInfo) -> tuple[Any, ...]:
    """What forward passes have shown of a model."""
    return info.layers, info.vocabulary, info.dtype, info.padding_fault, info.decode_attention


def _why_configs_differ(config: Any, other: Any) -> str | None:
    own, others = config.to_dict(), other.to_dict()
    names = {name for name in own.keys() | others.keys() if own.get(name) != others.get(name)} - NAMES
    return f"their configurations differ in {', '.join(sorted(names)[:3])}" if names else None


def _why_modules_differ(model: torch.nn.Module, other: torch.nn.Module) -> str | None:
    modules, others = dict(model.named_modules()), dict(other.named_modules())
    if names := sorted(modules.keys() ^ others.keys()):
        return f"only one of them has {names[0]}"
    shared = set(map(id, modules.values())) & set(map(id, others.values()))
    if shared:
        return "they share modules"
    for name, module in modules.items():
        if type(module) is not type(others[name]):
            return f"{name} is a {type(module).__name__} in one and a {type(others[name]).__name__} in the other"
        if _numbers(module) != _numbers(others[name]):
            return f"{name or 'the model'} has other numbers in one than in the other"
        if owns_parameters(module) and any(map(owns_parameters, list(module.modules())[1:])):
            return f"a {type(module).__name__} has parameters beside its modules"
        if (reason := _why_buffers_differ(module, others[name])) is not None:
            return reason
    return why_parameters_differ(model, other)


def _numbers(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name not in STATES
    }


def _why_buffers_differ(module: torch.nn.Module, other: torch.nn.Module) -> str | None:
    own, others = dict(module.named_buffers(recurse=False)), dict(other.named_buffers(recurse=False))
    equal = own.keys() == others.keys() and all(
        value.shape == others[name].shape and (value.device.type == "meta" or torch.equal(value, others[name]))
        for name, value in own.items()
    )
    return None if equal else f"buffers of a {type(module).__name__} differ"
