"""`nlhf-kernels info`: installed versions, the backends that can run here, and why the others cannot.

Paste its output into a bug report.
"""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..core import calls, capabilities, settings, tuning
from ..core.registry import Op, ops
from ..core.terminal import new_console
from ..core.text import markdown_table

PACKAGES = ("torch", "triton", "transformers", "numpy", "pybind11", "accelerate", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--markdown", action="store_true", help="print only the table of ops and backends, as the README has it"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print(ops_table())
        return 0
    console = new_console()
    for table in (_versions(), _devices(), _build(), _backends(), _ops(), _plans(), _settings()):
        console.print(table)
    return 0


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=len(columns) > 2, min_width=60)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> Table:
    table = _table("Versions", "package", "version")
    table.add_row("nlhf-kernels", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("torch's CUDA", torch.version.cuda or "none: a CPU build")
    return table


def _devices() -> Table:
    table = _table("Devices", "device", "facts")
    table.add_row("cpu", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        table.add_row(
            f"cuda:{index}",
            f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB, "
            f"{facts.multi_processor_count} multiprocessors",
        )
    if not torch.cuda.is_available():
        table.add_row("cuda", "none that PyTorch sees")
    return table


def _build() -> Table:
    table = _table("Native modules", "module", "facts")
    for name in ("_cpu", "_cuda"):
        if reason := capabilities.native_missing(name):
            table.add_row(name, Text(reason, style="yellow"))
            continue
        module = capabilities.native(name)
        facts = module.build_info()
        if name == "_cpu":
            facts["SIMD level in use"] = module.active_level()
            facts["best for this CPU"] = module.best_level()
            reason = calls.native_calls_missing()
            facts["calls of known signatures"] = f"in Python: {reason}" if reason else "in C++"
        table.add_row(name, "\n".join(f"{key}: {_plain(value)}" for key, value in facts.items()))
    return table


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _devices_here() -> list[torch.device]:
    cpu = torch.device("cpu")
    return [cpu, torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else [cpu]


def _backends() -> Table:
    """List why backends cannot run on this machine; `nlhf_kernels.explain` adds the limits of a single call."""
    table = _table("Backends on this machine", "backend", *map(str, _devices_here()))
    table.show_header = True
    for backend in settings.BACKENDS:
        cells = ("; ".join(capabilities.machine_reasons(backend, device)) or "can run" for device in _devices_here())
        table.add_row(backend, *cells)
    if capabilities.failed_checks:  # last: the rows above make the checks
        unknown = (f"could not check {what}: {error}" for what, error in capabilities.failed_checks.items())
        table.caption = escape("\n".join(unknown))
    return table


def _ops() -> Table:
    """List, per op, the order of `auto` on each device, with backends that cannot run here in brackets."""
    devices = _devices_here()
    table = _table("Ops: the order of auto", "op", *map(str, devices), "no such backend")
    for op in ops():
        orders = []
        for device in devices:
            measurements = [entry for entry in op.measured if entry.device == device.type]
            cases = {f" ({entry.problems})": entry.order for entry in measurements} or {"": op.order[device.type]}
            orders.append("\n".join(_marked(order, device) + case for case, order in cases.items()))
        table.add_row(op.name, *orders, "\n".join(f"{name}: {reason}" for name, reason in op.absent.items()))
    return table


def _marked(order: tuple[str, ...], device: torch.device) -> str:
    return " > ".join(f"({name})" if capabilities.machine_reasons(name, device) else name for name in order)


def _plans() -> Table:
    """List the launch plans in force: those tuned on this GPU, or why there are none."""
    table = _table("Tuned launch plans", "where", "what")
    path = tuning.plans_file()
    table.add_row("file", "none: NLHF_KERNELS_TUNING is off" if path is None else str(path))
    if not torch.cuda.is_available():
        table.add_row("in force", "none: plans are those of GPU kernels, and PyTorch sees no GPU")
        return table
    card = tuning.card_name(torch.device("cuda", torch.cuda.current_device()))
    plans = tuning.tuned_plans(card)
    for (op, backend, workload), numbers in plans.items():
        table.add_row(f"{op} {backend}, {workload}", " ".join(map(str, numbers)))
    if not plans:
        table.add_row("in force", f"none for {card} and these kernels: `nlhf-kernels tune` finds them")
    return table


def _settings() -> Table:
    table = _table("Settings", "variable", "value", "meaning")
    for variable, value in settings.environment().items():
        table.add_row(variable, value if value is not None else "(not set)", settings.VARIABLES[variable])
    return table


def ops_table() -> str:
    """Return the registry's table of ops and backends, which the README contains (a test compares them)."""
    notes: list[str] = []  # each reason once, however many cells share it

    def cell(op: Op, backend: str) -> str:
        reason = op.absent.get(backend)
        if reason is None:
            return f"by `{op.built_on}`" if op.built_on else "yes"
        if reason not in notes:
            notes.append(reason)
        return f"no ({notes.index(reason) + 1})"

    rows = [
        [f"[`{op.name}`](nlhf_kernels/ops/{op.name}/README.md)", *(cell(op, name) for name in settings.BACKENDS)]
        for op in ops()
    ]
    table = markdown_table(("op", *settings.BACKENDS), rows)
    numbered = [f"({number}) {note}." for number, note in enumerate(notes, 1)]
    return "\n".join([table, *(["", *numbered] if notes else [])])
