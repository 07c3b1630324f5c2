"""Win rates at equal KL against brute force, and the figures: their content and legibility."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("transformers", reason="the room samples answers of transformers' models")

from nlhf_kernels.core.plots import PALETTE
from nlhf_kernels.evaluation import (
    Estimate,
    Frontier,
    Tournament,
    difference_at,
    plot_estimates,
    plot_frontiers,
    plot_win_rates,
    rate_at_equal_kl,
    shared_range,
)
from nlhf_kernels.evaluation.frontier import interpolation


def frontier(name: str = "method", kl=(4.0, 1.0, 0.25), rates=(0.8, 0.7, 0.6), runs: int = 1, spread: float = 0.0,
             seed: int = 0) -> Frontier:  # fmt: skip
    """Make a frontier of policies with these means, in any order of KL, with noise over prompts and runs."""
    generator = torch.Generator().manual_seed(seed)
    values = [
        torch.tensor(means, dtype=torch.float64)[:, None, None]
        + scale * torch.randn(len(kl), runs, 200, generator=generator, dtype=torch.float64)
        for means, scale in ((kl, spread), (rates, 0.3 * spread))
    ]
    return Frontier(name, [0.01 * n for n in range(1, len(kl) + 1)], *values)


def test_interpolation_is_linear_in_the_root_of_kl() -> None:
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(1)
    kl = torch.rand(50, 6, generator=generator, dtype=torch.float64) * 5 - 0.2
    rates = torch.rand(50, 6, generator=generator, dtype=torch.float64)
    for at in (0.0, 0.3, 2.0, 6.0):
        weights = interpolation(kl, at)
        assert torch.allclose(weights.sum(1), torch.ones(50, dtype=torch.float64)) and float(weights.min()) >= 0
        for row, each, values in zip(weights, kl, rates, strict=True):
            order = each.argsort()
            places = each[order].clamp(min=0).sqrt().numpy()
            if len(set(places)) == len(places):  # estimates below 0 are all 0
                expected = numpy.interp(at**0.5, places, values[order].numpy())
                assert float(row @ values) == pytest.approx(float(expected), abs=1e-12)


def test_a_frontier_goes_through_its_policies_and_between_them() -> None:
    method = frontier()
    assert [point.tau for point in method.points()] == [0.03, 0.02, 0.01], "in the order of KL"
    assert [point.rate.mean for point in method.points()] == pytest.approx([0.6, 0.7, 0.8])
    assert method.at(1.0).mean == pytest.approx(0.7) and method.at(4.0).mean == pytest.approx(0.8)
    assert method.at(2.25).mean == pytest.approx(0.75), "sqrt(2.25) is half way from 1 to 2"
    with pytest.raises(ValueError, match=r"frontier: kl: expected between 0.25 and 4, which method span; got 5"):
        method.at(5.0)
    with pytest.raises(ValueError, match=r"taus: expected two or more, each once; got \[1, 1\]"):
        Frontier("x", [1, 1], torch.zeros(2, 1, 3), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"x: expected kl and rates of one shape \(2, runs, prompts\); got"):
        Frontier("x", [1, 2], torch.zeros(2, 1, 3), torch.zeros(2, 3))


def test_methods_are_compared_where_both_are() -> None:
    first, second = frontier("first"), frontier("second", kl=(9.0, 0.5), rates=(0.9, 0.5))
    assert shared_range([first, second]) == (0.5, 4.0)
    at = 2.25
    share = (1.5 - 0.5**0.5) / (3.0 - 0.5**0.5)
    assert difference_at(first, second, at).mean == pytest.approx(0.75 - (0.5 + 0.4 * share))
    with pytest.raises(ValueError, match=r"expected between 0.5 and 4, which first and second span; got 0.3"):
        difference_at(first, second, 0.3)
    with pytest.raises(ValueError, match=r"overlap; got first 0.25 to 4, far 5 to 6"):
        shared_range([first, frontier("far", kl=(5.0, 6.0), rates=(0.5, 0.5))])
    with pytest.raises(ValueError, match=r"as many runs and prompts of both; got \(1, 200\) and \(2, 200\)"):
        difference_at(first, frontier("second", runs=2), at)


def test_common_noise_cancels_in_a_difference() -> None:
    noisy = frontier("a", spread=0.5)
    better = Frontier("b", noisy.taus, noisy.kl, noisy.rates + 0.01)
    gap = difference_at(better, noisy, 1.0)
    assert gap.mean == pytest.approx(0.01) and gap.half < 1e-9 < 0.01 < noisy.at(1.0).half


def test_the_rate_between_two_methods_is_interpolated_in_both_kls() -> None:
    kls = {"a1": 1.0, "a2": 4.0, "b1": 0.25, "b2": 2.25, "b3": 9.0}
    table = {("a1", "b1"): 0.9, ("a1", "b2"): 0.4, ("a1", "b3"): 0.3, ("a2", "b1"): 0.8, ("a2", "b2"): 0.6,
             ("a2", "b3"): 0.2}  # fmt: skip
    values = {match: torch.full((2, 5), rate, dtype=torch.float64) for match, rate in table.items()}
    names = list(kls)
    for match in itertools.combinations(names, 2):
        values.setdefault(match, torch.full((2, 5), 0.5, dtype=torch.float64))
    kl = {name: torch.full((1, 5), each, dtype=torch.float64) for name, each in kls.items()}  # one run plays in both
    rate = rate_at_equal_kl(Tournament(names, values), names[:2], names[2:], kl, 3.0625)
    a, b = (1.75 - 1) / (2 - 1), (1.75 - 1.5) / (3 - 1.5)  # shares of a2 and of b3
    expected = (1 - a) * ((1 - b) * 0.4 + b * 0.3) + a * ((1 - b) * 0.6 + b * 0.2)
    assert rate.mean == pytest.approx(expected) and rate.half == pytest.approx(0.0, abs=1e-9)
    other_way = rate_at_equal_kl(Tournament(names, values), names[2:], names[:2], kl, 3.0625)
    assert other_way.mean == pytest.approx(1 - expected)
    alone = rate_at_equal_kl(Tournament(names, values), names[:2], ["b3"], kl, 3.0625)
    assert alone.mean == pytest.approx((1 - a) * 0.3 + a * 0.2), "one policy alone plays at its own KL"
    both = rate_at_equal_kl(Tournament(names, values), ["a1"], ["b1"], kl, 3.0625)
    assert both.mean == pytest.approx(0.9)


def test_intervals_at_equal_kl_cover_the_true_rate_as_often_as_they_say() -> None:
    """Intervals cover the rate interpolated between the policies' true KLs and rates, with noise in both."""
    truth = frontier().at(2.0).mean
    rounds = 200
    intervals = [frontier(runs=3, spread=1.0, seed=seed).at(2.0) for seed in range(rounds)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert covered / rounds > 0.95 - 3 * math.sqrt(0.05 * 0.95 / rounds)
    assert max(interval.half for interval in intervals) < 0.2, "intervals that say something"


# --- figures


def letters_at_400_pixels(figure) -> float:
    """Return the height in pixels of the smallest text in a figure scaled to 400 pixels."""
    sizes = [text.get_fontsize() for text in figure.findobj(lambda part: hasattr(part, "get_fontsize"))
             if text.get_text().strip()]  # fmt: skip
    return min(sizes) * 400 / (72 * figure.get_figwidth())


def cell(mean: float) -> Estimate:
    return Estimate(mean, 0.03, 100, 3)


@pytest.mark.parametrize("count", [3, 9, 12])
def test_the_matrix_is_read_at_400_pixels(count) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    matrix = [[None if i == j else cell(0.5 + 0.03 * (i - j)) for j in range(count)] for i in range(count)]
    figure = plot_win_rates([f"Nash-MD 0.{n} $x" for n in range(count)], matrix)
    figure.canvas.draw()
    assert letters_at_400_pixels(figure) > 9
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    width = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    assert len(boxes) == count * (count - 1)
    assert max(box.width for box in boxes) < width and max(box.height for box in boxes) < width, "texts fit their cells"
    row = axes.images[0].get_array()[0].filled(-1).tolist()
    assert row[:2] == pytest.approx([-1, 0.47])


def test_a_matrix_of_another_shape_is_refused() -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    with pytest.raises(ValueError, match=r"matrix: expected 2 rows of as many cells; got 1 rows of \[1\] cells"):
        plot_win_rates(["a", "b"], [[None]])


def test_frontiers_and_estimates_draw_the_numbers() -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    series = {f"method {n}": frontier(spread=0.5, seed=n).points() for n in range(10)}
    figure = plot_frontiers(series, "RLHF")
    figure.canvas.draw()
    assert letters_at_400_pixels(figure) > 9
    (axes,) = figure.axes
    for container, points in zip(axes.containers, series.values(), strict=True):
        line, _, (across, up) = container
        assert line.get_xdata() == pytest.approx([point.kl.mean for point in points])
        assert line.get_ydata() == pytest.approx([point.rate.mean for point in points])
        ends = up.get_segments()[0][:, 1].tolist()
        assert ends == pytest.approx([points[0].rate.low, points[0].rate.high])
        assert across.get_segments()[1][:, 0].tolist() == pytest.approx([points[1].kl.low, points[1].kl.high])
    (marked,) = plot_frontiers(dict(itertools.islice(series.items(), 1)), at=2.5).axes
    dotted = [[list(line.get_xdata()) == [2.5, 2.5] for line in each.lines] for each in (marked, axes)]
    assert sum(dotted[0]) == 1 and not any(dotted[1]), "the KL of a comparison"
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line, *_ in axes.containers}
    assert len(looks) == 10, "no two series look alike"
    figure = plot_estimates({"a": [(2.0, cell(0.6)), (1.0, cell(0.4))]}, "share of cycles", "advantage", level=0.5)
    ((line, _, bars),) = figure.axes[0].containers
    assert line.get_xdata().tolist() == [1.0, 2.0] and line.get_ydata().tolist() == [0.4, 0.6] and len(bars) == 1


def test_intervals_at_one_place_stand_beside_each_other() -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    points = [(0.0, cell(0.6)), (1.0, cell(0.4)), (3.0, cell(0.5))]
    (axes,) = plot_estimates(dict.fromkeys("abc", points), "x", "y").axes
    places = [line.get_xdata().tolist() for line, *_ in axes.containers]
    assert places[1] == [0.0, 1.0, 3.0], "around where they belong"
    assert sorted(each[0] for each in places) == pytest.approx([-0.2, 0.0, 0.2]), (
        "apart, and nearer than the next place"
    )
    plot_estimates({"a": [(1.0, cell(0.6))], "b": [(1.0, cell(0.6))], "c": []}, "x", "y")


@pytest.mark.parametrize(
    "labels", [["a"] * 11, ["Nash-MD 0.25, pairs", "untrained reference"] * 5, ["best response to it, queries"] * 4]
)
def test_a_legend_is_no_wider_than_its_figure(labels) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    names = [f"{label}{index}" for index, label in enumerate(labels)]
    figure = plot_estimates({name: [(1.0, cell(0.6)), (2.0, cell(0.5))] for name in names}, "x", "y")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.x1


#: Linear RGB as seen by dichromats (Vienot, Brettel and Mollon 1999; Machado 2009 for tritanopia).
SIGHT = {
    "protanopia": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deuteranopia": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all cones": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


def lab(colour: str, sight: list[list[float]]) -> torch.Tensor:
    code = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    linear = (torch.tensor(sight, dtype=torch.float64) @ linear).clamp(0, 1)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (to_xyz.double() @ linear / torch.tensor([0.9505, 1.0, 1.089], dtype=torch.float64)).tolist()
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return torch.tensor([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart_with_every_kind_of_colour_vision(sight) -> None:
    """Colours differ by more than 10 in CIELAB, where 2.3 is just noticeable; a confusable pair does not."""
    colours = [lab(colour, SIGHT[sight]) for colour in PALETTE]
    distances = [float((a - b).norm()) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 10
    if sight == "deuteranopia":
        assert float((lab("#8c6d00", SIGHT[sight]) - lab("#6b7d00", SIGHT[sight])).norm()) < 10
