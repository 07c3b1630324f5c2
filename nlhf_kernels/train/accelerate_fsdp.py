"""FSDP2 as `accelerate launch --use_fsdp --fsdp_version 2` asks for it: accelerate shards whole models.

accelerate shards a model when the training begins. Copies for rollouts, opponents and checkpoints need the shards when
the trainer is made, so accelerate's own function is called then; it leaves a model alone that it has sharded already.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from ..core.upstream import fully_shard_by_accelerate
from .config import NashConfig
from .setup import OP, with_adapters
from .sharded import layout_of_model

_INSTEAD = "(or torchrun, with fsdp_size)"


def plugin_accelerator(args: NashConfig) -> Any:
    """Return an Accelerator with its FSDP2 plugin where the launcher asks for one, and None elsewhere; raise where the
    plugin is one that this trainer cannot use.

    Args:
        args: the configuration.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    from accelerate import Accelerator

    device = args.device  # starts the processes' group, as the configuration says
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no")  # as Trainer's
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or accelerator.distributed_type.value != "FSDP":
        raise ValueError(
            f"{OP}: --use_fsdp: expected several processes on GPUs, as accelerate ignores its FSDP plugin elsewhere; "
            f"got {args.world_size} on {device.type} {_INSTEAD}"
        )
    names = ("dp_replicate_size", "tp_size", "cp_size", "sp_size")
    sizes = {name: getattr(accelerator.parallelism_config, name, None) or 1 for name in names}
    faults = {
        f"fsdp_version {plugin.fsdp_version}": plugin.fsdp_version != 2,
        "fsdp_offload_params": _offloads(plugin),
        "fsdp_activation_checkpointing (activation_checkpointing of the run's configuration does the same)": bool(
            plugin.activation_checkpointing
        ),
        f"{sizes}": any(size > 1 for size in sizes.values()),
    }
    for fault, applies in faults.items():
        if applies:
            raise ValueError(
                f"{OP}: --use_fsdp: expected accelerate's plugin with fsdp_version 2 and no other parallelism, "
                f"offloading or activation checkpointing; got {fault}"
            )
    return accelerator


def shard(accelerator: Any, args: NashConfig, model: Any, peft_config: Any, *others: Any) -> Any:
    """Shard the models as accelerate does, in place; return the policy with its adapters.

    Args:
        accelerator: with the plugin.
        args: the configuration.
        model: the whole policy.
        peft_config: adapters to put on it, or None.
        others: models that are not trained; None is skipped.
    """
    for each in (model, *others):
        if isinstance(each, torch.nn.Module) and getattr(each, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                f"{OP}: --use_fsdp: expected whole models, which accelerate shards; got one that from_pretrained has "
                f"split, {layout_of_model(each)}"
            )
    if peft_config is not None and isinstance(model, torch.nn.Module):
        model = with_adapters(model, peft_config, args.seed)
    for each in (model, *others):
        if isinstance(each, torch.nn.Module):
            if each is not model:
                each.requires_grad_(False)
            _check_rows(each, accelerator.num_processes)
            fully_shard_by_accelerate(accelerator, each)
    return model


def accept_sharded(accelerator: Any) -> None:
    """Let an Accelerator prepare a model that is sharded already: to wrap its layers it would look for their classes by
    name, and FSDP2 has changed the names.

    Args:
        accelerator: with the plugin; its `prepare` is replaced.
    """
    prepare, plugin = accelerator.prepare, accelerator.state.fsdp_plugin

    def prepare_sharded(*objects: Any, **options: Any) -> Any:
        before, plugin.auto_wrap_policy = plugin.auto_wrap_policy, None
        try:
            return prepare(*objects, **options)
        finally:
            plugin.auto_wrap_policy = before

    accelerator.prepare = prepare_sharded


def _check_rows(model: Any, processes: int) -> None:
    """Raise where a process would hold nothing of a parameter: accelerate tells parameters apart by their memory."""
    for name, value in model.named_parameters():
        rows = value.shape[0] if value.ndim else 1
        if value.requires_grad and -(-rows // processes) * (processes - 1) >= rows:
            raise ValueError(
                f"{OP}: --use_fsdp: expected rows of every trained parameter for each of {processes} processes; got "
                f"{tuple(value.shape)} in {name} {_INSTEAD}"
            )


def _offloads(plugin: Any) -> bool:
    """Return whether the plugin keeps shards on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy)
