"""`nlhf-kernels train`: train a policy that no other policy is preferred to, as a YAML file says.

The trained policy lies in `policy/` under output_dir, beside its checkpoints. --example prints a file to begin with,
--keys every key there is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.atomic import atomic_folder, check_folder
from ..core.loading import check_finite, load_model, load_tokenizer, loading, quiet
from ..core.lock import lock_folder
from ..core.manifest import kind_of
from ..core.optional import need, require
from ..core.processes import leave_process_group
from ..data import load_prompts
from .errors import BadInput
from .loading import load_function, read_data, show_next

if TYPE_CHECKING:
    from ..train import NashConfig, NashTrainer
    from ..train.run_file import JudgeSpec, RewardSpec, RunFile

POLICY = KIND = "policy"  # the folder's name, and what its manifest says it is
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
    plan = read_run_file(arguments.config, arguments.set)
    arguments.output = plan.training["output_dir"]
    place = Path(arguments.output) / POLICY
    _check_policy(plan, place, replaces=arguments.resume or plan.training.get("overwrite_output_dir", False))
    args = plan.config()
    if arguments.check or args.process_index:
        code = _train(arguments, plan, args, place)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(place.parent):  # before models are loaded
            code = _train(arguments, plan, args, place)
    leave_process_group()
    return code


def _train(arguments: argparse.Namespace, plan: RunFile, args: NashConfig, place: Path) -> int:
    from ..train.checkpoints import found_in

    trainer = build(plan, args)
    if arguments.check:
        return _check(arguments, trainer)
    trainer.train(resume_from_checkpoint=bool(arguments.resume and found_in(Path(trainer.args.output_dir))))
    if trainer.state.global_step < trainer.state.max_steps:  # a callback's wish, a signal that transformers handles
        done = f"{trainer.state.global_step} of {trainer.state.max_steps} updates"
        raise RuntimeError(f"stopped after {done}, which is not the run's end: {resume_hint(arguments)}")
    check_finite(f"train: {place} is not written", trainer.model)
    if trainer.is_world_process_zero():
        with quiet(), atomic_folder(place, KIND, overwrite=True) as work:
            trainer.model.save_pretrained(work)
            trainer.processing_class.save_pretrained(work)
    if trainer.eval_dataset is not None:
        found = {name: value for name, value in trainer.evaluate().items() if name != "epoch"}
        _say(trainer, json.dumps(found, indent=2))
    _say(trainer, f"Saved: {place}")
    if trainer.is_world_process_zero():
        show_next(*_next(plan, str(place)))
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


def _next(plan: RunFile, policy: str) -> Iterator[list[str]]:
    program = "nlhf-kernels"
    yield [program, "sample", "--policy", policy, "--text", "--prompt", "..."]
    judges = [spec.function or spec.preference_model or spec.reward_model for spec in plan.judge or ()]
    if judges and judges[0] is not None:
        rivals = ["--policy", f"before={plan.reference_model or plan.model}", "--policy", f"after={policy}"]
        data = ["--data", plan.data.evaluation or plan.data.train]
        yield [program, "evaluate", *rivals, "--judge", judges[0], *data]
    if plan.lora is not None:
        yield [program, "merge", policy, "--output", f"{policy}-merged"]


def resume_hint(arguments: argparse.Namespace) -> str:
    from ..train.checkpoints import found_in

    found = [] if arguments.output is None else found_in(Path(arguments.output))
    return f"--resume goes on from {found[-1]}" if found else "no checkpoint was written"


def _say(trainer: NashTrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        print(text)


def _check_policy(plan: RunFile, place: Path, replaces: bool) -> None:
    """Before hours of work: the policy's place is free, or a policy's to be replaced; and nothing is read from it."""
    from ..train.checkpoints import found_in

    earlier = [place] if kind_of(place) == KIND else found_in(place.parent)
    if earlier and not replaces:
        raise BadInput(
            f"train: training.output_dir: expected a folder without an earlier run; got one that holds {earlier[-1]} "
            "(--resume goes on with its run, training.overwrite_output_dir=true starts over)"
        )
    check_folder(place, KIND, overwrite=replaces)
    judges = [(f"judge.{name}", getattr(spec, name)) for spec in plan.judge or () for name in JUDGES]
    read = [(name, getattr(plan, name)) for name in ("model", "reference_model", "tokenizer", "eval_opponent")]
    for option, name in [*read, *judges, ("reward.reward_model", plan.reward and plan.reward.reward_model)]:
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


def build(plan: RunFile, args: NashConfig) -> NashTrainer:
    """Everything that the file names, loaded."""
    from ..train import NashTrainer

    place, name = ("model", plan.model) if plan.tokenizer is None else ("tokenizer", plan.tokenizer)
    tokenizer = load_tokenizer(f"train: {place}", name, trust_remote_code=plan.trust_remote_code)
    data = plan.data
    rows = {"train": _prompts("data.train", data.train, data.train_split, tokenizer)}
    if data.evaluation is not None:
        rows["evaluation"] = _prompts("data.evaluation", data.evaluation, data.evaluation_split, tokenizer)
    lora = (
        None if plan.lora is None else need("peft", "train: lora").LoraConfig(**{"task_type": "CAUSAL_LM", **plan.lora})
    )
    return NashTrainer(
        _policy(plan, "model", plan.model),
        None if plan.reference_model is None else _policy(plan, "reference_model", plan.reference_model),
        judge=None if plan.judge is None else _judge(plan.judge, args.device),
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("evaluation"),
        processing_class=tokenizer,
        peft_config=lora,
        reward=None if plan.reward is None else _reward(plan.reward, args.device),
        eval_opponent=None if plan.eval_opponent is None else _policy(plan, "eval_opponent", plan.eval_opponent),
    )


def _prompts(place: str, source: str, split: str | None, tokenizer: Any) -> list[dict[str, str]]:
    """Read here, so that an error names the file and the line."""
    texts = read_data(f"train: {place}", load_prompts, source, tokenizer, split=split)
    return [{"prompt": text} for text in texts]


def _policy(plan: RunFile, place: str, name: str) -> Any:
    options: Any = {"dtype": plan.dtype, "trust_remote_code": plan.trust_remote_code}
    return load_model(f"train: {place}", name, trainable=place == "model", **options)


def _judge(specs: list[JudgeSpec], device: torch.device) -> Any:
    from ..preference import AverageJudge

    judges = [_one_judge(spec, device) for spec in specs]
    if len(judges) == 1:
        return judges[0]
    return AverageJudge(judges, [1.0 if spec.weight is None else spec.weight for spec in specs])


def _one_judge(spec: JudgeSpec, device: torch.device) -> Any:
    from ..preference import PreferenceModelJudge, RewardJudge, checked

    if spec.function is not None:
        return checked(load_function("train: judge.function", spec.function), spec.function)
    if spec.reward_model is not None:
        scale = 1.0 if spec.scale is None else spec.scale
        return checked(
            RewardJudge(_preferring("judge.reward_model", spec.reward_model, device), scale), spec.reward_model
        )
    assert spec.preference_model is not None, "checked"
    model = _preferring("judge.preference_model", spec.preference_model, device)
    return checked(PreferenceModelJudge(model, spec.batch_size or 16), spec.preference_model)


def _reward(spec: RewardSpec, device: torch.device) -> Any:
    if spec.function is not None:
        return load_function("train: reward.function", spec.function)
    assert spec.reward_model is not None, "checked"
    return _preferring("reward.reward_model", spec.reward_model, device).rewards


def _preferring(place: str, folder: str, device: torch.device) -> Any:
    from ..preference import RewardModel, load_preference_model

    model = loading(f"train: {place}", folder, lambda found: load_preference_model(found, device=device))
    if place.endswith("reward_model") is not isinstance(model, RewardModel):
        raise BadInput(f"train: {place}: expected another kind of model; got {type(model).__name__} in {folder}")
    return model
