"""`nlhf-kernels tune`: measure the launch plans of the GPU kernels on this GPU and remember the fastest.

Sizes come from a model's configuration (--model) or from --vocabulary and --products. A product of few rows is
remembered only where Triton's is faster than cuBLAS's, which `decode_linear` takes otherwise. Later processes on a GPU
of this name use the stored plans; `nlhf-kernels info` shows them. NLHF_KERNELS_TUNING names another file for them, or
switches them off.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table

import nlhf_kernels

from ..core import settings, tuning
from ..core.registry import explain
from ..core.terminal import new_console, new_progress
from ..ops.decode_linear.op import MAX_ROWS
from .errors import BadInput

DTYPES = ("bfloat16", "float16", "float32")
TOKENS = 2048  # rows of logits per chunk of a loss
STEPS = 20  # of mirror_descent
POSITIONS = 1024  # of the caches that decode_attention reads


class Operation(NamedTuple):
    """A call of a public function; with `gradient_of`, the gradient of that tensor is computed too."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    gradient_of: torch.Tensor | None = None


class Sizes(NamedTuple):
    """A model's sizes; without heads, attention is not tuned."""

    vocabulary: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    products: tuple[tuple[int, int], ...] = ()  # (width, columns) of linear layers
    one_pass: bool = False  # whether two models' products are tuned, too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", metavar="NAME", help="a model's folder or hub name; only its configuration is read")
    where.add_argument("--vocabulary", type=int, default=128_256, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 32, 64, 256], help="of a decoding step (default: 1 32 64 256)"
    )
    parser.add_argument(
        "--products",
        type=_pair,
        nargs="+",
        default=[],
        metavar="DxN",
        help="width x columns of linear layers, besides the model's: 896x1152",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="tune the products of two models in one launch, too, as rollouts with one_pass=True take them",
    )
    parser.add_argument(
        "--games", type=_pair, nargs="+", default=[], metavar="GxA", help="games x actions of mirror_descent: 8x2048"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of logits and caches (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="for all of it (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="show the table, remember nothing")


def run(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check(arguments, device)
    sizes = model_sizes(arguments.model) if arguments.model else Sizes(arguments.vocabulary)
    products = tuple(dict.fromkeys((*sizes.products, *arguments.products)))
    sizes = sizes._replace(products=products, one_pass=arguments.one_pass)
    console = new_console()
    failures: list[str] = []
    launches = find_launches(
        operations(sizes, arguments.rows, arguments.games, getattr(torch, arguments.dtype), device), failures
    )
    median_us, sweeps = tuning.median_on(device), []
    seconds = 60 * arguments.minutes
    with new_progress(new_console(stderr=True)) as progress:
        bar = progress.add_task("plans", total=sum(len(plans_of(launch)) for launch in launches))
        for index, (launch, calls) in enumerate(launches.items()):
            share = (seconds - (progress.tasks[0].elapsed or 0.0)) / (len(launches) - index)
            rival = launch.tunable.rival
            rivals = [partial(call, backend=rival) for call in calls] if rival else []
            try:
                sweeps.append(tuning.sweep(calls, launch, share, median_us, lambda: progress.advance(bar), rivals))
            except Exception as error:  # such as of a GPU that a plan's illegal access has taken down
                failures.append(_failure(f"{launch.tunable.op} {launch.tunable.backend}, {launch.workload}", error))
    console.print(table_of(sweeps))
    for line in failures:
        console.print(f"not measured: {line}", markup=False, highlight=False, soft_wrap=True)
    if not arguments.dry_run:
        path = tuning.keep(tuning.card_name(device), sweeps)
        console.print(f"remembered in {path}" if path else "not remembered: NLHF_KERNELS_TUNING is off")
    return 1 if failures else 0


def _failure(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {error}".splitlines()[0][:200]


def _pair(text: str) -> tuple[int, int]:
    first, separator, second = text.partition("x")
    if not (separator and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        raise argparse.ArgumentTypeError(f"expected two numbers above 0, such as 8x2048; got {text!r}")
    return int(first), int(second)


def _check(arguments: argparse.Namespace, device: torch.device) -> None:
    if device.type == "cpu" and not (settings.triton_interpret and arguments.dry_run):
        raise BadInput("tune: expected a GPU, whose kernels alone have launch plans; PyTorch sees none here")
    for option, number in (("--vocabulary", arguments.vocabulary), ("--rows", min(arguments.rows))):
        if number < 1:
            raise BadInput(f"{option}: expected at least 1; got {number}")
    if not 0 < arguments.minutes < float("inf"):
        raise BadInput(f"--minutes: expected a number above 0; got {arguments.minutes}")


def model_sizes(name: str) -> Sizes:
    """Read the sizes from a model's configuration."""
    from ..core.places import locate

    name = locate("tune: --model", name)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name).get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, mlp = config.hidden_size, getattr(config, "intermediate_size", None)
    queries, keys = heads * head_dim, kv_heads * head_dim
    products = [(width, queries + 2 * keys), (queries, width), (width, config.vocab_size)]
    if mlp:
        products += [(width, 2 * mlp), (mlp, width)]
    products += [(width, queries), (width, keys), *([(width, mlp)] if mlp else ())]  # where they are not joined
    return Sizes(config.vocab_size, heads, kv_heads, head_dim, tuple(products))


def find_launches(
    operations: Iterable[Operation], failures: list[str]
) -> dict[tuning.Launch, list[Callable[..., Any]]]:
    """Map the launches of tunable kernels in `operations` to the calls that make them; append what fails."""
    calls: dict[tuning.Launch, list[Callable[..., Any]]] = {}
    for op, arguments, options, gradient_of in operations:
        reasons = explain(op, *arguments, **options).reasons
        for backend in ("triton", "cuda"):
            if reasons[backend]:
                continue
            function = partial(getattr(nlhf_kernels, op), *arguments, backend=backend, **options)
            call = function if gradient_of is None else partial(_with_gradient, function, gradient_of)
            try:
                with tuning.record_launches() as launches:
                    call()
            except Exception as error:
                failures.append(_failure(f"{op} {backend}", error))
                continue
            for launch in dict.fromkeys(launches):
                calls.setdefault(launch, []).append(call)
    return calls


def operations(
    sizes: Sizes, rows: list[int], games: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Iterator[Operation]:
    """Yield the operations of training, decoding and solving games."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    for count in rows:
        logits = normal(count, sizes.vocabulary), normal(count, sizes.vocabulary)
        # Tensors and packed settings: numbers would be launches of their own, as long as the sampler's.
        zero = torch.zeros((), dtype=torch.int64, device=device)
        draw = {"seed": zero, "row_ids": torch.arange(count, dtype=torch.int64, device=device), "step": zero}
        for top_p in (1.0, 0.95):
            packed = nlhf_kernels.mixture_settings([0.9, 0.1], top_p=top_p, device=device)
            yield Operation("mixture_sample", logits, {**draw, "settings": packed})
        yield Operation("row_uniforms", (zero, draw["row_ids"], zero))
        if sizes.heads:
            query = normal(count, sizes.heads, sizes.head_dim)
            keys, values = (normal(count, sizes.kv_heads, POSITIONS, sizes.head_dim) for _ in range(2))
            ends = torch.full((count,), POSITIONS, dtype=torch.int64, device=device)
            yield Operation("decode_attention", (query, keys, values), {"ends": ends})
    for width, columns in sizes.products:
        weight, rest = normal(columns, width), normal(columns, width) if sizes.one_pass else None
        for count in (count for count in rows if count <= MAX_ROWS):
            yield Operation("decode_linear", (normal(count, width), weight))
            if rest is not None:
                yield Operation("decode_linear", (normal(2 * count, width), weight, None, rest, None, count))
    tokens = min(TOKENS, 32 * max(rows))
    policy, reference = normal(tokens, sizes.vocabulary).requires_grad_(), normal(tokens, sizes.vocabulary)
    targets = torch.randint(sizes.vocabulary, (tokens,), dtype=torch.int64, device=device)
    yield Operation("logprobs", (policy, targets), {"reference_logits": reference}, policy)
    for count, actions in games:
        preference = torch.rand(count, actions, actions, dtype=torch.float32, device=device)
        uniform = torch.zeros(count, actions, dtype=torch.float32, device=device)
        step_sizes = torch.full((STEPS,), 0.1, dtype=torch.float32, device=device)
        yield Operation("mirror_descent", (uniform, preference, uniform), {"tau": 0.1, "step_sizes": step_sizes})


def _with_gradient(function: Callable[[], Any], of: torch.Tensor) -> list[torch.Tensor]:
    outputs = [tensor for tensor in tuning.tensors_of(function()) if tensor.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, of, [torch.ones_like(tensor) for tensor in outputs])]


def plans_of(launch: tuning.Launch) -> set[tuning.Numbers]:
    return {launch.default, *launch.tunable.candidates(launch.default)}


def table_of(sweeps: list[tuning.Sweep]) -> Table:
    """Show the default and the fastest plan of every launch, in 80 columns."""
    table = Table(title="Launch plans", title_justify="left", title_style="bold", show_lines=True)
    for column in ("kernel, rows x sizes", "default plan", "fastest plan", "tried"):
        table.add_column(column, overflow="fold")
    for result in sweeps:
        tunable, workload, default = result.launch
        measured = sum(isinstance(median, float) for median in result.medians.values())
        default_plan, fastest = (_describe(result, plan) for plan in (default, result.best))
        same = "the default" if result.best == default else fastest
        if result.rival_us is not None:
            verdict = "" if result.beats_rival else ", which stays"
            same += f"\n{tunable.rival}: {result.rival_us:,.0f} us{verdict}"
        table.add_row(
            f"{tunable.op} {tunable.backend}\n{workload}", default_plan, same, f"{measured}/{len(result.medians)}"
        )
    return table


def _describe(result: tuning.Sweep, plan: tuning.Numbers) -> str:
    names = result.launch.tunable.plan_type._fields
    numbers = " ".join(f"{name}={number}" for name, number in zip(names, plan, strict=True))
    return f"{numbers}\n{result.medians[plan]:,.0f} us"
