"""Checks and preparation of a trainer's models, judges and processes before training starts."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch

from ..core import split_adapters
from ..core.adapters import new_adapter
from ..core.checks import check_number
from ..core.loading import check_finite
from ..core.modes import eval_mode
from ..core.optional import need
from ..core.upstream import has_injected_adapter, uncompiled
from ..engine.model_info import clone_with_parameters
from ..engine.peft_models import is_adapted
from . import opponents
from .config import FIXED, NashConfig
from .layout import Layout, check_optimizer
from .processes import DataParallel
from .sharded import GatheredModel, layout_of_model

OP = "NashTrainer"
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")  # of accelerate's distributed types
_log = logging.getLogger(__name__)


def check_judges(args: NashConfig, judge: Any, reward: Any) -> None:
    needed = {"judge": judge, "reward": reward}[args.algorithm_spec.judged_by]
    if needed is None:
        raise ValueError(f"{OP}: {args.algorithm_spec.judged_by}: expected one, for {args.algorithm}; got None")
    for name, value in (("judge", judge), ("reward", reward)):
        if value is not None and not callable(value):
            raise TypeError(f"{OP}: {name}: expected a callable; got {type(value).__name__}")


def rollout_dtype(args: NashConfig) -> torch.dtype | None:
    """Return the dtype of rollouts; None: that of the weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_precision(args: NashConfig, accelerator: Any, model: Any) -> None:
    """Raise where `fp16` would train without a gradient scaler, or weights whose gradients it does not unscale."""
    if not args.fp16:
        return
    if accelerator.scaler is None:
        raise ValueError(f"{OP}: fp16: expected a GPU, whose gradients are scaled; got {args.device} (bf16 needs none)")
    for name, value in opponents.trainable_parameters(model).items():
        if value.dtype != torch.float32:
            raise ValueError(f"{OP}: fp16: expected float32 weights to train; got {value.dtype} in {name}")


def check_processes(args: NashConfig, accelerator: Any, processes: DataParallel, prompts: Mapping[str, Sized]) -> None:
    if args.n_gpu > 1:
        raise ValueError(f"{OP}: expected one device per process; got {args.n_gpu} (accelerate launch starts more)")
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        raise ValueError(f"{OP}: deepspeed: expected None, as {FIXED['deepspeed']}; got a DeepSpeed launch")
    if kind not in KINDS and not (kind == "FSDP" and processes.layout.fsdp_size > 1):
        raise ValueError(f"{OP}: expected processes with the whole model each ({', '.join(KINDS)}); got {kind}")
    for name, rows in prompts.items():
        if len(rows) < processes.groups:
            raise ValueError(
                f"{OP}: {name}: expected a prompt for each of {processes.groups} {processes.name}; got {len(rows)}"
            )


def check_batches(args: NashConfig, processes: DataParallel, train_dataset: Sized | None) -> None:
    """Raise where `dataloader_drop_last` would drop the only batch, as a run without updates would follow."""
    batch = args.per_device_train_batch_size * processes.groups
    if args.dataloader_drop_last and train_dataset is not None and len(train_dataset) < batch:
        raise ValueError(
            f"{OP}: train_dataset: expected a whole batch, {batch} prompts, with dataloader_drop_last; got "
            f"{len(train_dataset)}"
        )


def check_best_metric(args: NashConfig, names: Sequence[str]) -> None:
    """Raise where `metric_for_best_model`, "loss" unless set, is none of the metrics that evaluations will return."""
    metric = args.metric_for_best_model
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in names:
        raise ValueError(f"{OP}: metric_for_best_model: expected one of {', '.join(names)}; got {metric!r}")


def check_layout(args: NashConfig, model: Any, **others: Any) -> Layout:
    """Return how processes share the models; raise where the models or the configuration disagree.

    Args:
        args: the configuration, whose sizes need to be set only where models are yet to be loaded.
        model: the policy.
        others: the other models by their arguments' names; None is skipped.
    """
    models = {"model": model, **{name: other for name, other in others.items() if other is not None}}
    for name, each in models.items():
        if not isinstance(each, torch.nn.Module):
            raise TypeError(f"{OP}: {name}: expected a causal language model; got {type(each).__name__}")
    if uncompiled(model) is not model:
        raise ValueError(
            f"{OP}: model: expected one without torch.compile, as {FIXED['torch_compile']}; got a compiled one"
        )
    layout = layout_of_model(model)
    for name, each in models.items():
        split = getattr(getattr(each, "config", None), "distributed_config", None)
        for size in ("ep_size", "pp_size"):
            if (getattr(split, size, None) or 1) > 1:
                raise ValueError(
                    f"{OP}: {name}: expected a DistributedConfig of tp_size, fsdp_size and dp_replicate_size alone, "
                    f"which split mixtures of experts too; got {size} {getattr(split, size)}"
                )
    for name in ("tp_size", "fsdp_size"):
        size = getattr(layout, name)
        if getattr(args, name) not in (1, size):
            raise ValueError(
                f"{OP}: model: expected one that from_pretrained has split by DistributedConfig({name}="
                f"{getattr(args, name)}), as args.{name} is; got {name} {size}"
            )
    for name, each in models.items():
        if layout_of_model(each) != layout:
            raise ValueError(
                f"{OP}: {name}: expected a model that is split as the policy, {layout}; got {layout_of_model(each)}"
            )
    check_optimizer(OP, args.optim, layout)
    if layout.tp_size > 1 and is_adapted(model):
        split_adapters.widen(model)
    if layout.sharded and layout.processes != args.world_size:
        raise ValueError(f"{OP}: model: expected a layout of {args.world_size} processes; got {layout}")
    return layout


def with_reference(model: Any, reference: Any, peft_config: Any, seed: int, *, split: bool = False) -> tuple[Any, Any]:
    """Return the policy with its adapters, and its reference: None where that is the policy's own base."""
    if has_injected_adapter(model):  # its base cannot be told apart
        raise ValueError(
            f"{OP}: model: expected peft's own model around an adapter and its base; got an adapter that transformers "
            "has put into the base (peft's AutoPeftModelForCausalLM loads it, with is_trainable=True)"
        )
    if reference is model:
        raise ValueError(f"{OP}: reference_model: expected another model than the trained one; got the same object")
    if peft_config is not None:
        model = with_adapters(model, peft_config, seed)
    if reference is None and is_adapted(model):
        _check_base_stays(model)
    elif reference is None and not split:
        reference = copy.deepcopy(model)
    _check_weights(model)
    for name, checked_model in (("model", model), ("reference_model", reference)):
        if checked_model is not None:
            check_finite(f"{OP}: {name}", checked_model)
    return model, reference


def _check_weights(model: torch.nn.Module) -> None:
    if not opponents.trainable_parameters(model):
        hint = " (is_trainable=True loads an adapter to train it)" if is_adapted(model) else ""
        raise ValueError(f"{OP}: model: expected parameters to train; got none that require a gradient{hint}")
    for name, value in model.named_parameters():
        if not value.is_floating_point():
            raise ValueError(f"{OP}: model: expected weights that are not quantised; got {value.dtype} in {name}")
    low = next(
        (value.dtype for value in opponents.trainable_parameters(model).values() if value.dtype.itemsize < 4), None
    )
    if low is not None:
        warnings.warn(
            f"{OP}: model: expected float32 weights, since steps smaller than 1/{round(2 / torch.finfo(low).eps)} of a "
            f"weight vanish in {str(low).removeprefix('torch.')} (bf16=True has the products in bfloat16; adapters are "
            "trained in float32)",
            stacklevel=4,
        )
    devices = sorted({str(value.device) for value in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"{OP}: model: expected the whole model on one device; got it on {', '.join(devices)}")


def freeze_for_rollouts(args: NashConfig, reference: Any, eval_opponent: Any) -> None:
    """Freeze models that are not trained, and move them to the device and dtype of rollouts; None is skipped."""
    dtype = rollout_dtype(args)
    options: dict[str, Any] = {"device": args.device} | ({} if dtype is None else {"dtype": dtype})
    for model in (reference, eval_opponent):
        if model is not None:
            model.requires_grad_(False).eval().to(**options)
    if eval_opponent is not None:
        check_finite(f"{OP}: eval_opponent", eval_opponent)


def gather_for_rollouts(args: NashConfig, model: Any, reference: Any, eval_opponent: Any) -> tuple[Any, Any]:
    """Return copies of split models that answer prompts, in the dtype of rollouts; None stays None.

    Without a reference and without adapters, the reference is a copy of the current policy.

    Args:
        args: the configuration.
        model: the policy.
        reference, eval_opponent: split as the policy is, or None.
    """
    dtype = rollout_dtype(args)
    for other in (reference, eval_opponent):
        if other is not None:
            other.requires_grad_(False)
    if reference is not None:
        reference = GatheredModel(reference, dtype).model
    elif not is_adapted(model):
        reference = GatheredModel(model, dtype, shares=False).model
    if eval_opponent is not None:
        eval_opponent = GatheredModel(eval_opponent, dtype).model
        check_finite(f"{OP}: eval_opponent", eval_opponent)
    return reference, eval_opponent


@torch.no_grad()
def broadcast_weights(*models: Any) -> None:
    """Give all processes the first one's weights; None among the models is skipped.

    Call it before references and opponents are copied from the weights: preparing a model for several processes
    broadcasts the trained model alone, and only after these copies.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for model in models:
        for value in () if model is None else (*model.parameters(), *model.buffers()):
            whole = value.detach().contiguous()
            torch.distributed.broadcast(whole.flatten().view(torch.uint8), 0)  # bytes: every dtype, every backend
            if not value.is_contiguous():
                value.copy_(whole)


def with_adapters(model: Any, peft_config: Any, seed: int) -> Any:
    """Return the model with new adapters on it, whose dropout is off; their weights depend on the seed alone."""
    if is_adapted(model):
        raise ValueError(f"{OP}: peft_config: expected with a model without adapters; got one that has some")
    if not isinstance(peft_config, need("peft", f"{OP}: peft_config").PeftConfig):
        raise TypeError(f"{OP}: peft_config: expected a peft.PeftConfig; got {type(peft_config).__name__}")
    if (alpha := getattr(peft_config, "lora_alpha", None)) is not None:
        check_number(OP, "peft_config: lora_alpha", alpha, 0.0, open_low=True)
    rates = {name: value for name, value in vars(peft_config).items() if name.endswith("dropout") and value}
    if rates:
        peft_config = copy.copy(peft_config)
        for name, value in rates.items():
            setattr(peft_config, name, 0.0)
            _log.warning(
                "%s: peft_config: %s=%s is trained as 0: answers are scored by the distribution they were drawn from",
                OP, name, value,
            )  # fmt: skip
    return new_adapter(model, peft_config, seed)


def _check_base_stays(model: Any) -> None:
    """Raise where a weight of the base is trained: then the base would not stay the reference."""
    adapters = tuple(f".{name}." for name in model.peft_config)
    changing = [
        name for name in opponents.trainable_parameters(model) if not any(part in f".{name}." for part in adapters)
    ]
    if changing:
        raise ValueError(
            f"{OP}: reference_model: expected one, as the model trains {changing[0]} beside its adapters, and its base "
            "would not stay what it was; got None"
        )


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Replace the engine's argument names in its errors by the trainer's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        for role, argument in {"policy": "model", "reference": "reference_model"}.items():
            text = text.replace(f"{OP}: {role}: ", f"{OP}: {argument}: ")
        raise type(error)(text) from error


def make_opponent(model: Any, dtype: torch.dtype | None, args: NashConfig) -> tuple[opponents.Opponent | None, Any]:
    """Return the opponent where it has weights of its own, and mirror prox's anchor as a model around its weights."""
    if args.algorithm_spec.opponent == "average":
        return opponents.Average(model, dtype, args.ema_decay), None
    if args.algorithm_spec.opponent == "snapshot":
        snapshots = opponents.Snapshots(model, dtype, args.refresh_steps)
        return snapshots, clone_with_parameters(model, snapshots.anchor, OP).eval()
    return None, None


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Switch dropout off in the loss, because answers are sampled without it.

    The model is in evaluation mode; only modules that recompute their activations are in training mode, without which
    they do not. They may apply dropout in their own forward pass, so their rates are set to zero.
    """
    recomputing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    rates = [
        (module, name, value)
        for module in recomputing
        for name, value in vars(module).items()
        if "dropout" in name and isinstance(value, float) and value
    ]
    with eval_mode(model):
        for module in recomputing:
            module.training = True
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        try:
            yield
        finally:
            for module, name, value in rates:
                setattr(module, name, value)
