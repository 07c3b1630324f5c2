"""Models that several processes share, in training: the models of rollouts are gathered from the trained shards.

FSDP2 shards the trained state. A rollout needs a layer's weights at every token, so rollouts use copies of the models,
whose weights are gathered once before a rollout: whole, or, under tensor parallelism, this process's slice of every
matrix. The copies are separate modules without FSDP2. Without FSDP2 and in one dtype a copy shares the trained weights'
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..core import split_adapters
from ..core.optional import need
from ..core.upstream import skeleton
from ..core.vocabulary import TENSOR_PARALLEL, is_dtensor
from ..engine.peft_models import is_adapted
from ..engine.sharded import fsdp_modules
from .layout import Layout

Tensors = Mapping[str, torch.Tensor]


def layout_of_model(model: Any) -> Layout:
    """Return how `from_pretrained` or accelerate has split a model; any other is whole on every process.

    Args:
        model: a model of transformers, or peft's around one.
    """
    base = base_of_model(model)
    split = getattr(getattr(base, "config", None), "distributed_config", None)
    if split is not None and getattr(base, "is_distributed_loading_by_transformers", False):
        return Layout(split.tp_size, split.fsdp_size, split.dp_replicate_size)
    stored = next((value for module in fsdp_modules(model) for value in module.parameters() if is_dtensor(value)), None)
    return Layout() if stored is None else Layout(fsdp_size=stored.device_mesh.size())


def base_of_model(model: Any) -> Any:
    """Return the model inside peft's.

    Args:
        model: a model of transformers, or peft's around one.
    """
    return model.get_base_model() if is_adapted(model) else model


def gathered(value: torch.Tensor) -> torch.Tensor:
    """Return a parameter without FSDP2's split: whole, or a DTensor of this process's tensor-parallel group.

    Args:
        value: a parameter, or a tensor that is laid out as one. All processes must call.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh, split = value.device_mesh, TENSOR_PARALLEL
    names = mesh.mesh_dim_names or ("",) * mesh.ndim  # accelerate's mesh has no names
    if names == (split,):
        return value  # type: ignore[no-any-return]
    placements = [part if name == split else Replicate() for name, part in zip(names, value.placements, strict=True)]
    own: torch.Tensor = value.redistribute(placements=placements).to_local()
    if split not in names:
        return own
    shape = {"shape": value.shape, "stride": value.stride()}
    result: torch.Tensor = DTensor.from_local(
        own, mesh[split], [placements[names.index(split)]], run_check=False, **shape
    )
    return result


def local(value: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor.

    Args:
        value: a tensor, split or not.
    """
    own: torch.Tensor = value.to_local() if is_dtensor(value) else value
    return own


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor. All processes must call.

    Args:
        value: a tensor, split or not.
    """
    full: torch.Tensor = value.full_tensor() if is_dtensor(value) else value
    return full


def whole_weights(model: Any, *, keep: bool) -> Tensors:
    """Return what `save_pretrained` writes of a model, gathered: all weights, or its adapters. All processes must call.

    Args:
        model: a model of transformers, or peft's around one.
        keep: whether this process needs them; False: it only takes part, and gets nothing.
    """
    reshard(model)
    adapters = tuple(f".{name}." for name in model.peft_config) if is_adapted(model) else (".",)
    weights: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if any(part in f".{name}." for part in adapters):
            full = whole(value.detach())
            if keep:
                weights[name] = full.cpu()
    return weights


def save_whole(model: Any, folder: Any, *, writes: bool) -> None:
    """Write a split model, or its adapters, as `from_pretrained` reads it. All processes must call.

    Args:
        model: a model of transformers, or peft's around one.
        folder: where to.
        writes: whether this process is the one that writes.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False) and not is_adapted(model):
        model.save_pretrained(folder, is_main_process=writes)  # it gathers the weights itself
        return
    weights = whole_weights(model, keep=writes)
    if writes:
        model.save_pretrained(folder, state_dict=weights)


class GatheredModel:
    """A gathered copy of a split model, for rollouts.

    Args:
        model: the split model, or peft's around one.
        dtype: of the copy; None: the weights' own.
        source: returns tensors by names of the model's parameters, which the copy takes at every `refresh`, laid out as
            the parameters are; names that are missing stay the model's own. None: the model's.
        shares: whether the copy may share the source's memory where nothing is gathered or cast.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype | None,
        source: Callable[[], Tensors] | None = None,
        *,
        shares: bool = True,
    ) -> None:
        self.source: Callable[[], Tensors] = dict if source is None else source
        reshard(model)
        self.trained = model
        self.dtype = dtype or next(iter(model.parameters())).dtype
        self.model = _empty_copy(model)
        self._targets: dict[str, torch.nn.Parameter] = {}
        self._shared: set[str] = set()
        values = dict(model.named_parameters())
        values |= {name: value for name, value in self.source().items() if name in values}
        with torch.no_grad():
            made: dict[int, torch.nn.Parameter] = {}
            for name, empty in list(self.model.named_parameters(remove_duplicate=False)):
                if id(empty) not in made:
                    value = values[name].detach()
                    result = gathered(value).to(dtype or value.dtype)
                    alias = local(result).data_ptr() == local(value).data_ptr()
                    if alias and not shares:
                        result, alias = result.clone(), False
                    made[id(empty)] = torch.nn.Parameter(result, requires_grad=False)
                    self._targets[name] = made[id(empty)]
                    if alias:
                        self._shared.add(name)
                _put(self.model, name, made[id(empty)])
            for name, buffer in base_of_model(model).named_buffers():
                _put(base_of_model(self.model), name, buffer)
        self.model.eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the source's current values. All processes must call."""
        reshard(self.trained)
        current = dict(self.trained.named_parameters())
        current |= {name: value for name, value in self.source().items() if name in current}
        for name, target in self._targets.items():
            if name not in self._shared:
                local(target.data).copy_(local(gathered(current[name].detach())))


def average_split_gradients(model: Any, layout: Layout) -> None:
    """Average over groups the gradients of adapters that tensor parallelism splits.

    FSDP2 averages those of the parameters that it stores, transformers those of parameters that processes have whole.

    Args:
        model: the policy, whose other parameters are left alone.
        layout: of its processes.
    """
    if not is_adapted(model) or layout.tp_size == 1 or layout.data_parallel == 1:
        return
    rank, groups = torch.distributed.get_rank(), []
    for first in range(layout.tp_size):  # every process makes all groups, in one order
        groups.append(torch.distributed.new_group(range(first, layout.processes, layout.tp_size)))

    def average(parameter: torch.Tensor) -> None:
        own = local(parameter.grad)  # type: ignore[arg-type]
        torch.distributed.all_reduce(own, group=groups[rank % layout.tp_size])
        own /= layout.data_parallel

    for parameter in model.parameters():
        if parameter.requires_grad and is_dtensor(parameter):
            parameter.register_post_accumulate_grad_hook(average)


def reshard(model: Any) -> None:
    """Let FSDP2 release gathered parameters after a forward pass without a backward pass.

    Args:
        model: any module.
    """
    for module in fsdp_modules(model):
        module.reshard()


def _empty_copy(model: Any) -> Any:
    """Return the same modules on the meta device, adapters included."""
    base = skeleton(base_of_model(model))
    if not is_adapted(model):
        return base
    peft = need("peft", "NashTrainer")
    (name, config), *others = model.peft_config.items()
    with torch.device("meta"):
        copy = peft.get_peft_model(base, config, adapter_name=name, low_cpu_mem_usage=True)
        for other, options in others:
            copy.add_adapter(other, options, low_cpu_mem_usage=True)
    copy.set_adapter(model.active_adapter)
    if split_adapters.is_split(base):
        split_adapters.widen(copy)
    return copy


def _put(model: Any, name: str, value: Any) -> None:
    place, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(place), leaf, value)
