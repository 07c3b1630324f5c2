"""`nlhf-kernels prefer`: train a model of human preferences, evaluate it, and score pairs of responses with it.

`train` makes a model from preference pairs and a base model; `evaluate` measures it on pairs that people have judged;
`score` prints P(first > second | prompt) for new pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from ..core.atomic import check_folder, is_stdout, write_atomic
from ..core.checks import check_integer, check_number
from ..core.loading import load_model, load_tokenizer, loading, quiet
from ..core.lock import lock_place
from ..core.optional import need, require
from ..core.terminal import new_console
from ..core.text import read_text
from ..data import Comparison, Pair, load_comparisons, load_pairs, split_by_prompt
from .common import Help, check_output, find_device, read_data, show_next
from .errors import BadInput, option_names

if TYPE_CHECKING:
    from ..preference import ComparisonModel, Evaluation, TrainingReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what, add in (
        ("train", "train on pairs of which one response was preferred, and measure on pairs held out", _add_train),
        ("evaluate", "measure a trained model on pairs of which one response was preferred", _add_evaluate),
        ("score", "print P(first > second | prompt) of one pair or of a file of them", _add_score),
    ):
        action = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", formatter_class=Help)
        add(action)
        action.set_defaults(option_names=option_names(action))


def _add_train(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data: columns prompt, chosen, rejected; strings or lists of messages")
    data.add_argument("--data", required=True, help=".jsonl, .json, .csv; with datasets .parquet, a folder, a hub name")
    data.add_argument("--split", help="part of a hub data set (default train)")
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument(
        "--held-out", metavar="PAIRS", help="pairs to measure on (default: --test-fraction of the prompts)"
    )
    held_out.add_argument(
        "--test-fraction", metavar="SHARE", type=float, default=0.1, help="0 holds none out (default 0.1)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--base", required=True, help="causal language model: a folder or a hub name, safetensors only")
    model.add_argument("--kind", choices=("pairwise", "reward"), default="pairwise", help="(default pairwise)")
    model.add_argument("--template", type=Path, help="text file with {prompt} {first} {second}; reward: {response}")
    model.add_argument("--max-length", type=int, help="tokens read of a pair (default: the model's positions)")
    model.add_argument("--overlong", choices=("error", "truncate"), default="error", help="pairs above (default error)")
    model.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    lora = parser.add_argument_group("LoRA: an adapter on the base is trained, and saved beside it")
    lora.add_argument("--lora-rank", type=int, help="of the adapter's matrices (default: all weights are trained)")
    lora.add_argument("--lora-alpha", type=float, help="the adapter is scaled by this / rank (default: twice the rank)")
    lora.add_argument("--lora-targets", help="names of layers with commas between (default: every linear one)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help="(default: as many as go through the data once)")
    training.add_argument("--batch-size", type=int, default=16, help="pairs a step (default 16)")
    training.add_argument("--micro-batch", type=int, help="pairs at once through the model (default: all of a step)")
    training.add_argument("--learning-rate", type=float, default=1e-5, help="(default 1e-5)")
    training.add_argument("--weight-decay", type=float, default=0.0, help="(default 0)")
    training.add_argument("--seed", type=int, default=0, help="of the order, dropout and the test set (default 0)")
    training.add_argument("--bfloat16", action="store_true", help="products in bfloat16; weights stay float32")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    training.add_argument("--checkpoint", type=Path, help="file to go on from after an interruption; gone at the end")
    training.add_argument("--checkpoint-every", type=int, help="steps (default 500)")
    _add_common(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--overwrite", action="store_true", help="replace a preference model at --output")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--data", required=True, help="pairs with prompt, chosen, rejected, as in `prefer train`")
    parser.add_argument("--split", help="part of a hub data set (default train)")
    _add_common(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    pair = parser.add_argument_group("pairs: one here, or a file")
    for name in Comparison._fields:
        pair.add_argument(f"--{name}")
    pair.add_argument("--chat", action="store_true", help="the pair is a conversation, for the model's chat template")
    pair.add_argument("--file", help="columns prompt, first, second: .jsonl, .json or .csv; prints JSON lines")
    parser.add_argument(
        "--output", type=Path, help="write this file instead of printing; one that is there is replaced"
    )
    _add_common(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder that `prefer train` made")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs at once (default 16)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")


def run(arguments: argparse.Namespace) -> int:
    require(f"nlhf-kernels prefer {arguments.action}", ("transformers",), "train")
    print({"train": _train, "evaluate": _evaluate, "score": _score}[arguments.action](arguments), end="")
    return 0


def resume_hint(arguments: argparse.Namespace) -> str:
    checkpoint = getattr(arguments, "checkpoint", None)
    there = checkpoint is not None and checkpoint.exists()
    return f"the same command goes on from {checkpoint}" if there else "nothing was written"


def _train(arguments: argparse.Namespace) -> str:
    from ..preference.storage import KIND

    check_integer("prefer", "--seed", arguments.seed, 0, 2**63 - 1)
    check_number("prefer", "--test-fraction", arguments.test_fraction, 0.0, 1.0)
    if arguments.checkpoint is None and arguments.checkpoint_every is not None:
        raise BadInput("prefer: --checkpoint-every: expected with --checkpoint; got it alone")
    device = find_device("prefer", arguments.device)
    try:
        check_folder(arguments.output, KIND, overwrite=arguments.overwrite)
    except OSError as error:
        raise BadInput(f"prefer: --output: {error}") from error
    with ExitStack() as locks:  # taken before models are loaded
        for place in (arguments.output, arguments.checkpoint):
            if place is not None and place.absolute().parent.is_dir():
                locks.enter_context(lock_place(place))
        return _train_and_save(arguments, device)


def _train_and_save(arguments: argparse.Namespace, device: torch.device) -> str:
    from ..preference import train_preference_model
    from ..preference.storage import save_preference_model

    tokenizer = load_tokenizer("prefer: --base", arguments.base, trust_remote_code=arguments.trust_remote_code)
    pairs, held_out = _pairs(arguments, tokenizer)
    settings = _settings(arguments, len(pairs))
    model = _new_model(arguments, tokenizer).to(device)
    options: dict[str, Any] = {"checkpoint": arguments.checkpoint}
    if arguments.checkpoint_every is not None:
        options["checkpoint_every"] = arguments.checkpoint_every
    report = train_preference_model(model, pairs, settings, held_out=held_out, **options)
    with quiet():
        save_preference_model(model, arguments.output, overwrite=arguments.overwrite)
    if arguments.checkpoint is not None:
        arguments.checkpoint.unlink(missing_ok=True)
    return _report(arguments, report, len(pairs))


def _pairs(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[Pair], list[Pair]]:
    pairs = read_data("prefer: --data", load_pairs, arguments.data, tokenizer, split=arguments.split)
    if arguments.held_out is not None:
        return pairs, read_data("prefer: --held-out", load_pairs, arguments.held_out, tokenizer)
    return split_by_prompt(pairs, arguments.test_fraction, arguments.seed) if arguments.test_fraction else (pairs, [])


def _settings(arguments: argparse.Namespace, pairs: int) -> Any:
    from ..preference import PreferenceTraining

    check_integer("prefer", "--batch-size", arguments.batch_size, 1, 10**6)
    return PreferenceTraining(
        steps=math.ceil(pairs / arguments.batch_size) if arguments.steps is None else arguments.steps,
        batch_size=arguments.batch_size,
        micro_batch=arguments.micro_batch,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        bfloat16=arguments.bfloat16,
    )


def _new_model(arguments: argparse.Namespace, tokenizer: Any) -> ComparisonModel:
    from ..preference.models import KINDS

    template = None if arguments.template is None else _template(arguments.template)
    options: Any = {"dtype": torch.float32, "trust_remote_code": arguments.trust_remote_code}
    adapter = _adapter(arguments)
    base = load_model("prefer: --base", arguments.base, merge=True, **options)
    model = KINDS[arguments.kind](
        base, tokenizer, template=template, max_length=arguments.max_length, overlong=arguments.overlong
    )
    if arguments.gradient_checkpointing:
        model.body.gradient_checkpointing_enable()
    return model if adapter is None else model.add_adapter(adapter, arguments.seed)


def _adapter(arguments: argparse.Namespace) -> Any:
    """Return peft's configuration of the adapter, or None where all weights are trained."""
    rank, alpha, targets = arguments.lora_rank, arguments.lora_alpha, arguments.lora_targets
    if rank is None:
        for option, value in (("--lora-alpha", alpha), ("--lora-targets", targets)):
            if value is not None:
                raise BadInput(f"prefer: {option}: expected with --lora-rank; got it alone")
        return None
    return need("peft", "prefer: --lora-rank").LoraConfig(
        r=check_integer("prefer", "--lora-rank", rank, 1, 2**16),
        lora_alpha=2 * rank if alpha is None else check_number("prefer", "--lora-alpha", alpha, 0.0, open_low=True),
        target_modules="all-linear" if targets is None else [name.strip() for name in targets.split(",")],
    )


def _template(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise BadInput(f"prefer: --template: {path}: {error}") from error


def _report(arguments: argparse.Namespace, report: TrainingReport, pairs: int) -> str:
    evaluation = report.evaluation
    if arguments.json:
        document = {
            "output": str(arguments.output),
            "kind": arguments.kind,
            "pairs": pairs,
            "losses": report.losses,
            "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"
    summary = f"{pairs} pairs, {len(report.losses)} steps, last loss {report.losses[-1]:.4f}\n"
    measures = "" if evaluation is None else f"held out: {_described(evaluation)}"
    key = "preference_model" if arguments.kind == "pairwise" else "reward_model"
    show_next(
        ["nlhf-kernels", "prefer", "score", "--model", str(arguments.output), "--prompt", "...", "--first", "...",
         "--second", "..."],
        ["nlhf-kernels", "train", "--example", ">", "run.yaml"],
        ["nlhf-kernels", "train", "--config", "run.yaml", "--set", f"judge={json.dumps({key: str(arguments.output)})}"],
    )  # fmt: skip
    return f"{summary}{measures}Saved: {arguments.output}\n"


def _described(evaluation: Evaluation) -> str:
    low, high = wilson(evaluation.accuracy, evaluation.count)
    table = Table()
    for column in ("how sure", "pairs", "mean confidence", "right"):
        table.add_column(column, justify="right")
    for bin in evaluation.bins:
        between = f"{bin.low:.2f} to {bin.high:.2f}"
        table.add_row(between, str(bin.count), f"{bin.confidence:.3f}", f"{bin.accuracy:.3f}")
    console = new_console()
    with console.capture() as capture:
        console.print(
            f"{evaluation.count} pairs: accuracy {evaluation.accuracy:.3f} (95 % interval: {low:.3f} to {high:.3f})",
            f"log-loss {evaluation.log_loss:.4f} (knowing nothing: 0.6931)",
            f"expected calibration error {evaluation.calibration_error:.3f}",
            sep="\n",
        )
        console.print(table)
    return capture.get()


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `count`; its width is positive even for a share of 0 or 1."""
    centre, scale = share + z**2 / (2 * count), 1 + z**2 / count
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _evaluate(arguments: argparse.Namespace) -> str:
    from ..preference import PreferenceModelJudge, checked, evaluate

    model = _trained(arguments)
    pairs = read_data("prefer: --data", load_pairs, arguments.data, model.tokenizer, split=arguments.split)
    evaluation = evaluate(checked(PreferenceModelJudge(model, arguments.batch_size), arguments.model), pairs)
    if arguments.json:
        return json.dumps(dataclasses.asdict(evaluation), indent=2, allow_nan=False) + "\n"
    return _described(evaluation)


def _trained(arguments: argparse.Namespace) -> ComparisonModel:
    from ..preference import load_preference_model

    check_integer("prefer", "--batch-size", arguments.batch_size, 1, 10**6)
    device = find_device("prefer", arguments.device)
    load = partial(load_preference_model, device=device, trust_remote_code=arguments.trust_remote_code)
    return loading("prefer: --model", arguments.model, load)


def _score(arguments: argparse.Namespace) -> str:
    from ..preference import PreferenceModelJudge, checked

    texts = [getattr(arguments, name) for name in Comparison._fields]
    if (None in texts) if arguments.file is None else (texts != [None] * 3):
        raise BadInput("prefer: expected --prompt, --first and --second, or --file alone")
    if arguments.chat and arguments.file is not None:
        raise BadInput(
            "prefer: --chat: expected with one pair; got --file, whose rows are messages where they should be"
        )
    check_output("prefer", arguments.output)
    model = _trained(arguments)
    if arguments.chat:
        roles = ("user", "assistant", "assistant")
        texts = [[{"role": role, "content": text}] for role, text in zip(roles, texts, strict=True)]
    source: Any = arguments.file or [dict(zip(Comparison._fields, texts, strict=True))]
    try:
        place = "prefer: --file" if arguments.file is not None else "prefer: --prompt, --first, --second"
        pairs = read_data(place, load_comparisons, source, model.tokenizer)
    except BadInput as error:
        are_judged = "first is not among" in str(error) and "'chosen'" in str(error)
        raise BadInput(f"{error}{' (`prefer evaluate` measures on such pairs)' if are_judged else ''}") from error
    judge = checked(PreferenceModelJudge(model, arguments.batch_size), arguments.model)
    probabilities = judge(*zip(*pairs, strict=True)).tolist()
    rows = [{**pair._asdict(), "probability": p} for pair, p in zip(pairs, probabilities, strict=True)]
    if arguments.json:
        printed = json.dumps(rows, indent=2) + "\n"
    elif arguments.file is not None:
        printed = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        printed = f"P(first > second) = {probabilities[0]:.4f}\n"
    if arguments.output is None or is_stdout(arguments.output):
        return printed
    write_atomic(arguments.output, printed)
    return f"Saved: {arguments.output}\n"
