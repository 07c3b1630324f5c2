"""The report: one self-contained HTML file, made from the results alone; and the same numbers as Markdown.

Verdicts on the claims are computed from the numbers, by `claims.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.text import markdown_table
from ..evaluation import plus_minus
from ..evaluation.intervals import NORMAL
from ..evaluation.tournament import MARGIN
from .claims import CONTRADICTED, MIN_PROMPTS, MIN_RUNS, REPRODUCED, TOO_SMALL, evidence, verdict
from .figures import JUDGE_LABELS, all_figures, judges, nats
from .page import capitalised, escaped, framed, paragraphs, table, write_figures, write_page
from .presets import BASELINE, START, label

Results = dict[str, Any]


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html`, and its figures into `figures` for other documents; the page has matrices as tables.

    Args:
        results (dict): of `Experiment.run`.
        folder (Path): made where it is not there.
    """
    pictures = write_figures(folder, all_figures(results))
    return write_page(folder, page(results, [pictures[name] for name in pictures if not name.startswith("matrix-")]))


def page(results: Results, pictures: Sequence[str]) -> str:
    """Return the HTML page with these figures."""
    facts, corpus = results["tournament"], results["corpus"]
    source = results["material"]["data"] or "Docstrings of the installed Python packages"
    parts = [
        "<h1>Nash learning from human feedback: the summarisation experiment</h1>",
        f"<p>{escaped(source)}: {corpus['train']} examples to train on, {corpus['test']} to test on. "
        f"{results['sft']['parameters']:,} parameters.</p>",
        *(f"<p><b>{escaped(sentence)}</b></p>" for sentence in answer(results)),
        *pictures,
        "<h2>The claims</h2>",
        *(_verdicts(judge, each["claims"]) for judge, each in judges(results).items()),
        *paragraphs((describe_size(results), describe_distance(results), describe_intervals(results))),
        "<h2>Answers</h2>",
        _samples(results),
        "<h2>Cycles</h2>",
        *paragraphs(describe_cycles(results)),
        f"<h2>Win rates at {nats(results)}</h2>",
        *(_matrix(facts, judge) for judge in judges(results)),
        *_exploitability(results),
        "<h2>Policies</h2>",
        _policies(facts),
        "<h2>What the judges are worth</h2>",
        _models(results),
        "<h2>The kernels on this run</h2>",
        _speed(results),
        "<h2>How it was made</h2>",
        _making(results),
    ]
    return framed("Nash learning: the experiment", parts)


def answer(results: Results) -> list[str]:
    """Return sentences with the main numbers, judged by the annotators if there are any."""
    facts = results["tournament"]
    judge = next(iter(judges(results)))
    rates = {name: dict(zip(facts["names"], row, strict=True))
             for name, row in zip(facts["names"], facts["judges"][judge]["matrix"], strict=True)}  # fmt: skip

    def against(rival: str) -> str:
        others = [name for name in facts["names"] if name not in (START, rival)]
        return ", ".join(f"{label(name)} {_markdown_cell(rates[name][rival])}" for name in others)

    share = results["cycles"][judge]["share"]
    sentences = [f"At {nats(results)} of KL from the supervised policy ({label(START)}), judged by "
                 f"{JUDGE_LABELS[judge]}, whose preferences cycle in {share:.1%} of triples, contestants are preferred "
                 f"to it with probability: {against(START)}."]  # fmt: skip
    if BASELINE in facts["names"] and len(facts["names"]) > 2:
        sentences.append(f"At that same distance they are preferred to {label(BASELINE)} with probability: "
                         f"{against(BASELINE)}.")  # fmt: skip
    if results["exploitability"]:
        beaten = ", ".join(f"{label(name)} {_markdown_cell(each)}" for name, each in results["exploitability"].items())
        sentences.append(f"A best response that was trained against each wins at least: {beaten}.")
    return sentences


def describe_distance(results: Results) -> str:
    """Return a paragraph on the KL of the comparison."""
    facts = results["tournament"]
    why = (
        "the budget"
        if facts["kl"] >= facts["budget"]
        else f"the farthest that all of them reach, below the budget of {facts['budget']:g}"
    )
    return (
        f"Contestants are compared at equal KL from the supervised policy, {nats(results)} an answer: {why}. Each was "
        "trained at several tau; its win rates are interpolated, linearly in the root of KL, between the policies "
        "around that KL, or the first of them and the supervised policy."
    )


def describe_size(results: Results) -> str:
    preset = results["preset"]
    answers = _count(preset["samples_per_prompt"], "answer")
    double = f" (IPO-MD: {2 * preset['samples_per_prompt']})" if "ipo-md" in preset["contestants"] else ""
    unequal = (
        " That is more than RLHF was told, whose reward model saw a sample of their votes: the match with it is not "
        "one of equal information."
        if preset["judge"] == "annotators"
        else ""
    )
    return (
        "Every contestant starts from the supervised policy and has the same budget, "
        f"{_count(preset['updates'], 'update')} on {_count(preset['prompts_per_update'], 'prompt')}, {answers} to each "
        f"of them trained on{double}; {_count(preset['seeds'], 'training run')} of each at each of "
        f"{len(preset['taus'])} tau. "
        f"They learn from {JUDGE_LABELS[preset['judge']]}, RLHF from the reward model.{unequal}"
    )


def describe_intervals(results: Results) -> str:
    facts, seeds = results["tournament"], results["preset"]["seeds"]
    what = (
        "with one run of each contestant, they speak of these trained policies on other prompts, not of other runs"
        if seeds == 1
        else f"they cover both the choice of prompts and that of the training run, of which there are {seeds}"
    )
    return (
        f"Intervals are 95 %, n = {facts['prompts']} prompts with {_count(facts['answers'], 'answer')} of each policy; "
        f"{what}. A match counts "
        f"as won above {0.5 + MARGIN:g}, with the whole interval; where the best of several is picked, "
        f"the intervals are widened for the picking (Bonferroni). Below {MIN_RUNS} training runs of each or "
        f"{MIN_PROMPTS} prompts there is no verdict."
    )


def describe_cycles(results: Results) -> list[str]:
    lines = []
    for judge in judges(results):
        each = results["cycles"][judge]
        policies = results["tournament"]["judges"][judge]["cycles"]
        among = "; ".join(" > ".join([*way, way[0]]) for way in policies) or "none"
        lines.append(
            f"{JUDGE_LABELS[judge].capitalize()}: {each['cyclic']} of {each['triples']} triples of answers to one "
            f"prompt are cycles ({each['share']:.1%}), at {len(each['cyclic_prompts'])} of {each['prompts']} prompts. "
            f"Cycles among the policies, by the means: {among}."
        )
    return lines


def describe_speed(results: Results) -> list[str]:
    speed = results["speed"]
    update = speed["update"]
    lines = [
        f"a whole update of {label(speed['algorithm'])} on {speed['device']} ({_count(speed['threads'], 'thread')}): "
        f"{update['kernels_ms']:.0f} ms with the kernels, {update['torch_ms']:.0f} ms with the PyTorch oracle: "
        f"{update['speedup']:.2f}x"
    ]
    for each in speed["operations"]:
        lines.append(
            f"{each['name']}, {each['size']}: {each['kernels_ms']:.2f} ms, oracle {each['torch_ms']:.2f} ms: "
            f"{each['speedup']:.2f}x"
        )
    return lines


def describe_claim(claim: dict[str, Any]) -> str:
    matches = ", ".join(
        f"{m['first']} against {m['second']} {plus_minus(m['mean'], m['half'])}" for m in claim["matches"]
    )
    return f"{capitalised(claim['claim'])}: {verdict(claim)} ({_grounds(claim)}). {matches}".rstrip(". ") + "."


def _grounds(claim: dict[str, Any]) -> str:
    """Return the evidence of a claim, with the required minimum if it is too little."""
    runs, prompts = evidence(claim)
    counts = f"{_count(runs, 'run')} of each, {_count(prompts, 'prompt')}" if runs else _count(prompts, "prompt")
    if claim["kl"] is not None:
        counts += f", at {claim['kl']:.3g} nats"
    if verdict(claim) == TOO_SMALL:
        return f"{counts}; a verdict takes {MIN_RUNS} runs and {MIN_PROMPTS} prompts"
    return f"{counts}; best of {claim['compared']}: {claim['best']}"


def _verdicts(judge: str, claims: Iterable[dict[str, Any]]) -> str:
    kinds, boxes = {REPRODUCED: "reproduced", CONTRADICTED: "contradicted"}, ""
    for claim in claims:
        heading = f"<p>{escaped(capitalised(claim['claim']))}: <b>{verdict(claim)}</b> ({escaped(_grounds(claim))})</p>"
        rows = [(m["first"], m["second"], plus_minus(m["mean"], m["half"])) for m in claim["matches"]]
        matches = table(["policy", "against", "win rate"], rows) if rows else ""
        boxes += f'<div class="verdict {kinds.get(verdict(claim), "")}">{heading}{matches}</div>'
    return f"<h3>Judged by {JUDGE_LABELS[judge]}</h3>{boxes or '<p>None of the claims is about these contestants.</p>'}"


def _matrix(facts: Results, judge: str) -> str:
    rows = [
        [name, *("" if cell is None else plus_minus(cell["mean"], cell["half"]) for cell in row)]
        for name, row in zip(facts["labels"], facts["judges"][judge]["matrix"], strict=True)
    ]
    colours = [["", *map(_colour, row)] for row in facts["judges"][judge]["matrix"]]
    matrix = table(["row against column", *facts["labels"]], rows, colours)
    return f"<h3>Judged by {JUDGE_LABELS[judge]}</h3>{matrix}"


def _colour(cell: dict[str, Any] | None) -> str:
    """Return a cell's colour: white at 1/2, blue above, orange below; pale enough for black letters."""
    if cell is None:
        return ""
    share = abs(cell["mean"] - 0.5) * 1.4
    full = (0, 114, 178) if cell["mean"] > 0.5 else (213, 94, 0)
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in full)


def _exploitability(results: Results) -> list[str]:
    """Return the section on trained best responses; empty if none were trained."""
    if not results["exploitability"]:
        return []
    rows = [
        [label(name), plus_minus(each["mean"], each["half"]), each["start"], f"{each['kl']:.2f}",
         f"{each['opponent_kl']:.2f}"]
        for name, each in results["exploitability"].items()
    ]  # fmt: skip
    head = ["run of", "its best response wins", "trained from the", "at KL", "against KL"]
    note = (
        "A best response is trained against each fixed policy (its first run, at the tau whose KL is nearest to "
        f"{nats(results)}), with the budget of updates that all have; of an equilibrium it wins half. What training "
        "has not found is not counted: these are lower bounds."
    )
    return ["<h2>Exploitability</h2>", f"<p>{escaped(note)}</p>", table(head, rows)]


def _policies(facts: Results) -> str:
    rows = []
    for each in facts["policies"]:
        tau = "" if each["tau"] is None else f"{each['tau']:g}"
        kl = plus_minus(each["kl"], NORMAL * each["kl_error"])
        rows.append([label(each["contestant"]), tau, str(each["runs"]), kl, f"{each['length']:.1f}",
                     f"{each['end_rate']:.3f}"])  # fmt: skip
    return table(["policy", "tau", "runs", "KL to the reference, nats per answer", "tokens", "ended by itself"], rows)


def _models(results: Results) -> str:
    rows = []
    for name, title in (("preference_model", "preference model"), ("reward_model", "reward model")):
        test = results[name]["test"]
        rows.append([title, str(test["count"]), f"{test['accuracy']:.3f}", f"{test['log_loss']:.3f}",
                     f"{test['calibration_error']:.3f}"])  # fmt: skip
    section = table(["", "held-out pairs", "accuracy", "log-loss", "calibration error"], rows)
    annotators = results["annotators"]
    if annotators is not None:
        section += (f"<p>Votes are drawn: always naming the likelier winner would be right "
                  f"{annotators['test']['ceiling']:.3f} of the time.</p>")  # fmt: skip
    return section


def _speed(results: Results) -> str:
    return "<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in describe_speed(results)) + "</ul>"


def _samples(results: Results) -> str:
    names = [name for name in JUDGE_LABELS if name in results["tournament"]["judges"]]
    blocks = ["<p>One answer of each policy's first run at the tau whose KL is nearest to the comparison's, and the "
              f"probability that each judge prefers it to {label(START)}'s.</p>"]  # fmt: skip
    for sample in results["tournament"]["samples"]:
        rows = [["wanted", *("" for _ in names), sample["truth"].strip()]]
        for number, (name, text) in enumerate(sample["answers"].items()):
            rows.append([label(name), *(f"{sample['chances'][judge][number]:.2f}" for judge in names), text.strip()])
        head = ["", *(judge.replace("-", " ") for judge in names), "answer"]
        blocks.append(f'<p class="text">{escaped(sample["prompt"].strip())}</p>{table(head, rows)}')
    return "".join(blocks)


def _making(results: Results) -> str:
    seconds = [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]
    facts = [[name, str(value)] for name, value in {**results["machine"], **results["preset"]}.items()]
    total = sum(results["seconds"].values())
    return (
        f"<p>{total:.0f} seconds in all stages together.</p>{table(['stage', 'seconds'], seconds)}"
        f"{table(['setting', 'value'], facts)}"
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def summary(results: Results) -> str:
    """Return the results as Markdown, for documents, without speeds, since results do not name their commit."""
    facts = results["tournament"]
    parts = [" ".join(answer(results)), *(describe(results) for describe in (describe_size, describe_distance,
                                                                              describe_intervals))]  # fmt: skip
    for judge, each in judges(results).items():
        parts.append(f"**Judged by {JUDGE_LABELS[judge]}, at {nats(results)}.**")
        parts.append("\n".join(f"- {describe_claim(claim)}" for claim in each["claims"]))
        head = ["row against column", *facts["labels"]]
        rows = [[name, *map(_markdown_cell, row)] for name, row in zip(facts["labels"], each["matrix"], strict=True)]
        parts.append(markdown_table(head, rows, numbers=True))
    parts.append("\n".join(f"- {line}" for line in describe_cycles(results)))
    parts.append(_judge_sentences(results))
    parts.append(machine_sentence(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_cell(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else plus_minus(cell["mean"], cell["half"], 2)


def _judge_sentences(results: Results) -> str:
    sentences = []
    for name, title in (("preference_model", "Preference model"), ("reward_model", "Reward model")):
        test = results[name]["test"]
        sentences.append(f"{title}: accuracy {test['accuracy']:.3f} on {test['count']} held-out pairs, log-loss "
                         f"{test['log_loss']:.3f}, calibration error {test['calibration_error']:.3f}.")  # fmt: skip
    if results["annotators"] is not None:
        best = results["annotators"]["test"]["ceiling"]
        sentences.append(f"Votes are drawn, so {best:.3f} is the best accuracy that can be expected.")
    return " ".join(sentences)


def machine_sentence(results: Results) -> str:
    """Return what the results of an experiment were made with."""
    machine = results["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("device", "cores", "threads", "torch", "transformers"))
    return f"Made with {facts}."
