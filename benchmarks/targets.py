"""Performance targets on a GPU: the headline rows, with a target where one is set, and the table of them.

Targets in microseconds are for an H200, whose copy bandwidth is 4.27 TB/s; on another card those bound by bandwidth are
scaled by its measured copy bandwidth. Ratios hold on every card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .harness.case import ModesByShape, Shape
from .harness.compare import RIVALS
from .harness.report import format_bytes, format_ratio, format_us, three_digits
from .harness.results import ResultRow

H200_COPY_BYTES_PER_S = 4.27e12
WIDTH = 160  # of the table
_WIDTHS = (42, 24, 26, 7, 7, 12)
MISSING = "-"


@dataclass(frozen=True)
class Target:
    """A target of one of these kinds.

    us      at most `value` microseconds
    times   at most `value` times the row called `of`
    faster  at least `value` times as fast as the best rival
    floor   at least `value` percent of the floor
    memory  at most `value` times the best rival's peak
    """

    kind: str
    value: float
    of: str = ""


@dataclass(frozen=True)
class Headline:
    name: str
    case: str
    shape: str
    dtype: str
    mode: str
    target: Target | None = None
    ours: str = ""  # the end of our implementation's name; "": the one `auto` selects


def _us(value: float) -> Target:
    return Target("us", value)


def _sampler(rows: int, vocabulary: int, target: Target | None, dtype: str = "bfloat16", filters: str = "") -> Headline:
    what = f"sample {rows} x {vocabulary}{' fp32' if dtype == 'float32' else ''}{' ' + filters if filters else ''}"
    shape = f"rows={rows} vocabulary={vocabulary}{' ' + filters if filters else ''}"
    return Headline(what, "mixture_sample", shape, dtype, "forward", target)


def _host_cost(name: str, target: Target | None, ours: str = "") -> Headline:
    shape = "rows=1 vocabulary=1024"
    return Headline(f"host cost: {name}", "mixture_sample", shape, "bfloat16", "overhead", target, ours)


def _linear(name: str, case: str, sizes: str, target: Target | None = None, mode: str = "full") -> Headline:
    return Headline(name, case, f"tokens=8192 length=512 {sizes}", "bfloat16", mode, target)


_64, _7B, _HALF = "sample 64 x 128256", "hidden=4096 vocabulary=128256", "hidden=896 vocabulary=151936"
_LOGITS = "tokens=8192 length=512 vocabulary=128256 models="
ROLLOUT_HALF = "prompts=16 prompt=128 new=96 width=896 layers=24 vocabulary=151936 mlp=4864 heads=14 kv_heads=2 tied=1"
ROLLOUT_7B = "prompts=16 prompt=128 new=96 width=3584 layers=28 vocabulary=152064 mlp=18944 heads=28 kv_heads=4 tied=0"
_ONE_MODEL = "tokens=2048 length=512 hidden=4096 vocabulary=128256 upstream="
_UPDATE = "prompts=16 prompt=128 new={} width=896 layers=24 vocabulary=151936"


def _product(layer: str, width: int, columns: int) -> Headline:
    """A linear layer of a step; the rival is cuBLAS."""
    shape = f"rows=32 width={width} columns={columns}"
    return Headline(f"product of a step: {layer}", "decode_linear", shape, "bfloat16", "forward", ours="triton")


def _rollout(name: str, shape: str, ours: str, target: Target | None) -> Headline:
    return Headline(name, "rollout", shape, "bfloat16", "forward", target, ours)


def _update(new: int, target: Target | None, name: str = "an update of training") -> Headline:
    shape = _UPDATE.format(new)
    return Headline(f"{name}, {new} new tokens", "train_step", shape, "bfloat16", "full", target, "NashTrainer")


HEADLINES = (
    _sampler(1, 128_256, _us(6)),
    _host_cost("the sampler", None),
    _host_cost("its operator, settings packed", _us(15), "torch.ops, packed settings"),
    _host_cost("its call in the engine", _us(8), "sample_packed"),
    _sampler(16, 128_256, _us(8)),
    _sampler(64, 128_256, _us(12)),
    _sampler(64, 151_936, _us(24), "float32"),
    _sampler(256, 151_936, _us(45)),
    Headline("read 64 x 128256", "mixture_sample", "rows=64 vocabulary=128256", "bfloat16", "forward",
             ours="floor: logits read"),
    Headline(f"{_64}, tokens alone", "mixture_sample", "rows=64 vocabulary=128256", "bfloat16", "forward",
             Target("times", 1.0, "read 64 x 128256"), ours=", no log-probabilities"),
    _sampler(64, 128_256, Target("times", 2.2, _64), filters="top_k=50 top_p=0.9"),
    _sampler(64, 128_256, Target("times", 2.2, _64), filters="min_p=0.1"),
    _sampler(24, 49_152, None),
    _sampler(24, 49_155, Target("times", 1.3, "sample 24 x 49152")),  # rows that are not 16-byte aligned
    Headline("log-probabilities of two models", "logprobs", f"{_LOGITS}policy+reference", "bfloat16", "forward",
             Target("floor", 95)),
    Headline("the same with gradient", "logprobs", f"{_LOGITS}policy+reference", "bfloat16", "full",
             Target("floor", 95)),
    Headline("the same in place", "logprobs", f"{_LOGITS}policy+reference", "bfloat16", "full", Target("floor", 95),
             ", in place"),
    Headline("the same with KL", "logprobs", f"{_LOGITS}policy+reference+kl", "bfloat16", "full", Target("floor", 95)),
    _linear("log-probabilities from hidden, 7B", "linear_logprobs", _7B),
    _linear("Nash-MD loss from hidden, 7B", "nash_pg_loss", _7B, _us(52_000)),
    _linear("Nash-MD loss from hidden, 0.5B", "nash_pg_loss", _HALF, _us(17_000)),
    _linear("the same with the exact KL", "nash_pg_loss", f"{_HALF} kl=exact",
            Target("times", 1.05, "Nash-MD loss from hidden, 0.5B")),
    _linear("the same with the KL to go", "nash_pg_loss", f"{_HALF} kl=to_go",
            Target("times", 1.05, "Nash-MD loss from hidden, 0.5B")),
    _linear("preference loss from hidden, 0.5B", "preference_loss", _HALF),
    Headline("one model, a gradient for each token", "one_model", f"{_ONE_MODEL}tokens", "bfloat16", "full",
             Target("faster", 0.9)),
    Headline("one model, the gradient of the sum", "one_model", f"{_ONE_MODEL}sum", "bfloat16", "full",
             Target("faster", 0.9)),
    Headline("attention of a step, 0.5B", "decode_attention", "rows=32 heads=14 kv_heads=2 positions=192 dim=64",
             "bfloat16", "forward"),
    Headline("attention of a step, 7B", "decode_attention", "rows=32 heads=28 kv_heads=4 positions=192 dim=128",
             "bfloat16", "forward"),
    *(_product(*sizes) for sizes in (("q, k, v", 896, 1152), ("gate, up", 896, 9728))),
    Headline("100 steps, 1024 games x 64", "mirror_descent", "games=1024 actions=64 steps=100", "float32", "forward"),
    Headline("the same, float64", "mirror_descent", "games=1024 actions=64 steps=100", "float64", "forward"),
    Headline("100 steps, 8 games x 2048", "mirror_descent", "games=8 actions=2048 steps=100", "float32", "forward",
             _us(4_500)),
    Headline("2**20 uniform numbers", "row_uniforms", "rows=1048576", "float64", "forward"),
    _rollout("token step, 0.5B", ROLLOUT_HALF, "engine: a token step", _us(2_000)),
    _rollout("token step, 0.5B, unfused", ROLLOUT_HALF, "engine, unfused: a token step", None),
    _rollout("token step, 0.5B, products", ROLLOUT_HALF, "engine, products: a token step", None),
    _rollout("token step, 0.5B, layers", ROLLOUT_HALF, "engine, layers: a token step", None),
    _rollout("token step, 0.5B, linear", ROLLOUT_HALF, "engine, linear: a token step", None),
    _rollout("token step, 0.5B, one pass", ROLLOUT_HALF, "engine, one pass: a token step", None),
    _rollout("token step, 0.5B, one pass, linear", ROLLOUT_HALF, "engine, one pass, linear: a token step", None),
    _rollout("token step, 0.5B, tuned", ROLLOUT_HALF, "engine, tuned: a token step", None),
    _rollout("token step, 0.5B, compiled, tuned", ROLLOUT_HALF, "engine, compiled, tuned: a token step", None),
    _rollout("token step, 0.5B, compiled", ROLLOUT_HALF, "engine, compiled: a token step", _us(1_250)),
    _rollout("token step, 0.5B, compiled, unfused", ROLLOUT_HALF, "engine, compiled, unfused: a token step", None),
    _rollout("token step, 0.5B, compiled, linear", ROLLOUT_HALF, "engine, compiled, linear: a token step", None),
    _rollout("prompts and first token, 0.5B", ROLLOUT_HALF, "engine: the first token", _us(25_000)),
    _rollout("prompts and first token, 0.5B, compiled", ROLLOUT_HALF, "engine, compiled: the first token", _us(25_000)),
    _rollout("prompts unrecorded, 0.5B", ROLLOUT_HALF, "engine, steps recorded: the first token", None),
    _rollout("prompts and first token, 7B", ROLLOUT_7B, "engine: the first token", None),
    _rollout("prompts recorded, 7B", ROLLOUT_7B, "engine, prompts recorded: the first token", None),
    _rollout("rollout of 96 tokens, 0.5B", ROLLOUT_HALF, "engine", None),
    _rollout("token step, 7B", ROLLOUT_7B, "engine: a token step", _us(9_300)),
    _rollout("token step, 7B, unfused", ROLLOUT_7B, "engine, unfused: a token step", None),
    _rollout("token step, 7B, products", ROLLOUT_7B, "engine, products: a token step", None),
    _rollout("token step, 7B, layers", ROLLOUT_7B, "engine, layers: a token step", None),
    _rollout("token step, 7B, linear", ROLLOUT_7B, "engine, linear: a token step", None),
    _rollout("token step, 7B, one pass", ROLLOUT_7B, "engine, one pass: a token step", None),
    _rollout("token step, 7B, one pass, linear", ROLLOUT_7B, "engine, one pass, linear: a token step", None),
    _rollout("token step, 7B, tuned", ROLLOUT_7B, "engine, tuned: a token step", None),
    _rollout("token step, 7B, LoRA", ROLLOUT_7B, "engine, LoRA: a token step", Target("times", 0.65, "token step, 7B")),
    _rollout("token step, 7B, compiled", ROLLOUT_7B, "engine, compiled: a token step", _us(7_800)),
    _rollout("rollout of 96 tokens, 7B", ROLLOUT_7B, "engine", None),
    _update(64, Target("faster", 12)),
    _update(256, Target("faster", 20)),
    _update(64, Target("memory", 0.5), "memory of an update"),
)  # fmt: skip


def headline_modes() -> ModesByShape:
    """Return what the preset headline measures: (case, shape, dtype) -> modes, those with a target first."""
    modes: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for each in sorted(HEADLINES, key=lambda each: each.target is None):
        key = (each.case, each.shape, each.dtype)
        modes[key] = tuple(dict.fromkeys((*modes.get(key, ()), each.mode)))
    return modes


def headline_shapes(case: str, shapes: Iterable[Shape]) -> list[Shape]:
    """Return those shapes of a benchmark other than the ops' cases that the headlines name."""
    return [shape for shape in shapes if (case, *shape.identity) in headline_modes()]


@dataclass(frozen=True)
class Line:
    """A measured headline: the library's row and the rivals' rows of the same run."""

    headline: Headline
    ours: ResultRow | None
    rival: ResultRow | None  # the fastest
    other: ResultRow | None  # a backend of ours that was faster than the one `auto` selects
    reason: str = ""  # why ours, or the rival that the target asks for, has no time

    @property
    def speedup(self) -> float | None:
        return _median(self.rival) / _median(self.ours) if self.rival and self.ours else None


def line_of(headline: Headline, rows: Sequence[ResultRow]) -> Line:
    """Make the line from the latest run with a time of the library, and from rivals of that run alone."""
    of_key = [
        row for row in rows
        if (row.key.case, row.key.shape, row.key.dtype, row.key.mode)
        == (headline.case, headline.shape, headline.dtype, headline.mode)
    ]  # fmt: skip
    same = [row for row in of_key if row.timing is not None]
    ours = [row for row in same if _is_ours(row, headline)]
    if not ours:
        absent = [row for row in of_key if _is_ours(row, headline) or row.kind == "case"]
        return Line(headline, None, None, None, _reason(absent))
    run = max((row.run for row in ours), key=lambda run: run.timestamp)
    same = [row for row in same if row.run == run]
    mine = min((row for row in ours if row.run == run), key=_median)
    rivals = [row for row in same if row.kind in RIVALS] if mine.kind != "part" else []
    others = [row for row in same if row.kind == "backend" and mine.chosen and _median(row) < _median(mine)]
    absent = [row for row in of_key if row.run == run and row.kind in RIVALS]
    wanted = headline.target is not None and headline.target.kind in ("faster", "memory") and not rivals
    fastest = (min(each, key=_median, default=None) for each in (rivals, others))
    return Line(headline, mine, *fastest, reason=_reason(absent) if wanted else "")


def _reason(rows: Iterable[ResultRow]) -> str:
    """Return why the last of the rows has no time; empty without rows."""
    last = next(iter(reversed(list(rows))), None)
    return "" if last is None else f"{last.status}: {'; '.join(last.reasons)}"


def _is_ours(row: ResultRow, headline: Headline) -> bool:
    if row.kind in RIVALS:
        return False
    if headline.ours.startswith(","):  # a variant of every backend
        return row.key.implementation.endswith(headline.ours)
    return row.key.implementation == headline.ours if headline.ours else row.chosen


def _median(row: ResultRow | None) -> float:
    assert row is not None and row.timing is not None
    return row.timing.median_us


def verdict_of(line: Line, lines: Mapping[str, Line]) -> tuple[str, bool | None]:
    """Return the target as text, and whether it is met; None if that is unknown."""
    target, ours = line.headline.target, line.ours
    if target is None:
        return MISSING, None
    if target.kind == "faster":
        return f"{target.value:g}x rival", None if line.speedup is None else line.speedup >= target.value
    if target.kind == "floor":
        share = ours.floor.percent if ours is not None and ours.floor is not None else None
        return f"{target.value:g} % floor", None if share is None else share >= target.value
    if target.kind == "memory":
        peaks = [row.memory.peak_bytes for row in (ours, line.rival) if row is not None and row.memory is not None]
        return f"{target.value:g}x rival", None if len(peaks) < 2 else peaks[0] <= target.value * peaks[1]
    if target.kind == "times":
        base = lines[target.of].ours
        if base is None or ours is None:
            return f"{target.value:g}x {target.of}", None
        allowed = target.value * _median(base)
        return format_us(allowed), _median(ours) <= allowed
    allowed = target.value * (_bandwidth_scale(ours) if ours is not None else 1.0)
    return format_us(allowed), None if ours is None else _median(ours) <= allowed


def _bandwidth_scale(row: ResultRow) -> float:
    """Return this card's time over an H200's for the same bytes; 1 for rows bound by matrix products or the host."""
    if row.key.mode == "overhead":
        return 1.0
    bound = row.floor.bound_by if row.floor is not None else "bandwidth"
    return H200_COPY_BYTES_PER_S / row.run.ceilings["copy_bytes_per_s"] if bound == "bandwidth" else 1.0


def headlines_of(rows: Sequence[ResultRow], preset: str) -> list[Headline]:
    """Make headlines for a preset that has none: each row of a backend that `auto` selects, without a target."""
    keys = dict.fromkeys(row.key for row in rows if row.chosen and row.run.preset == preset)
    return [
        Headline(f"{key.case} {key.mode} {key.dtype} {key.shape}", key.case, key.shape, key.dtype, key.mode)
        for key in keys
    ]


def table(rows: Sequence[ResultRow], headlines: Sequence[Headline] = HEADLINES, count: int | None = None) -> list[str]:
    """Return a line per headline: name, ours, best rival, ratio, share of the floor, target, whether it is met.

    Args:
        rows: of a results file.
        headlines: what the lines are about.
        count: of lines at most, the names of the columns included; None: no limit.
    """
    lines = {each.name: line_of(each, rows) for each in headlines}
    shown = headlines if count is None else fitting(headlines, count - 1)
    columns = [("what", "ours", "best rival", "ratio", "floor", "target", "met")]
    columns += [_cells(lines[each.name], *verdict_of(lines[each.name], lines)) for each in shown]
    return [_aligned(cells) for cells in columns]


def measured_cells(rows: Sequence[ResultRow], headlines: Iterable[Headline] = HEADLINES) -> list[tuple[str, ...]]:
    """Return the cells of `table` for the headlines that the library has a time for, uncut.

    Args:
        rows: of a results file.
        headlines: what the lines are about.
    """
    lines = {each.name: line_of(each, rows) for each in headlines}
    return [_cells(line, *verdict_of(line, lines)) for line in lines.values() if line.ours is not None]


def _cells(line: Line, target: str, met: bool | None) -> tuple[str, ...]:
    verdict = MISSING if met is None else "yes" if met else "NO"
    ours, rival = line.ours, line.rival
    if ours is None:
        return line.headline.name, MISSING, MISSING, MISSING, MISSING, target, f"{verdict} {line.reason}".strip()
    if line.reason:
        verdict += f" {line.reason}"
    if line.other is not None:
        verdict += f" ({line.other.key.implementation}: {format_us(_median(line.other))})"
    if line.headline.target is not None and line.headline.target.kind == "memory":
        mine, theirs = (None if row is None or row.memory is None else row.memory.peak_bytes for row in (ours, rival))
        ratio = mine / theirs if mine and theirs else None
        sizes = format_bytes(mine), format_bytes(theirs), format_ratio(ratio)
        return line.headline.name, *sizes, MISSING, target, verdict
    return (
        line.headline.name,
        f"{format_us(_median(ours))} {ours.key.implementation.partition(':')[0]}",
        MISSING if rival is None else f"{format_us(_median(rival))} {rival.key.implementation}",
        format_ratio(line.speedup),
        MISSING if ours.floor is None else f"{three_digits(ours.floor.percent)} %",
        target,
        verdict,
    )


def fitting(headlines: Sequence[Headline], count: int) -> list[Headline]:
    """Return at most `count` headlines: the last of those without a target are left out first."""
    excess = len(headlines) - count
    left_out = [number for number, each in enumerate(headlines) if each.target is None][::-1][: max(excess, 0)]
    return [each for number, each in enumerate(headlines) if number not in left_out][:count]


def phase_lines(rows: Sequence[ResultRow], headlines: Iterable[Headline] = HEADLINES) -> list[str]:
    """Return a line per training update of the headlines: the phases of ours, with their times and shares."""
    updates = {each.shape: each for each in headlines if each.case == "train_step"}
    lines = []
    for headline in updates.values():
        ours = line_of(headline, rows).ours
        if ours is None:
            continue
        name = f"{ours.key.implementation}: "
        parts = {
            row.key.implementation.removeprefix(name): _median(row)
            for row in rows
            if row.run == ours.run and row.key.shape == headline.shape and row.key.implementation.startswith(name)
        }
        shares = (f"{part} {format_us(us)} ({100 * us / _median(ours):.0f} %)" for part, us in parts.items())
        lines.append(f"{headline.name[: _WIDTHS[0]]}: {', '.join(shares)}"[:WIDTH])
    return lines


def _aligned(cells: Sequence[str]) -> str:
    """Align the cells in WIDTH columns; cut what does not fit."""
    columns = (cell[:width].ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False))
    return " ".join([*columns, cells[-1]])[:WIDTH]
