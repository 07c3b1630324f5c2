"""The report as one HTML file and its figures, drawn from the results alone: the answer first, four figures, answers
side by side, then tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.text import markdown_table
from ...evaluation import Estimate, plus_minus
from ...evaluation.plots import plot_estimates, plot_win_rates
from ..claims import CONTRADICTED, REPRODUCED
from ..page import capitalised, escaped, framed, paragraphs, table, write_figures, write_page
from ..report import machine_sentence
from .measures import MARGIN
from .presets import CLAIMED, CORE, INFORMATION

Results = dict[str, Any]
MINUS = "\u2212"
#: Contestants that lines are drawn of first; with the untrained reference no more than there are colours.
FIRST = (*CORE, "self-play-queries", "best-response-queries")
#: The differences of exploitability: where both are compared.
GAPS = {"less_exploitable": "", "less_exploitable_at_best": ", each at its best distance"}


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html`, which is self-contained, and its figures as files in `figures`, for other documents.

    Args:
        results: of `CandidateExperiment.run`.
        folder: of the report.
    """
    pictures = write_figures(folder, all_figures(results))
    return write_page(folder, page(results, list(pictures.values())))


def page(results: Results, pictures: Sequence[str]) -> str:
    """Return the HTML page.

    Args:
        results: of `CandidateExperiment.run`.
        pictures: of `write_figures`.
    """
    parts = [
        "<h1>Nash learning from human feedback where preferences cycle</h1>",
        *(f"<p><b>{escaped(sentence)}</b></p>" for sentence in answer(results)),
        *pictures,
        "<h2>The claims</h2>",
        *(f'<div class="verdict {_colour(claim)}"><p>{escaped(describe_claim(claim))}</p></div>'
          for claim in results["claims"]),
        *paragraphs((describe_setting(results), describe_distance(results))),
        "<h2>Answers</h2>",
        f"<p>{len(results['samples'])} prompts, in per cent: how often each judge prefers an answer to the "
        "reference's, and how often each policy (its first run, at equal KL) gives it.</p>",
        *(_sample(results, sample) for sample in results["samples"]),
        "<h2>Numbers</h2>",
        *(f"<h3>{escaped(title)}</h3>{table(head, rows)}" for title, head, rows in tables(results)),
        "<h2>How it was made</h2>",
        _making(results),
    ]  # fmt: skip
    return framed("Nash learning where preferences cycle", parts)


def summary(results: Results) -> str:
    """Return the numbers as Markdown, for documents.

    Args:
        results: of `CandidateExperiment.run`.
    """
    parts = [
        " ".join(answer(results)),
        "\n".join(f"- {describe_claim(claim)}" for claim in results["claims"]),
        describe_setting(results),
        describe_distance(results),
        *(f"**{title}.**\n\n{markdown_table(head, rows)}" for title, head, rows in tables(results)),
        machine_sentence(results),
    ]
    return "\n\n".join(parts) + "\n"


# ---- sentences -------------------------------------------------------------------------------------------------------


def answer(results: Results) -> list[str]:
    """Return three sentences with the main numbers of the answer.

    Args:
        results: of `CandidateExperiment.run`.
    """
    budget, last = results["preset"]["budget"], results["knobs"][-1]
    untrained = results["limits"]["reference"][-1]
    exploited, best, won, equal = [], [], [], []
    for information, rows in results["advantages"].items():
        values = [results["exploitability"][name]["by_knob"][-1] for name in reversed(CLAIMED[information])]
        described = {"pairs": "told the same human pairs", "queries": "given the same number of votes"}[information]
        exploited.append(
            f"{_plain(values[0], 0.5)} against RLHF and {_plain(values[1], 0.5)} against Nash-MD ({described})"
        )
        best.append(f"{_plain(rows[-1]['less_exploitable_at_best'])} ({information})")
        won.append(f"{_plain(rows[-1]['win_rate'])} ({information})")
        equal.append(f"{_plain(rows[0]['win_rate'])} ({information})")
    return [
        f"Where preferences cycle most ({last['cyclic']:.0%} of triples), the best opponent that goes no further than "
        f"{_nats(budget)} from the reference wins {_plain(untrained, 0.5)} against the untrained reference, "
        f"{', '.join(exploited)}.",
        f"Where each may stop earlier, at the distance where it is least exploitable, that opponent wins "
        f"{', '.join(best)} more against RLHF than against Nash-MD; at the full distance Nash-MD is preferred to RLHF "
        f"with probability {', '.join(won)}.",
        f"Where the preferences come from a reward, it is preferred with probability {', '.join(equal)}.",
    ]


def describe_claim(claim: Mapping[str, Any]) -> str:
    """Return a claim with its verdict and number.

    Args:
        claim: of `measures.claims`.
    """
    return f"{capitalised(claim['claim'])}: {claim['verdict']} ({plus_minus(claim['mean'], claim['half'])})."


def describe_setting(results: Results) -> str:
    """Return a paragraph on the method of measurement.

    Args:
        results: of `CandidateExperiment.run`.
    """
    preset = results["preset"]
    votes = results["budgets"]
    votes_asked = max((each["votes"] for each in votes.values()), default=0)
    return (
        f"{len(results['knobs'])} groups of annotators, by a knob from a reward to circles, {preset['games']} prompts "
        f"each, {preset['candidates']} answers to choose from; {preset['runs']} training runs of each contestant at "
        f"each of {len(preset['taus'])} tau. Every run makes {preset['updates']} updates with "
        f"{preset['samples_per_prompt']} answers to every prompt. pairs: {INFORMATION['pairs']}, {preset['pairs']}; "
        f"queries: {INFORMATION['queries']}, {votes_asked}. Policies are compared at {_nats(preset['budget'])} of KL "
        "from the reference, prompt by prompt, or at their own where they stay below; win rates are expectations over "
        f"all answers. Intervals are 95 %, over prompts and training runs; a difference counts above {MARGIN:g} with "
        "its whole interval."
    )


def describe_distance(results: Results) -> str:
    """Return a paragraph on the KL that an equilibrium within the budget needs.

    Args:
        results: of `CandidateExperiment.run`.
    """
    budget, spent = results["preset"]["budget"], results["limits"]["equilibrium"]["kl"]
    used = ", ".join(f"{value:.2f}" for value in spent)
    what = (
        "Where preferences cycle most it lies nearer to the reference than the budget allows, so a contestant that "
        "stays below the budget there is not held back by it."
        if spent[-1] < 0.9 * budget
        else "It needs nearly all of the budget where preferences cycle most, too."
    )
    return (
        f"The equilibrium of the game in which both sides may spend {_nats(budget)} spends {used} of it at the "
        f"{len(spent)} settings of the knob. {what}"
    )


# ---- figures ---------------------------------------------------------------------------------------------------------


def all_figures(results: Results) -> list[tuple[str, str, Any]]:
    """Return (file name, caption, figure) of the four figures.

    Args:
        results: of `CandidateExperiment.run`.
    """
    last, labels = results["knobs"][-1], _labels(results)
    most = f"where {last['cyclic']:.0%} of triples cycle"
    budget = _nats(results["preset"]["budget"])
    unrewarded = [knob["unrewarded"] for knob in results["knobs"]]
    advantages = {
        f"same {information}{where}": [(x, Estimate(**row[field])) for x, row in zip(unrewarded, rows, strict=True)]
        for field, where in GAPS.items() for information, rows in results["advantages"].items()
    }  # fmt: skip
    limit = results["exact_advantages"]["less_exploitable"]
    advantages["exact limit, same pairs"] = [
        (x, Estimate(value, 0.0, 0, 0)) for x, value in zip(unrewarded, limit, strict=True)
    ]
    drawn = sorted(results["labels"], key=lambda name: name not in FIRST)[: len(FIRST)]
    if len(drawn) < len(labels):
        most += f"; {len(drawn)} of {len(labels)} contestants, the others are in the tables"
    by_update = {
        labels[name]: [(mark, Estimate(**value)) for mark, value in results["exploitability"][name]["by_update"]]
        for name in drawn
    }
    marks = [mark for points in by_update.values() for mark, _ in points]
    untrained = Estimate(**results["limits"]["reference"][-1])
    by_update["untrained reference"] = [(mark, untrained) for mark in (0, max(marks))]
    frontiers = {
        labels[name]: [(point["budget"], Estimate(**point["worst"])) for point in results["frontiers"][name]]
        for name in drawn
    }
    matrix = results["matrix"][-1]
    return [
        ("advantage", f"How much less exploitable Nash-MD is than RLHF at {budget}, against cycling",
         plot_estimates(advantages, "share of the log-odds that no reward explains",
                        f"exploitability of RLHF {MINUS} Nash-MD", level=0.0)),
        ("exploitability", f"Exploitability at {budget} on the way, {most}",
         plot_estimates(by_update, "update", "exploitability (0: equilibrium)", level=0.0)),
        ("matrix", f"Win rates at {budget}, where {last['cyclic']:.0%} of triples cycle",
         plot_win_rates([labels[name] for name in results["labels"]], matrix["rates"], "P(row preferred to column)")),
        ("frontier", f"Win rate against the best opponent of equal KL, {most}",
         plot_estimates(frontiers, "KL from the reference that both may spend, nats", "win rate at worst", level=0.5)),
    ]  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, head, rows) of every table.

    Args:
        results: of `CandidateExperiment.run`.
    """
    labels, knobs = _labels(results), results["knobs"]
    heads = [f"knob {knob['knob']:g}, {knob['cyclic']:.0%} cyclic" for knob in knobs]
    limits, star = results["limits"], f"equilibrium within {_nats(results['preset']['budget'])}"
    games = [[f"{knob['knob']:g}", str(knob["prompts"]), f"{knob['cyclic']:.3f}", f"{knob['unrewarded']:.3f}"]
             for knob in knobs]  # fmt: skip
    advantages = results["advantages"].items()
    gaps = [[f"{information}{where}", *(_cell(row[field]) for row in rows)]
            for field, where in GAPS.items() for information, rows in advantages]  # fmt: skip
    wins = [[information, *(_cell(row["win_rate"]) for row in rows)] for information, rows in advantages]
    for rows, field in ((gaps, "less_exploitable"), (wins, "win_rate")):
        rows.append(["exact limit", *(f"{value:.3f}" for value in results["exact_advantages"][field])])
    exploited: list[list[str]] = [["untrained reference", *map(_cell, limits["reference"])]]
    mixtures, trained, spent, least = [], [], [], []
    for name, facts in results["exploitability"].items():
        exploited.append([labels[name], *map(_cell, facts["by_knob"])])
        if facts["limit"] is not None:
            exploited.append([f"{labels[name]}, exact limit", *(f"{value:.3f}" for value in facts["limit"])])
        least.append([labels[name], *(f"{_cell(each)} at {each['kl']:.2f}" for each in facts["at_best"])])
        mixtures.append([labels[name], *map(_cell, facts["mixture"])])
        trained.append([labels[name], *(f"{_cell(each['best'])} of {each['exact']:.3f}" for each in facts["trained"])])
        spent.append([labels[name], *(f"{knob['at_budget']:.2f}" for knob in results["policies"][name])])
        if name in limits["kl"]:
            spent.append([f"{labels[name]}, exact limit", *(f"{value:.2f}" for value in limits["kl"][name])])
    exploited.append([star, *(f"{value:.3f}" for value in limits["equilibrium"]["exploitability"])])
    spent.append([star, *(f"{value:.2f}" for value in limits["equilibrium"]["kl"])])
    grids = {name: "reward_taus" if facts["algorithm"] == "rlhf" else "taus"
             for name, facts in results["labels"].items()}  # fmt: skip
    finished = [[f"{labels[name]}, tau {'/'.join(f'{tau:g}' for tau in results['preset'][grids[name]])}",
                 *("/".join(f"{value:.2f}" for value in knob["taus"]) for knob in each)]
                for name, each in results["policies"].items()]  # fmt: skip
    allowed = [f"at most {_nats(point['budget'])}" for point in next(iter(results["frontiers"].values()))[1::2]]
    points = [[labels[name], *(f"{point['kl']:.2f}: {point['reference']['mean']:.3f}" for point in each[1::2])]
              for name, each in results["frontiers"].items()]  # fmt: skip
    models = [[name.replace("-", " "), *_model(facts)] for name, facts in results["comparison_models"].items()]
    return [
        ("The annotators", ["knob", "prompts", "cyclic triples", "log-odds no reward explains"], games),
        ("Exploitability of RLHF less that of Nash-MD", ["", *heads], gaps),
        ("Nash-MD against RLHF, at equal KL", ["", *heads], wins),
        ("Exploitability at equal KL", ["", *heads], exploited),
        (
            f"Least exploitability along each frontier, and its KL, at most {_nats(results['preset']['budget'])}",
            ["", *heads],
            least,
        ),
        ("The mixture of a run's checkpoints", ["", *heads], mixtures),
        ("Trained best responses: the best win rate less 1/2, of the exact value", ["first run", *heads], trained),
        ("KL at which they are compared, nats", ["", *heads], spent),
        ("KL of the finished runs at each tau", ["", *heads], finished),
        (f"KL and win rate against the reference, {heads[-1]}", ["", *allowed], points),
        ("Models of the human pairs", ["", "held-out pairs", "accuracy", "log-loss", "learning rate"], models),
    ]


def _model(facts: Mapping[str, Any]) -> list[str]:
    best = facts["tried"][facts["chosen"]]
    return [str(best["count"]), f"{best['accuracy']:.3f}", f"{best['log_loss']:.3f}", f"{best['learning_rate']:g}"]


def _sample(results: Results, sample: Mapping[str, Any]) -> str:
    labels = _labels(results)
    parts = {f"{judge} prefer{'' if judge == 'annotators' else 's'}": values
             for judge, values in sample["beats_reference"].items()}  # fmt: skip
    parts |= {labels.get(name, name): values for name, values in sample["answers"].items()}
    rows = [[name, *(f"{100 * value:.0f}" for value in values)] for name, values in parts.items()]
    title = f'"{sample["prompt"]}" (knob {sample["knob"]:g})'
    return f"<h3>{escaped(title)}</h3>{table(['', *results['candidates']], rows)}"


def _making(results: Results) -> str:
    seconds = results["seconds"]
    total = sum(seconds.values())
    facts = [[name, str(value)] for name, value in {**results["machine"], **results["preset"]}.items()]
    return f"<p>{total:.0f} seconds in all {len(seconds)} stages together.</p>{table(['setting', 'value'], facts)}"


def _labels(results: Results) -> dict[str, str]:
    """Return the contestants' labels, with their information only where two share a name."""
    facts = results["labels"]
    names = [each["label"] for each in facts.values()]
    return {
        name: each["label"] if names.count(each["label"]) == 1 else f"{each['label']}, {each['information']}"
        for name, each in facts.items()
    }


def _colour(claim: Mapping[str, Any]) -> str:
    return {REPRODUCED: "reproduced", CONTRADICTED: "contradicted"}.get(claim["verdict"], "")


def _nats(budget: float) -> str:
    return f"{budget:g} {'nat' if budget == 1 else 'nats'}"


def _cell(value: Mapping[str, Any]) -> str:
    return plus_minus(value["mean"], value["half"])


def _plain(value: Mapping[str, Any], shift: float = 0.0) -> str:
    return plus_minus(value["mean"] + shift, value["half"], 2)
