"""Compare libraries at one model's log-probabilities of given tokens: from hidden states, forward and backward.

Two problems. With `upstream=tokens` every token's log-probability has a gradient of its own, known in backward only:
what a policy gradient needs in general. With `upstream=sum` the result is their sum, whose gradient is known in the
forward pass; some libraries do nothing else. Ours takes the second with `linear_nash_pg_loss`, whose weights may differ
from token to token.

Each implementation runs in a process of its own, so that a crash affects its own row alone; their calls alternate. An
implementation is timed only if values and gradients agree with float64.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

import nlhf_kernels
from benchmarks.harness.case import Shape
from benchmarks.harness.check import ROUNDINGS, SANE, relative_error
from benchmarks.harness.entries import Entry
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.processes import Remote
from benchmarks.harness.results import ResultRow
from benchmarks.harness.rounds import build_parser, check_rivals, run_rounds
from benchmarks.harness.runner import SEED, RunContext
from benchmarks.harness.timing import Action, Clock, TimingPlan, round_robin
from benchmarks.rivals import scores
from benchmarks.rivals.models import least_bytes, make_models, matmul_flops
from benchmarks.targets import headline_shapes

NAME = "one_model"
PATIENCE_S = 300.0  # for the rivals' compilers
_TINY = {"tokens": 12, "length": 4, "hidden": 16, "vocabulary": 999}
_SMALL = {"tokens": 512, "length": 128, "hidden": 256, "vocabulary": 32_000}
_LARGE = {"tokens": 2048, "length": 512, "hidden": 4096, "vocabulary": 128_256}
SHAPES = {
    "tiny": [Shape({**_TINY, "upstream": upstream}) for upstream in ("tokens", "sum")],
    "standard": [
        *(Shape({**_LARGE, "upstream": upstream}, "bfloat16", devices=("cuda",)) for upstream in ("tokens", "sum")),
        *(Shape({**_SMALL, "upstream": upstream}, devices=("cpu",)) for upstream in ("tokens", "sum")),
    ],
}
SHAPES["headline"] = headline_shapes(NAME, SHAPES["standard"])


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nlhf_kernels.linear_logprobs(hidden, weight, targets).policy


def ours_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    known = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    advantage = torch.ones(targets.shape[:1], dtype=torch.float32, device=targets.device)
    result = nlhf_kernels.linear_nash_pg_loss(
        hidden, weight, targets, advantage=advantage, tau=0.0, normalizer=1.0, reference_logprobs=known
    )
    return -result.loss


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return scores.full_logits(hidden, weight, targets).policy


def eager_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return eager(hidden, weight, targets).sum()


@dataclass(frozen=True)
class Contender:
    """A function of (hidden (B, T, D), weight (V, D), targets (B, T)), and what it needs."""

    function: Callable[..., torch.Tensor]  # returns log-probabilities (B, T), or their sum
    packages: tuple[str, ...] = ()  # modules that must import
    install: str = ""  # what pip installs them from
    on_gpu: bool = False
    hopper: bool = False

    def why_not(self, device: torch.device) -> tuple[str, ...]:
        """Return the reasons why it cannot run; empty: it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        found = [f"{', '.join(absent)}: not installed (pip install '{self.install}')"] if absent else []
        if device.type != "cuda":
            return (*found, "needs a GPU") if self.on_gpu else tuple(found)
        capability = torch.cuda.get_device_capability(device)
        if self.hopper and capability != (9, 0):
            found.append("needs compute capability 9.0; got {}.{}".format(*capability))
        return tuple(found)


_LIGER = partial(Contender, packages=("liger_kernel",), install="liger-kernel", on_gpu=True)
_LIGER_SM90 = partial(
    Contender,
    packages=("liger_kernel", "cutlass", "tvm_ffi"),
    install="liger-kernel[cutedsl]",
    on_gpu=True,
    hopper=True,
)
_QUACK = partial(Contender, packages=("quack", "cutlass"), install="quack-kernels", on_gpu=True, hopper=True)
_APPLE = partial(Contender, packages=("cut_cross_entropy",), install="cut-cross-entropy", on_gpu=True)
CONTENDERS: dict[str, dict[str, Contender]] = {
    "tokens": {
        "linear_logprobs": Contender(ours),
        "eager": Contender(eager),
        "Liger, SM90": _LIGER_SM90(scores.liger_sm90),
        "QuACK": _QUACK(scores.quack),
        "Liger, Triton": _LIGER(scores.liger_triton),
        "cut_cross_entropy": _APPLE(scores.cut_cross_entropy),
    },
    "sum": {
        "linear_nash_pg_loss": Contender(ours_sum),
        "eager": Contender(eager_sum),
        "QuACK, chunked": _QUACK(scores.quack_sum),
        "Liger, SM90 sum": _LIGER_SM90(scores.liger_sm90_sum),
    },
}
OURS = {upstream: next(iter(contenders)) for upstream, contenders in CONTENDERS.items()}
RIVALS = tuple(dict.fromkeys(name for each in CONTENDERS.values() for name in each if name not in OURS.values()))


class Worker:
    """A contender with its inputs, in its process. Making it calls it once, so that all compile at the same time."""

    def __init__(self, threads: int, function: Callable[..., torch.Tensor], shape: Shape, device: torch.device) -> None:
        torch.set_num_threads(threads)
        generator = torch.Generator(device).manual_seed(SEED)
        models = make_models(shape, device, generator)
        self.function, self.device, self.targets = function, device, models.targets
        self.leaves = [models.hidden.requires_grad_(), models.weight.requires_grad_()]
        sums = shape.sizes["upstream"] == "sum"
        size = () if sums else tuple(models.targets.shape)
        self.upstream = (torch.ones if sums else partial(torch.randn, generator=generator))(size, device=device)
        del models  # the reference's tensors
        self.clock: Clock | None = None
        self.run()

    def run(self) -> tuple[torch.Tensor, ...]:
        scored = self.function(*self.leaves, self.targets)
        return scored, *torch.autograd.grad(scored, self.leaves, self.upstream.to(scored.dtype))

    def error(self) -> float:
        """Return the largest error of values and gradients against float64, relative to the largest true entry."""
        doubles = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        truth = scores.true_scores(*doubles, self.targets).policy
        if not self.upstream.ndim:
            truth = truth.sum()
        true = (truth, *torch.autograd.grad(truth, doubles, self.upstream.double()))
        error = relative_error(tuple(part.detach() for part in self.run()), tuple(part.detach() for part in true))
        del doubles, truth, true
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes need it
        return error

    def sample_us(self, flush_bytes: int) -> float:
        self.clock = self.clock or Clock(self.device, flush_bytes)
        return self.clock.sample_us(self._action)

    def peak(self) -> int:
        return peak_bytes(self._action, self.device)

    @property
    def _action(self) -> Action:
        return Action(lambda: None, lambda _: self.run())


def run_shape(
    shape: Shape,
    context: RunContext,
    plan: TimingPlan,
    wanted: Sequence[str] | None = None,
    patience: float = PATIENCE_S,
) -> list[ResultRow]:
    device, upstream = context.settings.device, str(shape.sizes["upstream"])
    entries = []
    with ExitStack() as processes:
        for name, contender in CONTENDERS[upstream].items():
            ours = name == OURS[upstream]
            if not (ours or wanted is None or name in wanted):
                continue
            if reasons := contender.why_not(device):
                entries.append(Entry(name, None, ours, "unavailable", reasons))
            else:
                process = Remote(Worker, context.threads, contender.function, shape, device)
                entries.append(Entry(name, processes.enter_context(process), ours))
        began = time.monotonic()
        for entry in entries:
            entry.wait(None if entry.ours else patience - (time.monotonic() - began))
        _judge(entries, shape.dtype)
        _time([entry for entry in entries if entry.status == "ok"], plan, context.plan.flush_bytes)
        for entry in entries:
            entry.peak = entry.ask("peak")
    of_eager = next((entry.timing for entry in entries if entry.name == "eager"), None)
    work = least_bytes(shape, "full"), matmul_flops(shape, "full")
    return [entry.row(NAME, shape, context, chosen=entry.ours, rival=of_eager, work=work) for entry in entries]


def _judge(entries: Sequence[Entry], dtype: str) -> None:
    """Allow an error in proportion to eager's own, as the other benchmarks do."""
    errors = {entry.name: entry.ask("error") for entry in entries}
    of_eager = errors.get("eager")
    proportional = of_eager is not None and of_eager <= SANE[dtype]
    for entry in entries:
        if (error := errors[entry.name]) is not None:
            allowed = 2 * of_eager + ROUNDINGS[dtype] if proportional and entry.name != "eager" else SANE[dtype]
            entry.judge(error, allowed, f"error {error:.3g}, allowed {allowed:.3g}")


def _time(entries: Sequence[Entry], plan: TimingPlan, flush_bytes: int) -> None:
    processes = {entry.name: entry.process for entry in entries if entry.process is not None}
    samplers = {name: partial(process.call, "sample_us", flush_bytes) for name, process in processes.items()}
    timings = round_robin(samplers, plan, flush_bytes)
    for entry in entries:
        entry.time(timings[entry.name])


def print_fastest(shape: Shape, rows: Sequence[ResultRow], console: Console) -> None:
    timed = [row for row in rows if row.timing is not None]
    if timed:
        fastest = min(timed, key=lambda row: row.timing.median_us if row.timing is not None else float("inf"))
        console.print(f"{shape.label}: fastest {fastest.key.implementation}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser(NAME, __doc__)
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds until all rivals are compiled")
    arguments = parser.parse_args(argv)
    check_rivals(NAME, arguments.rival, RIVALS)
    run = partial(run_shape, wanted=arguments.rival, patience=arguments.patience)
    rows = run_rounds(NAME, arguments, SHAPES, run, print_fastest)
    return 0 if all(row.status in ("ok", "unavailable") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
