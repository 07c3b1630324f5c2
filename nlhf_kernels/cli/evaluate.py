"""`nlhf-kernels evaluate`: win rates between all pairs of saved policies.

Every policy answers the prompts; a judge compares the answers: a preference or reward model that
`prefer train` made, or a function (prompts, first, second) -> probabilities. Each cell has its 95 % confidence interval
over the prompts. Two answers or more (--samples) narrow it: the policies then share their noise, and all pairs of
answers are compared. --reference adds each policy's KL divergence from a reference model; without it, an adapter's
reference is its base.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from ..core.atomic import is_stdout, write_atomic
from ..core.loading import load_generation_tokenizer, load_model, loading, quiet
from ..core.optional import require
from ..core.places import locate
from ..core.terminal import Reporter, new_console
from ..data import load_prompts
from .common import check_output, find_device, is_function, load_function, read_data
from .errors import BadInput

#: Fields of evaluation's Sampling -> options.
NAMES = {"answer_tokens": "--max-new-tokens", "prompt_tokens": "--max-prompt-length", "batch": "--batch-size"}

if TYPE_CHECKING:
    from ..evaluation import Answers, Sampling, Tournament


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="MODEL",
        help="a folder or a hub name, or NAME=MODEL; two or more",
    )
    parser.add_argument(
        "--judge",
        required=True,
        help="folder of a preference or reward model (`prefer train`), or a function: module:name, file.py:name",
    )
    parser.add_argument("--reference", help="the policies' KL is measured from it (default: an adapter's base)")
    parser.add_argument("--data", required=True, help="rows with a column prompt: .jsonl, .json, .csv, a hub name")
    parser.add_argument("--split", help="part of a hub data set (default train)")
    parser.add_argument("--prompts", type=int, help="the first so many, each once (default: all)")
    sampling = parser.add_argument_group("answers")
    sampling.add_argument("--samples", type=int, default=1, help="to each prompt (default 1)")
    sampling.add_argument("--max-new-tokens", type=int, default=64, help="(default 64)")
    sampling.add_argument("--max-prompt-length", type=int, default=512, help="tokens; the last ones stay (default 512)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    sampling.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at once (default 16)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--output", type=Path, help="write that document to this file, too; one there is replaced")


def run(arguments: argparse.Namespace) -> int:
    require("nlhf-kernels evaluate", ("transformers", "accelerate"), "train")
    from ..evaluation import Sampling

    policies = _policies(arguments.policy)
    check_output("evaluate", arguments.output)
    sampling = Sampling(
        arguments.max_new_tokens, arguments.max_prompt_length, arguments.samples, arguments.temperature, arguments.seed,
        arguments.batch_size,
    )  # fmt: skip
    with quiet():
        answers, tournament = _evaluate(arguments, policies, sampling, Reporter(new_console(stderr=True)))
    document = _document(arguments, answers, tournament)
    document_text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    to_stdout = arguments.output is not None and is_stdout(arguments.output)
    output = document_text if arguments.json or to_stdout else _table(document)
    if arguments.output is not None and not to_stdout:
        write_atomic(arguments.output, document_text)
        output += "" if arguments.json else f"Saved: {arguments.output}\n"
    print(output, end="")
    return 0


def _policies(entries: list[str]) -> dict[str, str]:
    """Map names to models, from the entries of --policy."""
    named = [entry.partition("=")[::2] if "=" in entry else ("", entry) for entry in entries]
    paths = [model for name, model in named if not name]
    policies: dict[str, str] = {}
    for name, model in named:
        name = name or _short_name(model, [other for other in paths if other != model])
        if not name or not model or name in policies:
            raise BadInput(f"evaluate: --policy: expected [NAME=]MODEL, every name once; got {name!r} again or empty")
        policies[name] = model
    if len(policies) < 2:
        raise BadInput(f"evaluate: --policy: expected two or more; got {len(policies)}")
    return policies


def _short_name(model: str, others: list[str]) -> str:
    """Return the shortest end of the path that no other path shares: a/policy and b/policy, not policy twice."""
    parts, *rest = (Path(path).expanduser().absolute().parts for path in (model, *others))
    count = next((n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in rest)), len(parts))
    return "/".join(parts[-count:])


def _evaluate(
    arguments: argparse.Namespace, policies: dict[str, str], sampling: Sampling, reporter: Reporter
) -> tuple[dict[str, list[Answers]], Tournament]:
    """Sample every policy's answers with its own tokenizer; compare them by the judge."""
    import dataclasses

    from ..evaluation import play_tournament, sample_answers
    from ..preference import PreferenceModelJudge, checked, load_preference_model

    trust: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    options = {"device": find_device("evaluate", arguments.device), **trust}
    models = [("--policy", name) for name in policies.values()] + [("--reference", arguments.reference)]
    for option, name in models:  # fail before the first policy is sampled
        if name is not None:
            locate(f"evaluate: {option}", name)
    first_tokenizer = load_generation_tokenizer("evaluate: --policy", next(iter(policies.values())), **trust)
    prompts = _prompts(arguments, first_tokenizer)
    if is_function(arguments.judge):
        judge = checked(load_function("evaluate: --judge", arguments.judge), arguments.judge)
    else:
        judge_model = loading("evaluate: --judge", arguments.judge, partial(load_preference_model, **options))
        judge = checked(PreferenceModelJudge(judge_model, arguments.batch_size), arguments.judge)
    options["dtype"] = torch.float32
    reference = None
    if arguments.reference is not None:
        reference = load_model("evaluate: --reference", arguments.reference, **options)
    answers: dict[str, list[Answers]] = {}
    for place, (name, model) in enumerate(policies.items()):
        own = sampling
        if sampling.samples == 1:  # one answer each: with shared noise no pair of answers would be independent
            own = dataclasses.replace(sampling, seed=sampling.seed * len(policies) + place)
        with reporter.bar(f"answers of {name}", len(prompts)) as advance:
            policy = load_model("evaluate: --policy", model, **options)
            tokenizer = load_generation_tokenizer("evaluate: --policy", model, **trust)
            answers[name] = [sample_answers(policy, reference, tokenizer, prompts, own, advance)]
    with reporter.bar("matches", len(policies) * (len(policies) - 1) // 2) as advance:
        return answers, play_tournament(judge, prompts, answers, advance)


def _prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[str]:
    from ..core.checks import check_integer

    rows = read_data("evaluate: --data", load_prompts, arguments.data, tokenizer, split=arguments.split)
    prompts = list(dict.fromkeys(rows))
    if arguments.prompts is not None:
        prompts = prompts[: check_integer("evaluate", "--prompts", arguments.prompts, 2, 10**9)]
    if len(prompts) < 2:
        raise BadInput(f"evaluate: --data: expected two different prompts or more; got {len(prompts)}")
    return prompts


def _document(
    arguments: argparse.Namespace, answers: dict[str, list[Answers]], tournament: Tournament
) -> dict[str, Any]:
    from ..evaluation import answer_measures

    policies = []
    for name, runs in answers.items():
        measures = answer_measures(runs)
        policies.append({"name": name, "tokens": measures.pop("length"), **measures})
    return {
        "judge": arguments.judge,
        "prompts": len(next(iter(answers.values()))[0].texts),
        "samples": arguments.samples,
        "policies": policies,
        "matrix": tournament.matrix(),
        "cycles": tournament.cycles(),
    }


def _table(document: dict[str, Any]) -> str:
    """Number the columns instead of naming them, so that five policies fit 80 columns."""
    console = new_console()
    names = [policy["name"] for policy in document["policies"]]
    table = Table(title="P(row preferred to column) ± 95 %", title_justify="left", box=box.SIMPLE, padding=(0, 1))
    table.add_column("", max_width=24, overflow="fold")
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for number, (name, row) in enumerate(zip(names, document["matrix"], strict=True), start=1):
        cells = ["" if cell is None else f"{cell['mean']:.2f}±{cell['half']:.2f}" for cell in row]
        table.add_row(f"{number} {name}", *cells)
    with console.capture() as capture:
        console.print(table)
        for number, policy in enumerate(document["policies"], start=1):
            kl = f", KL {policy['kl']:.2f}±{1.96 * policy['kl_error']:.2f}" if "kl" in policy else ""
            console.print(f"{number} {policy['name']}: {policy['tokens']:.1f} tokens an answer{kl}")
        answers = "an answer" if document["samples"] == 1 else f"{document['samples']} answers"
        console.print(f"{document['prompts']} prompts, {answers} to each")
        for cycle in document["cycles"]:
            console.print(f"a cycle: {' > '.join([*cycle, cycle[0]])}")
    return capture.get()
