"""`nlhf-kernels plan`: the memory that a training run allocates on every GPU, by layout, without loading a model.

Reads the run file and the models' configurations. The verdict is for the run's own tp_size, fsdp_size and
dp_replicate_size; if the run does not fit, the verdict names settings with which it fits.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.adapters import is_adapter
from ..core.loading import load_configuration
from ..core.optional import need, require
from ..core.terminal import new_console
from .errors import DONE, FAILED, BadInput

if TYPE_CHECKING:
    from ..train import NashConfig
    from ..train.layout import Layout
    from ..train.memory_plan import Models, RankPlan
    from ..train.model_shapes import ModelShapes
    from ..train.run_file import RunFile

HEADROOM = 0.1  # of a GPU, for PyTorch's allocator, the CUDA context and the buffers of collectives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="RUN.yaml", help="the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="training.tp_size=2, say")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, one a GPU (default 1)")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of one GPU, in GiB")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what the run will train on (default cuda)"
    )


def run(arguments: argparse.Namespace) -> int:
    require("nlhf-kernels plan", ("transformers", "accelerate", "yaml"), "train")
    from ..train.layout import check_divides, check_optimizer, layout_of
    from ..train.memory_plan import plan_rank
    from ..train.run_file import option_names, read_run_file

    arguments.option_names.update(option_names())
    if arguments.gpus < 1 or arguments.gpu_memory <= 0:
        raise BadInput("plan: --gpus, --gpu-memory: expected numbers above 0")
    run_file = read_run_file(arguments.config, [*arguments.set, "training.use_cpu=true"])  # plan without a GPU too
    args = run_file.config()
    layout = layout_of("train", args.tp_size, args.fsdp_size, args.dp_replicate_size, arguments.gpus)
    check_optimizer("train", args.optim, layout)
    models = _models(run_file)
    check_divides("train", "model", models.policy.config, layout.tp_size)
    memory = int(arguments.gpu_memory * 2**30)
    limit = _limit(memory)
    plan = plan_rank(models, args, layout, arguments.device, memory)
    trained = models.policy.bytes(type(layout)(), trained=True, size=lambda _: 1)
    console = new_console()
    console.print(f"{args.algorithm}: {trained:,} trained parameters; {layout}; on every rank:")
    width = max(map(len, plan.parts))
    for name, size in [*plan.parts.items(), ("all", plan.total)]:
        console.print(f"  {name:<{width}}  {_size(size):>10}")
    if arguments.gpus > 1:
        console.print(f"\n{arguments.gpus} GPUs, by layout:")
        for other in sorted(_layouts(arguments.gpus, models), key=lambda each: (each.tp_size, -each.fsdp_size)):
            total = plan_rank(models, args, other, arguments.device, memory).total
            mark = "fits" if total <= limit else "does not fit"
            console.print(f"  {other!s:<32} {_size(total):>10}  {mark}")
    console.print()
    console.print("\n".join(_verdict(models, args, plan, memory, arguments.device)), soft_wrap=True)
    return DONE if plan.total <= limit else FAILED


def _limit(memory: int) -> int:
    """Return the bytes of a GPU that a plan may take."""
    return int((1 - HEADROOM) * memory)


def _models(run_file: RunFile) -> Models:
    from ..train.memory_plan import Models

    policy = _shapes("model", run_file.model, run_file)
    reference = None
    if run_file.reference_model is not None:
        reference = _shapes("reference_model", run_file.reference_model, run_file)
    elif policy.lora is None:
        reference = policy
    rival = run_file.eval_opponent
    folders = [spec.preference_model or spec.reward_model for spec in run_file.judge or ()]
    folders.append(None if run_file.reward is None else run_file.reward.reward_model)
    return Models(
        policy,
        reference,
        None if rival is None else _shapes("eval_opponent", rival, run_file),
        sum(_bytes_of_weights(Path(folder)) for folder in folders if folder is not None),
    )


def _shapes(place: str, name: str, run_file: RunFile) -> ModelShapes:
    """Return the shapes of the model named `name`, without loading weights; the policy's include its adapters."""
    from ..train.model_shapes import ModelShapes

    config = load_configuration(f"train: {place}", name, trust_remote_code=run_file.trust_remote_code)
    lora: Any = None
    if place == "model" and run_file.lora is not None:
        lora = need("peft", "plan").LoraConfig(**{"task_type": "CAUSAL_LM", **run_file.lora})
    elif place == "model" and is_adapter(name):
        lora = need("peft", "plan").PeftConfig.from_pretrained(name)
    if lora is not None:
        lora.inference_mode = False
    dtype = getattr(config, "dtype", None) or torch.float32 if run_file.dtype == "auto" else run_file.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return ModelShapes(config, dtype, lora, run_file.trust_remote_code)


def _bytes_of_weights(folder: Path) -> int:
    if not folder.is_dir():
        raise BadInput(f"plan: expected a folder of `nlhf-kernels prefer train`; got {folder}")
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _layouts(gpus: int, models: Models) -> Iterator[Layout]:
    """Yield the layouts that the number of processes and the policy's heads and vocabulary allow."""
    from ..train.layout import Layout, check_divides

    divisors = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for tp_size in divisors if models.policy.plan else [1]:
        try:
            check_divides("plan", "model", models.policy.config, tp_size)
        except ValueError:
            continue
        for fsdp_size in divisors:
            if gpus % (tp_size * fsdp_size) == 0:
                yield Layout(tp_size, fsdp_size, gpus // (tp_size * fsdp_size))


def _verdict(models: Models, args: NashConfig, plan: RankPlan, memory: int, device: str) -> Iterator[str]:
    limit = _limit(memory)
    room = f"{_size(limit)} (a GPU, less {HEADROOM:.0%} for the allocator and collectives)"
    if plan.total <= limit:
        yield f"fits: {_size(plan.total)} of {room}"
        return
    yield f"does not fit: {_size(plan.total)} of {room}"
    for changes, total in _remedies(models, args, plan.layout, memory, device):
        yield f"{' '.join(changes)} would: {_size(total)}"
        return
    yield f"no layout of {plan.layout.processes} GPUs would: a smaller model, adapters (lora), or more GPUs"


def _remedies(
    models: Models, args: NashConfig, layout: Layout, memory: int, device: str
) -> Iterator[tuple[list[str], int]]:
    """Yield changes that make the run fit, cheapest first: a layout, then single settings."""
    from ..train.memory_plan import plan_rank

    changed = copy.copy(args)
    settings: list[str] = []
    layouts = sorted(_layouts(layout.processes, models), key=lambda each: (each.tp_size, each.dp_replicate_size))
    for name, value in _settings(args):
        if name:
            setattr(changed, name, value)
            settings = [each for each in settings if not each.startswith(f"training.{name}=")]
            settings.append(f"training.{name}={str(value).lower()}")
        for other in [layout, *(each for each in layouts if each != layout)]:
            total = plan_rank(models, changed, other, device, memory).total
            if total <= _limit(memory):
                sizes = ("tp_size", "fsdp_size", "dp_replicate_size")
                moved = [f"training.{size}={getattr(other, size)}" for size in sizes] if other != layout else []
                yield [*moved, *settings], total


def _settings(args: NashConfig) -> Iterator[tuple[str, Any]]:
    yield "", None
    if not (args.bf16 or args.fp16):
        yield "bf16", True
    checkpointing = (
        "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    )
    if not getattr(args, checkpointing):
        yield checkpointing, True
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    while size > 1 and size % 2 == 0:
        size, accumulated = size // 2, accumulated * 2
        yield "gradient_accumulation_steps", accumulated
        yield "per_device_train_batch_size", size


def _size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.2f} MiB"
