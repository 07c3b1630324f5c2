"""LoRA on a base whose matrices tensor parallelism splits.

A layer split by columns has lora_A whole on every process and the rows of lora_B that belong to its own outputs; one
split by rows has the columns of lora_A that belong to its own inputs, and lora_B whole. peft 0.21 creates and computes
them so. It draws initial weights per process, of a slice's size, and declares a slice's width where the whole one is
expected (peft 0.21.2); here the weights are those of an adapter on the whole base, and widths are whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from .optional import need
from .upstream import plain_class, plain_lora_layers
from .vocabulary import TENSOR_PARALLEL, is_dtensor

_INITS = (True, False, "gaussian", "orthogonal")  # that do not read the base's weights


def is_split(model: Any) -> bool:
    """Return whether tensor parallelism splits matrices of a model.

    Args:
        model: any module.
    """
    return any(_splits(value) for value in model.parameters())


def laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that all processes have whole.

    Args:
        value: the whole tensor.
        like: a tensor of its shape, split or not, whose layout the result gets.
    """
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    result: torch.Tensor = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return result


def check_splittable(peft_config: Any) -> None:
    """Raise where an adapter's initial weights or its layers would depend on more than a slice of the base.

    Args:
        peft_config: of the adapter.
    """
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    facts = {
        "peft_type": (kind, ("LORA",)),
        "init_lora_weights": (getattr(peft_config, "init_lora_weights", True), _INITS),
        "use_dora": (getattr(peft_config, "use_dora", False), (False,)),
        "target_parameters": (getattr(peft_config, "target_parameters", None) or None, (None,)),
        "modules_to_save": (getattr(peft_config, "modules_to_save", None) or None, (None,)),
    }
    for name, (value, allowed) in facts.items():
        if value not in allowed:
            raise ValueError(
                f"peft_config: {name}: expected one of {allowed} on matrices that tensor parallelism splits; got "
                f"{value!r}"
            )


def fit(model: Any, peft_config: Any, seed: int) -> None:
    """Give a new adapter on a split base the weights that it would have on the whole one. No collectives.

    Args:
        model: peft's model around the base.
        peft_config: of the adapter.
        seed: of the initial weights.
    """
    whole = dict(_adapter_on_nothing(model.get_base_model(), peft_config, seed))
    for name, parameter in list(model.named_parameters()):
        if name in whole:
            place, _, leaf = name.rpartition(".")
            value = laid_out(whole[name].detach().to(parameter.device, parameter.dtype), parameter)
            model.get_submodule(place)._parameters[leaf] = torch.nn.Parameter(value, parameter.requires_grad)
    widen(model)


def widen(model: Any) -> None:
    """Declare whole widths in the layers of split adapters, and raise where an adapter is not split as its layer is.

    Args:
        model: peft's model around a split base.
    """
    for name, layer in model.named_modules():
        if not hasattr(layer, "base_layer") or not is_split(layer.base_layer):
            continue
        place = name.removeprefix("base_model.model.")
        if type(layer) not in plain_lora_layers():
            raise ValueError(
                f"peft_config: target_modules: expected linear layers where tensor parallelism splits; got {place}"
            )
        for adapter in layer.lora_A:
            parts = layer.lora_A[adapter], layer.lora_B[adapter]
            if not _follows(layer.base_layer.weight, *(part.weight for part in parts)):
                raise ValueError(
                    "peft_config: expected peft 0.21, adapters that the trainer puts on the model, and layers split by "
                    f"columns or by rows, where tensor parallelism splits; got another split in {place}"
                )
            for part in parts:
                part.out_features, part.in_features = part.weight.shape


def _follows(weight: Any, a: Any, b: Any) -> bool:
    """Return whether an adapter's matrices are split as a layer's weight is, and have its widths."""
    dimension = weight.device_mesh.mesh_dim_names.index(TENSOR_PARALLEL)
    by_columns = weight.placements[dimension].is_shard(0)
    cut, whole = (b, a) if by_columns else (a, b)
    if not _splits(cut) or is_dtensor(whole) or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        return False
    processes, rank = weight.device_mesh.size(dimension), weight.device_mesh.get_local_rank(dimension)
    dim = 0 if by_columns else 1
    widest = -(-cut.shape[dim] // processes)
    own = max(0, min(widest, cut.shape[dim] - rank * widest))
    return bool(cut.to_local().shape[dim] == own)


def _splits(value: torch.Tensor) -> bool:
    return is_dtensor(value) and TENSOR_PARALLEL in (value.device_mesh.mesh_dim_names or ())


def _adapter_on_nothing(base: Any, peft_config: Any, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of an adapter on the whole base, whose own weights are zeros without memory."""
    peft = need("peft", "peft_config")
    config = copy.deepcopy(base.config)
    config.distributed_config = None
    with torch.device("meta"):
        empty = plain_class(base)(config)
    for module in empty.modules():
        for name, value in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)
            module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(empty, copy.deepcopy(peft_config))
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            yield name, value
