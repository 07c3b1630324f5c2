"""The report's figures: functions of the results, and of one judge's name where it has a part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from ..core.plots import PALETTE, STYLES, new_figure
from ..evaluation import Estimate, FrontierPoint, plot_frontiers, plot_win_rates
from .presets import label

Results = dict[str, Any]
JUDGE_LABELS = {"annotators": "the true annotators", "preference-model": "the preference model"}  # the truth first
MARKED = 12  # points of a curve up to which each has a marker


def judges(results: Results) -> dict[str, Any]:
    """Return the tournament's results by judge, the annotators first."""
    facts = results["tournament"]["judges"]
    return {name: facts[name] for name in JUDGE_LABELS if name in facts}


def heat_map(results: Results, judge: str) -> Any:
    """Plot win rates at equal KL, row against column, with the numbers in the cells."""
    facts = results["tournament"]
    title = f"P(row preferred to column) at {nats(results)},\njudged by {JUDGE_LABELS[judge]}"
    return plot_win_rates(facts["labels"], facts["judges"][judge]["matrix"], title)


def win_rate_by_beta(results: Results) -> Any:
    """Plot win rates of Nash-MD at equal KL by beta, against one opponent."""
    figure, axes = _panel(f"Nash-MD by beta at {nats(results)}, 95 % intervals")
    against = ""
    for index, (judge, facts) in enumerate(judges(results).items()):
        points = facts["by_beta"]
        if points:
            against = points[0]["against"]
            axes.errorbar(
                [point["beta"] + 0.01 * index for point in points],
                [point["mean"] for point in points],
                [point["half"] for point in points],
                marker="o", capsize=3, linestyle=STYLES[index], label=JUDGE_LABELS[judge],
            )  # fmt: skip
    axes.set(xlabel="beta", ylabel=f"win rate against {against}")
    _rates(axes)
    _legend(figure, axes)
    return figure


def training_curves(results: Results, quantity: str, ylabel: str) -> Any:
    """Plot a logged quantity against the updates, as means over a contestant's runs at the tau nearest to equal KL."""
    figure, axes = _panel("")
    for index, (name, points) in enumerate(curves(results, quantity).items()):
        axes.plot(
            list(points), list(points.values()), linestyle=STYLES[index % len(STYLES)], linewidth=1.3,
            marker="o" if len(points) <= MARKED else None, markersize=4, label=label(name),
        )  # fmt: skip
    axes.set(xlabel="update", ylabel=ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if "win_rate" in quantity:
        _rates(axes)
    else:
        _from_zero(axes)
    _legend(figure, axes)
    return figure


def curves(results: Results, quantity: str) -> dict[str, dict[int, float]]:
    """Return contestant -> update -> mean over its runs at the tau whose KL is nearest to the tournament's. Quantities
    that training does not log come from the evaluations during training: IPO-MD trains on answers of the mixture, not
    of the policy."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, history in results["histories"].items():
        contestant, index, _ = run.rsplit(" ", 2)
        if int(index) != results["tournament"]["nearest"][contestant]:
            continue
        name = quantity if any(quantity in entry for entry in history) else f"eval_{quantity}"
        for entry in history:
            if name in entry:
                values[contestant][int(entry["step"])].append(float(entry[name]))
    return {name: {step: fmean(each) for step, each in sorted(steps.items())} for name, steps in values.items()}


def frontiers(results: Results, judge: str) -> Any:
    """Plot win rate against the reference over KL from it, a line through each contestant's policies."""
    facts = results["tournament"]
    lines = {
        label(name): [FrontierPoint(0.0, Estimate(**point["kl"]), Estimate(**point["rate"])) for point in points]
        for name, points in facts["judges"][judge]["frontiers"].items()
    }
    title = f"judged by {JUDGE_LABELS[judge]}; dotted: {nats(results)}"
    return plot_frontiers(lines, facts["labels"][0], title, at=facts["kl"])


def nats(results: Results) -> str:
    """Return the KL at which contestants are compared, with its unit."""
    return f"{results['tournament']['kl']:.3g} nats"


def all_figures(results: Results) -> Iterable[tuple[str, str, Any]]:
    """Yield (file name, caption, figure)."""
    yield "kl", "Win rate against KL", frontiers(results, next(iter(judges(results))))
    for judge in judges(results):
        caption = f"Win rates at {nats(results)}, judged by {JUDGE_LABELS[judge]}"
        yield f"matrix-{judge}", caption, heat_map(results, judge)
    if any(facts["by_beta"] for facts in judges(results).values()):
        yield "beta", f"Win rate at {nats(results)} against beta", win_rate_by_beta(results)
    for quantity, name, ylabel in (
        ("eval_win_rate_reference", "training-win-rate", "win rate against the reference"),
        ("kl", "training-kl", "KL(policy, reference), nats per answer"),
        ("length", "training-length", "tokens of an answer"),
    ):
        yield (
            name,
            f"On the way: {ylabel}, at the tau nearest to {nats(results)}",
            training_curves(results, quantity, ylabel),
        )


def _panel(title: str) -> tuple[Any, Any]:
    """Return a figure with one panel, narrow enough to be legible on a phone."""
    figure = new_figure(5.2, 3.9)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_prop_cycle(color=PALETTE)
    return figure, axes


def _rates(axes: Any) -> None:
    """Show a win rate's whole range, so that a small difference from 1/2 looks small."""
    axes.set_ylim(0.0, 1.0)
    axes.axhline(0.5, color="0.5", linewidth=1)


def _from_zero(axes: Any) -> None:
    """Begin the vertical axis at zero, or below it where estimates are negative."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(*((min(0.0, low), high + 0.05 * (high - min(0.0, low))) if high > min(0.0, low) else (0.0, 1.0)))


def _legend(figure: Any, axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
