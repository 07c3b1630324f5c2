"""`nlhf-kernels train`: train a policy that no other policy is preferred to, as described by a YAML run file.

The trained policy is saved in `policy/` under output_dir, beside its checkpoints. --example prints a run file to start
from, --keys prints all keys.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.atomic import atomic_folder, check_folder
from ..core.loading import check_finite, load_configuration, load_model, load_tokenizer, loading, quiet
from ..core.lock import lock_folder
from ..core.manifest import kind_of
from ..core.optional import need, require
from ..core.processes import leave_process_group
from ..data import load_prompts
from .common import load_function, read_data, show_next
from .errors import BadInput, SaidByFirst

if TYPE_CHECKING:
    from ..train import NashConfig, NashTrainer
    from ..train.run_file import JudgeSpec, RewardSpec, RunFile

POLICY = KIND = "policy"  # the folder's name, and the kind in its manifest
JUDGES = ("preference_model", "reward_model")
EXAMPLE = Path(__file__).parent.parent / "train" / "example.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="RUN.yaml", help="the run")
    what.add_argument("--example", action="store_true", help="print a run to begin with")
    what.add_argument("--keys", action="store_true", help="print every key a run may have, as docs/configuration.md")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="training.beta=0.25, say")
    parser.add_argument("--resume", action="store_true", help="go on from output_dir's last checkpoint, if it has one")
    parser.add_argument(
        "--check", action="store_true", help="load everything, try two updates, print time and memory; nothing is kept"
    )
    parser.set_defaults(output=None)  # the run's output_dir, once it is known


def run(arguments: argparse.Namespace) -> int:
    if arguments.example:
        print(EXAMPLE.read_text(encoding="utf-8"), end="")
        return 0
    require("nlhf-kernels train", ("transformers", "accelerate", "yaml"), "train")
    if arguments.keys:
        from ..train.config_page import configuration_page

        print(configuration_page(), end="")
        return 0
    from ..train.run_file import option_names, read_run_file

    arguments.option_names.update(option_names())
    with _said_once_per_machine():
        run_file = read_run_file(arguments.config, arguments.set)
        arguments.output = run_file.training["output_dir"]
        place = Path(arguments.output) / POLICY
        replaces = arguments.resume or run_file.training.get("overwrite_output_dir", False)
        _check_policy(run_file, place, replaces=replaces)
        args = run_file.config()
    split = _split(run_file, args)
    if arguments.check or args.process_index:
        code = _train(arguments, run_file, args, split, place)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(place.parent):  # taken before models are loaded
            code = _train(arguments, run_file, args, split, place)
    leave_process_group()
    return code


@contextmanager
def _said_once_per_machine() -> Iterator[None]:
    """Let the first of a machine's processes report what is wrong with a run file; all of them end."""
    from accelerate.utils import get_int_from_env

    try:
        yield
    except (BadInput, ValueError, TypeError, OSError) as error:
        if get_int_from_env(("LOCAL_RANK",), 0) > 0:
            raise SaidByFirst from error
        raise


def _split(run_file: RunFile, args: NashConfig) -> Any:
    """Return the DistributedConfig that the run's models are loaded with, or None; refuse a bad layout before any model
    is loaded."""
    from ..core.upstream import distributed_config_class
    from ..train.accelerate_fsdp import plugin_accelerator
    from ..train.layout import check_divides, check_optimizer, layout_of
    from ..train.model_shapes import ModelShapes

    try:
        plugin_accelerator(args)  # raises where accelerate's plugin cannot be used
        layout = layout_of("train", args.tp_size, args.fsdp_size, args.dp_replicate_size, args.world_size)
        if not layout.sharded:
            return None
        check_optimizer("train", args.optim, layout)
        if (kind := distributed_config_class()) is None:
            raise BadInput("train: tp_size, fsdp_size: expected a newer transformers, with DistributedConfig's sizes")
        for key in ("model", "reference_model", "eval_opponent"):
            if (name := getattr(run_file, key)) is not None:
                config = load_configuration(f"train: {key}", name, trust_remote_code=run_file.trust_remote_code)
                check_divides("train", key, config, layout.tp_size)
                if layout.tp_size > 1 and not ModelShapes(config, trust_remote_code=run_file.trust_remote_code).plan:
                    raise BadInput(
                        f"train: {key}: expected an architecture with a plan of tensor parallelism; got "
                        f"{config.model_type} (fsdp_size shares any model)"
                    )
    except (BadInput, ValueError) as error:
        if args.process_index:
            raise SaidByFirst from error
        raise
    return kind(
        tp_size=layout.tp_size,
        fsdp_size=layout.fsdp_size,
        dp_replicate_size=layout.dp_replicate_size,
        fsdp_mixed_precision=bool(args.bf16 and layout.fsdp_size > 1),
    )


def _train(arguments: argparse.Namespace, run_file: RunFile, args: NashConfig, split: Any, place: Path) -> int:
    from ..train.checkpoints import list_checkpoints
    from ..train.sharded import save_whole

    trainer = build(run_file, args, split)
    if arguments.check:
        return _check(arguments, trainer)
    trainer.train(resume_from_checkpoint=bool(arguments.resume and list_checkpoints(Path(trainer.args.output_dir))))
    if trainer.state.global_step < trainer.state.max_steps:  # by a callback, or a signal that transformers handles
        progress = f"{trainer.state.global_step} of {trainer.state.max_steps} updates"
        raise RuntimeError(f"stopped after {progress}, which is not the run's end: {resume_hint(arguments)}")
    check_finite(f"train: {place} is not written", trainer.model)
    if trainer.is_world_process_zero():
        with quiet(), atomic_folder(place, KIND, overwrite=True) as work:
            save_whole(trainer.model, work, writes=True)
            trainer.processing_class.save_pretrained(work)
    elif trainer.layout.sharded:  # a collective: all processes gather weights, the first one writes
        save_whole(trainer.model, place.parent, writes=False)
    if trainer.eval_dataset is not None:
        metrics = {name: value for name, value in trainer.evaluate().items() if name != "epoch"}
        _say(trainer, json.dumps(metrics, indent=2))
    _say(trainer, f"Saved: {place}")
    if trainer.is_world_process_zero():
        show_next(*_next(run_file, str(place)))
    return 0


def _check(arguments: argparse.Namespace, trainer: NashTrainer) -> int:
    from ..train.estimate import describe, estimate

    count = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    _say(trainer, f"{trainer.args.algorithm}: {len(trainer.train_dataset)} prompts, {count:,} trained parameters")
    _say(trainer, "\n".join([*describe(estimate(trainer)), "ready"]))
    if trainer.is_world_process_zero():
        changes = [word for change in arguments.set for word in ("--set", change)]
        show_next(["nlhf-kernels", "train", "--config", str(arguments.config), *changes])
    return 0


def _next(run_file: RunFile, policy: str) -> Iterator[list[str]]:
    program = "nlhf-kernels"
    yield [program, "sample", "--policy", policy, "--text", "--prompt", "..."]
    judges = [spec.function or spec.preference_model or spec.reward_model for spec in run_file.judge or ()]
    if judges and judges[0] is not None:
        rivals = ["--policy", f"before={run_file.reference_model or run_file.model}", "--policy", f"after={policy}"]
        data = ["--data", run_file.data.evaluation or run_file.data.train]
        yield [program, "evaluate", *rivals, "--judge", judges[0], *data]
    if run_file.lora is not None:
        yield [program, "merge", policy, "--output", f"{policy}-merged"]


def resume_hint(arguments: argparse.Namespace) -> str:
    from ..train.checkpoints import list_checkpoints

    checkpoints = [] if arguments.output is None else list_checkpoints(Path(arguments.output))
    return f"--resume goes on from {checkpoints[-1]}" if checkpoints else "no checkpoint was written"


def _say(trainer: NashTrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        print(text)


def _check_policy(run_file: RunFile, place: Path, replaces: bool) -> None:
    """Check, before training, that the policy's folder is absent or may be replaced, and that no model is read from
    it."""
    from ..train.checkpoints import list_checkpoints

    earlier = [place] if kind_of(place) == KIND else list_checkpoints(place.parent)
    if earlier and not replaces:
        raise BadInput(
            f"train: training.output_dir: expected a folder without an earlier run; got one that holds {earlier[-1]} "
            "(--resume goes on with its run, training.overwrite_output_dir=true starts over)"
        )
    check_folder(place, KIND, overwrite=replaces)
    judges = [(f"judge.{name}", getattr(spec, name)) for spec in run_file.judge or () for name in JUDGES]
    models = [(name, getattr(run_file, name)) for name in ("model", "reference_model", "tokenizer", "eval_opponent")]
    for option, name in [*models, *judges, ("reward.reward_model", run_file.reward and run_file.reward.reward_model)]:
        for folder in [] if name is None else [Path(name), *_base_of(Path(name))]:
            if folder.resolve().is_relative_to(place.resolve()):
                raise BadInput(
                    f"train: {option}: expected a folder that this run does not replace; got {name}: its own policy "
                    f"will be {place} (another output_dir keeps both)"
                )


def _base_of(adapters: Path) -> list[Path]:
    try:
        return [Path(json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def build(run_file: RunFile, args: NashConfig, split: Any = None) -> NashTrainer:
    """Load the models, judges and data of a run file; return its trainer.

    Args:
        run_file: the run.
        args: its NashConfig.
        split: transformers' DistributedConfig of the models; None: every process holds whole models.
    """
    from ..train import NashTrainer

    place = "model" if run_file.tokenizer is None else "tokenizer"
    tokenizer = load_tokenizer(
        f"train: {place}", getattr(run_file, place), trust_remote_code=run_file.trust_remote_code
    )
    data, peft_config = run_file.data, None
    train_prompts = _prompts("data.train", data.train, data.train_split, tokenizer)
    eval_prompts = None
    if data.evaluation is not None:
        eval_prompts = _prompts("data.evaluation", data.evaluation, data.evaluation_split, tokenizer)
    if run_file.lora is not None:
        peft_config = need("peft", "train: lora").LoraConfig(**{"task_type": "CAUSAL_LM", **run_file.lora})
    return NashTrainer(
        _model(run_file, "model", split),
        _model(run_file, "reference_model", split),
        judge=None if run_file.judge is None else _judge(run_file.judge, args.device, split),
        args=args,
        train_dataset=train_prompts,
        eval_dataset=eval_prompts,
        processing_class=tokenizer,
        peft_config=peft_config,
        reward=None if run_file.reward is None else _reward(run_file.reward, args.device, split),
        eval_opponent=_model(run_file, "eval_opponent", split),
    )


def _prompts(place: str, source: str, split: str | None, tokenizer: Any) -> list[dict[str, str]]:
    """Return rows of prompts; errors name the file and the line."""
    texts = read_data(f"train: {place}", load_prompts, source, tokenizer, split=split)
    return [{"prompt": text} for text in texts]


def _model(run_file: RunFile, key: str, split: Any) -> Any:
    """Return the model that the run file has under `key`, or None."""
    name = getattr(run_file, key)
    if name is None:
        return None
    options: Any = {"dtype": run_file.dtype, "trust_remote_code": run_file.trust_remote_code}
    if split is not None:
        options["distributed_config"] = copy.copy(split)
    return load_model(f"train: {key}", name, trainable=key == "model", **options)


def _judge(specs: list[JudgeSpec], device: torch.device, split: Any) -> Any:
    from ..preference import AverageJudge

    judges = [_one_judge(spec, device, split) for spec in specs]
    if len(judges) == 1:
        return judges[0]
    return AverageJudge(judges, [1.0 if spec.weight is None else spec.weight for spec in specs])


def _one_judge(spec: JudgeSpec, device: torch.device, split: Any) -> Any:
    from ..preference import PreferenceModelJudge, RewardJudge, checked

    if spec.function is not None:
        return checked(load_function("train: judge.function", spec.function), spec.function)
    if spec.reward_model is not None:
        scale = 1.0 if spec.scale is None else spec.scale
        return checked(
            RewardJudge(_preference_model("judge.reward_model", spec.reward_model, device, split), scale),
            spec.reward_model,
        )
    assert spec.preference_model is not None, "checked"
    model = _preference_model("judge.preference_model", spec.preference_model, device, split)
    return checked(PreferenceModelJudge(model, spec.batch_size or 16), spec.preference_model)


def _reward(spec: RewardSpec, device: torch.device, split: Any) -> Any:
    if spec.function is not None:
        return load_function("train: reward.function", spec.function)
    assert spec.reward_model is not None, "checked"
    return _preference_model("reward.reward_model", spec.reward_model, device, split).rewards


def _preference_model(place: str, folder: str, device: torch.device, split: Any) -> Any:
    from ..preference import RewardModel, load_preference_model
    from ..train.sharded import GatheredModel

    def load(path: str) -> Any:
        if split is None or split.tp_size == 1:
            return load_preference_model(path, device=device)
        model = load_preference_model(path, distributed_config=copy.copy(split))
        model.body = GatheredModel(model.body, None).model
        return model

    model = loading(f"train: {place}", folder, load)
    if place.endswith("reward_model") is not isinstance(model, RewardModel):
        raise BadInput(f"train: {place}: expected another kind of model; got {type(model).__name__} in {folder}")
    return model
