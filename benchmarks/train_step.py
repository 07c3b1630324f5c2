"""Compare training updates: NashTrainer, the same trainer on the PyTorch oracle, TRL 1.13.0.

An update covers everything from a batch of prompts to new weights: responses of policy and opponent, judge scores,
loss, gradients, optimizer. Models, prompts, lengths and optimizer are the same; bfloat16 is autocast around float32
weights, as is TRL's default. Judge and reward cost nothing. TRL keeps its other defaults, such as gradient
checkpointing.

Each rival runs in a separate process, so that a crash affects its own row alone; updates of the rivals alternate. Two
checks: the gradient of our update equals that of plain PyTorch on the same responses, and all weights are finite at the
end. The speed-up is over TRL.

Phases are separate rows and add up to the update: rollout, judge, loss (the policy's forward pass; for ours with the
loss and the head's gradients), backward, optimizer, other. TRL's trainer computes the log-probabilities of both models
in `scoring`, with the policy's forward pass, and its loss is part of `other`; our rollouts return the reference's.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness.case import Shape
from benchmarks.harness.entries import Entry
from benchmarks.harness.memory import held_bytes, peak_above, peak_bytes
from benchmarks.harness.processes import Remote
from benchmarks.harness.results import ResultRow, RowKey
from benchmarks.harness.rounds import build_parser, check_rivals, run_rounds
from benchmarks.harness.runner import RunContext
from benchmarks.harness.timing import Action, TimingPlan, summarise, synchronise, time_calls
from benchmarks.rivals import trl
from benchmarks.targets import headline_shapes
from nlhf_kernels.core.upstream import finite_attention_gradients

BETA, TAU = 0.125, 0.01
OURS, TORCH, TRL = "NashTrainer", "NashTrainer, torch backend", "TRL 1.13.0"
ALLOWED_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}  # of the gradient, relative to its norm
_SMALL = {"width": 256, "layers": 4, "vocabulary": 32_000}
_LARGE = {"width": 896, "layers": 24, "vocabulary": 151_936}
SHAPES = {
    "tiny": [Shape({"prompts": 2, "prompt": 6, "new": 5, "width": 32, "layers": 2, "vocabulary": 101})],
    "standard": [
        *(Shape({"prompts": 8, "prompt": 64, "new": new, **_SMALL}, devices=("cpu",)) for new in (32, 64)),
        *(Shape({"prompts": 16, "prompt": 128, "new": n, **_LARGE}, "bfloat16", devices=("cuda",)) for n in (64, 256)),
    ],
}
SHAPES["headline"] = headline_shapes("train_step", SHAPES["standard"])


class Stopwatch:
    """`function`, timed without waiting for the device.

    Args:
        function: called as before.
        device: whose time counts.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.on_gpu = function, device.type == "cuda"
        self.calls: list[tuple[Any, Any]] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        began = self._now()
        result = self.function(*arguments, **options)
        self.calls.append((began, self._now()))
        return result

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Return the seconds of all calls since the last `take`; the device must have finished them."""
        calls, self.calls = self.calls, []
        return sum(1e-3 * began.elapsed_time(end) if self.on_gpu else end - began for began, end in calls)


@dataclass
class Rival:
    """A trainer whose updates are run one at a time, so that those of the rivals can alternate."""

    trainer: Any
    batch: Any
    phases: Callable[[], dict[str, float]]  # seconds of the last update
    gate: Callable[[Rival], float] | None = None  # the error of the gradient of an update
    history: dict[str, list[float]] = field(default_factory=dict)  # seconds by phase, of every update

    def __post_init__(self) -> None:
        device = self.trainer.args.device
        self.backward = Stopwatch(self.trainer.accelerator.backward, device)
        self.optimizer = Stopwatch(self.after_gradients, device)
        self.trainer.accelerator.backward = self.backward

    def update(self) -> None:
        """Run one update, as transformers' loop does around `training_step`."""
        trainer = self.trainer
        inputs, items = trainer.get_batch_samples(iter([self.batch]), 1, trainer.args.device)
        for each in inputs:
            trainer.training_step(trainer.model_wrapped, each, items)
        self.optimizer()

    def after_gradients(self) -> None:
        trainer, handler = self.trainer, self.trainer.callback_handler
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.control = handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1
        trainer.control = handler.on_step_end(trainer.args, trainer.state, trainer.control)

    # ---- called by the benchmark, from its own process ---------------------------------------------------------------

    def error(self) -> float | None:
        return None if self.gate is None else self.gate(self)

    def run(self) -> None:
        self.phases(), self.backward.take()  # of updates before: the first, the gate's
        device = self.trainer.args.device
        self.held = held_bytes(device) if device.type == "cuda" else 0
        began = time.perf_counter()
        self.update()
        synchronise(device)
        whole = time.perf_counter() - began
        for name, seconds in self.split(whole).items():
            self.history.setdefault(name, []).append(seconds)

    def split(self, whole: float) -> dict[str, float]:
        """Return the seconds of an update by phase; `other` is the rest of the `whole`."""
        seconds = {**self.phases(), "backward": self.backward.take(), "optimizer": self.optimizer.take()}
        if "loss" in seconds:  # ours times the loss with its backward pass
            seconds["loss"] -= seconds["backward"]
        return seconds | {"other": whole - sum(seconds.values())}

    def finished(self, updates: int) -> dict[str, list[float]]:
        """Return the seconds of the phases of the last updates; raise if weights are not finite."""
        wrong = [name for name, value in self.trainer.model.named_parameters() if not bool(value.isfinite().all())]
        if wrong:
            raise FloatingPointError(f"after {self.trainer.state.global_step} updates {wrong[0]} is not finite")
        return {name: seconds[-updates:] for name, seconds in self.history.items()}

    def peak(self) -> int:
        """Return the peak of the last update; on a CPU, where counting takes time, of one more."""
        device = self.trainer.args.device
        if device.type == "cuda":
            return peak_above(self.held, device)
        return peak_bytes(Action(lambda: None, lambda _: self.run()), device)


def make_model(shape: Shape, device: torch.device) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: int(value) for name, value in shape.sizes.items()}
    heads = max(1, sizes["width"] // 64)
    config = Qwen2Config(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["width"], intermediate_size=sizes["width"] * 16 // 3,
        num_hidden_layers=sizes["layers"], num_attention_heads=heads, num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=sizes["prompt"] + sizes["new"], tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(7)
    with torch.device(device):  # the CPU takes seconds to draw half a billion weights
        return Qwen2ForCausalLM(config)


def make_tokenizer(vocabulary: int) -> Any:
    """Make a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")


def make_prompts(shape: Shape) -> list[str]:
    """Make the prompts; every second one is a quarter shorter."""
    count, longest, words = (int(shape.sizes[name]) for name in ("prompts", "prompt", "vocabulary"))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, words, (count, longest), generator=generator).tolist()
    return [
        " ".join(f"w{word}" for word in (row[longest // 4 :] if index % 2 else row)) for index, row in enumerate(rows)
    ]


def options_for(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the options of both trainers."""
    return {
        "per_device_train_batch_size": int(shape.sizes["prompts"]), "learning_rate": 1e-6, "max_steps": 1,
        "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": device.type == "cpu", "bf16": shape.dtype == "bfloat16",
        "dataloader_pin_memory": False, "optim": "adamw_torch_fused", "seed": 3,
    }  # fmt: skip


def nash_rival(folder: str, shape: Shape, device: torch.device, backend: str | None) -> Rival:
    from nlhf_kernels.train import NashConfig, NashTrainer

    prompts, new = make_prompts(shape), int(shape.sizes["new"])
    args = NashConfig(
        folder, beta=BETA, tau=TAU, max_new_tokens=new, min_new_tokens=new, log_samples=0,
        backend=backend, nonfinite="stop", **options_for(shape, device),
    )  # fmt: skip
    trainer = NashTrainer(
        make_model(shape, device),
        judge=lambda texts, first, second: [0.5 + 0.3 * (-1) ** row for row in range(len(texts))],
        args=args,
        train_dataset=[{"prompt": text} for text in prompts],
        processing_class=make_tokenizer(int(shape.sizes["vocabulary"])),
    )
    trainer.train()  # one update creates optimizer state and buffers

    def phases() -> dict[str, float]:
        seconds = dict(trainer.timer.seconds)
        trainer.timer.start()
        return seconds

    return Rival(trainer, next(iter(trainer.get_train_dataloader())), phases, gradient_error)


def trl_rival(folder: str, shape: Shape, device: torch.device) -> Rival:
    model, new = make_model(shape, device), int(shape.sizes["new"])
    tokenizer = make_tokenizer(int(shape.sizes["vocabulary"]))
    trainer, seconds = trl.make_trainer(
        folder, model, copy.deepcopy(model), tokenizer, make_prompts(shape), new, BETA, TAU,
        **options_for(shape, device),
    )  # fmt: skip
    trainer.train()
    return Rival(trainer, next(iter(trainer.get_train_dataloader())), lambda: dict(seconds))


def gradient_error(rival: Rival) -> float:
    """Return an update's relative gradient error against autograd through plain log-softmax on the same responses."""
    trainer = rival.trainer
    inputs, items = trainer.get_batch_samples(iter([rival.batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model_wrapped, inputs[0], items)
    (experience,) = trainer.experiences
    parameters = dict(trainer.model.named_parameters())
    result = {name: value.grad.clone() for name, value in parameters.items()}
    trainer.model.zero_grad()
    width, counts = experience.targets.shape[1], experience.targets >= 0
    positions = (experience.attention_mask.cumsum(1) - 1).clamp(min=0)
    with trainer.accelerator.autocast(), finite_attention_gradients():
        logits = trainer.model(
            experience.input_ids, attention_mask=experience.attention_mask, position_ids=positions
        ).logits
    logprobs = logits[:, -width - 1 : -1].float().log_softmax(-1)
    target_logprobs = logprobs.gather(-1, experience.targets.clamp(min=0)[..., None])[..., 0] * counts
    ratio = (target_logprobs.detach() - experience.reference_logprobs) * counts
    price = ratio.flip(1).cumsum(1).flip(1)  # log-ratio of this token and the later ones
    weight = experience.advantage.to(price)[:, None] - TAU * price
    (-(weight * target_logprobs).sum() / experience.pairs).backward()
    wrong = sum(float((result[name] - value.grad).double().square().sum()) for name, value in parameters.items())
    right = sum(float(value.grad.double().square().sum()) for value in parameters.values())
    trainer.model.zero_grad()
    return (wrong / right) ** 0.5


MAKERS: dict[str, Callable[[str, Shape, torch.device], Rival]] = {
    OURS: partial(nash_rival, backend=None),
    TORCH: partial(nash_rival, backend="torch"),
    TRL: trl_rival,
}
RIVALS = tuple(name for name in MAKERS if name != OURS)


def start(threads: int, make: Callable[..., Rival], *arguments: Any) -> Rival:
    torch.set_num_threads(threads)
    return make(*arguments)


def run_shape(
    shape: Shape, context: RunContext, plan: TimingPlan, wanted: Sequence[str] | None = None
) -> list[ResultRow]:
    device, allowed = context.settings.device, ALLOWED_ERROR[shape.dtype]
    makers = {name: make for name, make in MAKERS.items() if name == OURS or wanted is None or name in wanted}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        entries = []
        for name, make in makers.items():
            process = Remote(start, context.threads, make, f"{folder}/{name}", shape, device)
            entries.append(Entry(name, processes.enter_context(process), ours=name != TRL))
        for entry in entries:
            entry.wait()
        for entry in entries:
            if (error := entry.ask("error")) is not None:
                entry.judge(error, allowed, f"gradient off by {error:.2g}")
        phases = _time([entry for entry in entries if entry.status == "ok"], plan)
    trl_timing = next((entry.timing for entry in entries if entry.name == TRL), None)
    rows: list[ResultRow] = []
    for entry in entries:
        rows.append(entry.row("train_step", shape, context, chosen=entry.name == OURS, rival=trl_timing))
        rows += [
            _part(shape, context, f"{entry.name}: {part}", seconds)
            for part, seconds in phases.get(entry.name, {}).items()
        ]
    return rows


def _time(entries: Sequence[Entry], plan: TimingPlan) -> dict[str, dict[str, list[float]]]:
    """Time updates, then take peaks; return the seconds of the phases of those updates, by entry."""
    actions = {entry.name: Action(lambda: None, lambda _, entry=entry: entry.process.call("run")) for entry in entries}
    plan = replace(plan, warmups=0)  # making a rival has run an update
    timings = time_calls(actions, torch.device("cpu"), plan)  # each update synchronises its own device
    phases = {}
    for entry in entries:
        entry.time(timings[entry.name])
        if entry.timing is not None:
            phases[entry.name] = entry.ask("finished", entry.timing.repeats) or {}
            entry.peak = entry.ask("peak")
    return phases


def _part(shape: Shape, context: RunContext, name: str, seconds: list[float]) -> ResultRow:
    key = RowKey("train_step", shape.label, shape.dtype, "full", name, context.settings.device.type, context.threads)
    return ResultRow(key, "part", "ok", context.facts, timing=summarise([1e6 * each for each in seconds], 0))


def print_phases(shape: Shape, rows: Sequence[ResultRow], console: Console) -> None:
    console.print(shape.label, highlight=False)
    times = {row.key.implementation: row.timing.median_us / 1e6 for row in rows if row.timing is not None}
    for name in (OURS, TORCH, TRL):
        if name in times:
            parts = {key.partition(": ")[2]: value for key, value in times.items() if key.startswith(f"{name}: ")}
            shares = ", ".join(f"{part} {100 * value / times[name]:.0f}%" for part, value in parts.items())
            ratio = f"{times[TRL] / times[name]:5.1f}x TRL  " if TRL in times else ""
            console.print(f"  {name:<32} {times[name]:8.3f} s an update  {ratio}{shares}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser("train_step", __doc__).parse_args(argv)
    check_rivals("train_step", arguments.rival, RIVALS)
    rows = run_rounds("train_step", arguments, SHAPES, partial(run_shape, wanted=arguments.rival), print_phases)
    return 0 if all(row.status in ("ok", "unavailable") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
