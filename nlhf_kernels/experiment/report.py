"""The report: one HTML file with everything in it, drawn from the results alone.

What it says about the claims is computed from the numbers by `claims.py`; nothing here knows how they came out.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .claims import CONTRADICTED, REPRODUCED
from .contestants import label
from .figures import JUDGE_LABELS, all_figures, as_svg
from .tournament import MARGIN

Results = dict[str, Any]
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem}td,th{border:1px solid #ccc;padding:.25rem .5rem}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{margin:1.5rem 0}figure img{max-width:100%}
figcaption{color:#555;font-size:.9rem}.verdict{border-left:4px solid #888;padding:.2rem .8rem;margin:.8rem 0}
.reproduced{border-color:#2a7}.contradicted{border-color:#c33}.scroll{overflow-x:auto}"""


def write_report(results: Results, folder: Path) -> Path:
    """`report.html`, and its figures as files in `figures`, for other documents."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, caption, figure in all_figures(results):
        drawn = as_svg(figure)
        (folder / "figures" / f"{name}.svg").write_bytes(drawn)
        pictures.append(_picture(drawn, caption))
    path = folder / "report.html"
    path.write_text(page(results, pictures), encoding="utf-8")
    return path


def page(results: Results, pictures: Sequence[str]) -> str:
    facts, corpus = results["tournament"], results["corpus"]
    source = results["material"]["data"] or "docstrings of the installed Python packages"
    parts = [
        "<h1>Nash learning from human feedback: the summarisation experiment</h1>",
        f"<p>{_e(source)}: {corpus['train']} examples to train on, {corpus['test']} to test on. "
        f"{results['sft']['parameters']:,} parameters. {_e(describe_size(results))}</p>",
        "<h2>The claims</h2>",
        *(_verdicts(judge, each["claims"]) for judge, each in facts["judges"].items()),
        f"<p>{_e(describe_intervals(results))}</p>",
        "<h2>Cycles</h2>",
        *(f"<p>{_e(line)}</p>" for line in describe_cycles(results)),
        "<h2>Win rates</h2>",
        *(_matrix(facts, judge) for judge in facts["judges"]),
        *pictures,
        "<h2>Policies</h2>",
        _policies(facts),
        "<h2>What the judges are worth</h2>",
        _models(results),
        "<h2>The kernels on this run</h2>",
        _speed(results),
        "<h2>Answers</h2>",
        _samples(facts),
        "<h2>How it was made</h2>",
        _making(results),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Nash learning: the experiment</title>\n'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def describe_size(results: Results) -> str:
    preset = results["preset"]
    runs = "1 training run" if preset["seeds"] == 1 else f"{preset['seeds']} training runs"
    double = f" (IPO-MD: {2 * preset['samples_per_prompt']})" if "ipo-md" in preset["contestants"] else ""
    unequal = (
        " That is more than RLHF was told, whose reward model saw a sample of their votes: the match with it is not "
        "one of equal information."
        if preset["judge"] == "annotators"
        else ""
    )
    return (
        f"Every contestant starts from the supervised policy and has the same budget, {preset['updates']} updates on "
        f"{preset['prompts_per_update']} prompts, {preset['samples_per_prompt']} answers to each of them trained on"
        f"{double}; {runs} of each. "
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
        f"Intervals are 95 %, n = {facts['prompts']} prompts, answers of each policy to a prompt: "
        f"{facts['answers']}; {what}. A match counts "
        f"as won above {0.5 + MARGIN:g}, with the whole interval; where the best of several is picked, "
        "the intervals are widened for the picking (Bonferroni)."
    )


def describe_cycles(results: Results) -> list[str]:
    lines = []
    for judge, each in results["cycles"].items():
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
        f"a whole update of {label(speed['algorithm'])} on {speed['device']} ({speed['threads']} threads): "
        f"{update['kernels_ms']:.0f} ms with the kernels, {update['reference_ms']:.0f} ms with the PyTorch reference: "
        f"{update['speedup']:.2f}x"
    ]
    for each in speed["operations"]:
        lines.append(
            f"{each['name']}, {each['size']}: {each['kernels_ms']:.2f} ms, reference {each['reference_ms']:.2f} ms: "
            f"{each['speedup']:.2f}x"
        )
    return lines


def describe_claim(claim: dict[str, Any]) -> str:
    matches = ", ".join(f"{m['first']} against {m['second']} {m['mean']:.3f} ± {m['half']:.3f}"
                        for m in claim["matches"])  # fmt: skip
    best = f"; best of {claim['compared']}: {claim['best']}" if claim["best"] else ""
    prompts = f", {claim['prompts']} prompts" if "prompts" in claim else ""
    return f"{claim['claim']}: {claim['verdict']}{best}{prompts}. {matches}".rstrip(". ") + "."


def _verdicts(judge: str, claims: Iterable[dict[str, Any]]) -> str:
    kinds = {REPRODUCED: "reproduced", CONTRADICTED: "contradicted"}
    shown = "".join(
        f'<div class="verdict {kinds.get(claim["verdict"], "")}">{_e(describe_claim(claim))}</div>' for claim in claims
    )
    return f"<h3>Judged by {JUDGE_LABELS[judge]}</h3>{shown or '<p>These contestants do not answer them.</p>'}"


def _matrix(facts: Results, judge: str) -> str:
    rows = [
        [name, *("" if cell is None else f"{cell['mean']:.3f} ± {cell['half']:.3f}" for cell in row)]
        for name, row in zip(facts["labels"], facts["judges"][judge]["matrix"], strict=True)
    ]
    return f"<h3>Judged by {JUDGE_LABELS[judge]}</h3>" + table(["row against column", *facts["labels"]], rows)


def _policies(facts: Results) -> str:
    rows = []
    for name, each in facts["policies"].items():
        kl = f"{each['kl']:.3f} ± {1.96 * each['kl_error']:.3f}" if "kl" in each else ""
        rows.append([label(name), str(each["runs"]), kl, f"{each['length']:.1f}", f"{each['end_rate']:.3f}"])
    return table(["policy", "runs", "KL to the reference, nats per answer", "tokens", "ended by itself"], rows)


def _models(results: Results) -> str:
    rows = []
    for name, title in (("preference_model", "preference model"), ("reward_model", "reward model")):
        test = results[name]["test"]
        rows.append([title, str(test["count"]), f"{test['accuracy']:.3f}", f"{test['log_loss']:.3f}",
                     f"{test['calibration_error']:.3f}"])  # fmt: skip
    shown = table(["", "held-out pairs", "accuracy", "log-loss", "calibration error"], rows)
    annotators = results["annotators"]
    if annotators is not None:
        shown += (f"<p>Votes are drawn: always naming the likelier winner would be right "
                  f"{annotators['test']['ceiling']:.3f} of the time.</p>")  # fmt: skip
    return shown


def _speed(results: Results) -> str:
    return "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in describe_speed(results)) + "</ul>"


def _samples(facts: Results) -> str:
    blocks = []
    for sample in facts["samples"]:
        rows = [["wanted", sample["truth"].strip()]]
        rows += [[label(name), text.strip()] for name, text in sample["answers"].items()]
        blocks.append(f"<p>{_e(sample['prompt'])}</p>{table(['', 'answer'], rows)}")
    return "".join(blocks)


def _making(results: Results) -> str:
    seconds = [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]
    facts = [[name, str(value)] for name, value in {**results["machine"], **results["preset"]}.items()]
    total = sum(results["seconds"].values())
    return (
        f"<p>{total:.0f} seconds in all stages together.</p>{table(['stage', 'seconds'], seconds)}"
        f"{table(['setting', 'value'], facts)}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{_e(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f'<td class="{"n" if _number(cell) else ""}">{_e(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def _picture(drawn: bytes, caption: str) -> str:
    data = base64.b64encode(drawn).decode()
    image = f'<img alt="{_e(caption)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{_e(caption)}</figcaption></figure>"


def _number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "-"


def _e(text: object) -> str:
    return html.escape(str(text))
