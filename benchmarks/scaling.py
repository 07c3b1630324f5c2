"""Time a training update on 1, 2, 4, ... processes in every layout: data parallel, FSDP2, tensor parallel, both.

This measures strong scaling: all layouts train on the same prompts, so the loss of their first update must equal that
of one process. The speed-up is over one process; the efficiency is the speed-up over the number of processes. On GPUs
each process has its own. On a CPU the processes share cores and gloo copies through memory, so that times only serve
as a smoke test of the layouts.

Every layout is a separate launch; a launch that fails affects its own row alone, which holds the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.harness.case import Shape
from benchmarks.harness.machine import ROOT, without_paths
from benchmarks.harness.memory import METHODS
from benchmarks.harness.results import Accuracy, Memory, ResultRow, RowKey, Speedup, finite_or_none
from benchmarks.harness.rounds import build_parser, run_rounds
from benchmarks.harness.runner import RunContext
from benchmarks.harness.timing import Timing, TimingPlan, summarise, synchronise
from benchmarks.train_step import BETA, TAU, make_prompts, make_tokenizer

ALONE = "one process"
ALLOWED_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}  # of the first update's loss and gradient norm
TIMEOUT_S = 900.0  # of a launch
_WIDE = {"width": 896, "layers": 24, "vocabulary": 151_936}
SHAPES = {
    "tiny": [Shape({"prompts": 4, "prompt": 6, "new": 4, "width": 64, "layers": 2, "vocabulary": 128})],
    "standard": [
        Shape(
            {"prompts": 8, "prompt": 64, "new": 32, "width": 256, "layers": 4, "vocabulary": 32_000}, devices=("cpu",)
        ),
        Shape({"prompts": 64, "prompt": 128, "new": 128, **_WIDE}, "bfloat16", devices=("cuda",)),
    ],
}


class Layout(NamedTuple):
    """Tensor parallel by FSDP2 by replicas; several replicas alone are data parallel."""

    tp_size: int = 1
    fsdp_size: int = 1
    dp_replicate_size: int = 1

    @property
    def processes(self) -> int:
        return self.tp_size * self.fsdp_size * self.dp_replicate_size

    @property
    def groups(self) -> int:
        """Return the number of data-parallel groups, which read different prompts."""
        return self.fsdp_size * self.dp_replicate_size

    def __str__(self) -> str:
        sizes = {"tp": self.tp_size, "fsdp": self.fsdp_size, "ddp": self.dp_replicate_size}
        return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or ALONE


def layouts_of(processes: int) -> list[Layout]:
    """Return the layouts of a number of processes: each kind alone, and tensor parallelism of 2 with FSDP2."""
    if processes == 1:
        return [Layout()]
    layouts = [Layout(dp_replicate_size=processes), Layout(fsdp_size=processes), Layout(tp_size=processes)]
    return layouts if processes < 4 else [*layouts, Layout(tp_size=2, fsdp_size=processes // 2)]


# ---- in the processes of a layout ------------------------------------------------------------------------------------


def save_model(shape: Shape, folder: Path) -> None:
    """Save a model whose heads and vocabulary divide by up to 8 processes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: int(value) for name, value in shape.sizes.items()}
    heads = 8 if sizes["width"] % 64 else max(8, sizes["width"] // 64)
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["width"], intermediate_size=sizes["width"] * 4,
        num_hidden_layers=sizes["layers"], num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=sizes["prompt"] + sizes["new"], tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def work(folder: str, job: str) -> None:
    """Run a few updates and write their seconds, the first one's loss and the peak memory to FOLDER/result.json."""
    from transformers import AutoModelForCausalLM, TrainerCallback

    from nlhf_kernels.core.processes import leave_process_group
    from nlhf_kernels.core.upstream import distributed_config_class
    from nlhf_kernels.train import NashConfig, NashTrainer

    facts = json.loads(job)
    shape = Shape(facts["sizes"], facts["dtype"])
    layout, device = Layout(*facts["layout"]), torch.device(facts["device"])
    torch.set_num_threads(facts["threads"])
    split = layout.tp_size > 1 or layout.fsdp_size > 1
    sizes = {name: size for name, size in layout._asdict().items() if size > 1} if split else {}
    loading = {"distributed_config": distributed_config_class()(**sizes)} if split else {}
    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise(device)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise(device)
            seconds.append(time.perf_counter() - self.start)

    new, prompts = int(shape.sizes["new"]), make_prompts(shape)
    args = NashConfig(
        f"{folder}/run", beta=BETA, tau=TAU, max_new_tokens=new, min_new_tokens=new, log_samples=0,
        per_device_train_batch_size=len(prompts) // layout.groups, learning_rate=1e-6, max_steps=facts["updates"],
        num_train_epochs=facts["updates"], lr_scheduler_type="constant", report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=device.type == "cpu", bf16=shape.dtype == "bfloat16",
        dataloader_pin_memory=False, seed=3, nonfinite="stop", **sizes,
        **({"ddp_backend": "gloo"} if device.type == "cpu" and layout.processes > 1 else {}),
    )  # fmt: skip
    trainer = NashTrainer(
        AutoModelForCausalLM.from_pretrained(f"{folder}/model", **loading),
        reference_model=AutoModelForCausalLM.from_pretrained(f"{folder}/model", **loading),
        judge=lambda texts, first, second: [0.5 + 0.3 * (-1) ** len(text) for text in texts],
        args=args,
        train_dataset=[{"prompt": text} for text in prompts],
        processing_class=make_tokenizer(int(shape.sizes["vocabulary"])),
        callbacks=[Timer()],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        result = {"seconds": seconds, "first": [first["loss"], first["grad_norm"]], "peak": peak}
        Path(folder, "result.json").write_text(json.dumps(result))
    del trainer
    leave_process_group()


# ---- the benchmark ---------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The result of a launch, or the reason why there is none."""

    timing: Timing | None = None
    first: Sequence[float] = ()  # loss and gradient norm of the first update
    peak: int | None = None
    reason: str = ""


def launch(layout: Layout, shape: Shape, context: RunContext, updates: int, folder: Path) -> Outcome:
    """Train in a layout. The first update, which allocates buffers, is not timed."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    device = context.settings.device.type
    threads = max(1, context.threads // layout.processes) if device == "cpu" else context.threads
    job = {"sizes": dict(shape.sizes), "dtype": shape.dtype, "layout": layout, "device": device, "updates": updates + 1,
           "threads": threads}  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.processes}"]
    command = [sys.executable, *(launcher if layout.processes > 1 else ()), "-m", "benchmarks.scaling", "--worker",
               str(folder), json.dumps(job)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(reason=f"no end after {TIMEOUT_S:.0f} s")
    if process.returncode or not result.exists():
        lines = [line.strip() for line in process.stderr.splitlines() if "Error" in line] or ["no message"]
        return Outcome(reason=without_paths(f"exit code {process.returncode}: {lines[0]}")[:300])
    facts = json.loads(result.read_text())
    timing = summarise([1e6 * each for each in facts["seconds"][1:]], 0)
    return Outcome(timing, facts["first"], facts["peak"])


def run_shape(shape: Shape, context: RunContext, plan: TimingPlan, processes: Sequence[int]) -> list[ResultRow]:
    updates = max(2, plan.min_repeats)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(shape, folder / "model")
        layouts = dict.fromkeys(layout for count in (1, *processes) for layout in layouts_of(count))
        outcomes = {layout: launch(layout, shape, context, updates, folder) for layout in layouts}
    alone = outcomes[Layout()]
    return [_row(layout, outcome, alone, shape, context) for layout, outcome in outcomes.items()]


def _row(layout: Layout, outcome: Outcome, alone: Outcome, shape: Shape, context: RunContext) -> ResultRow:
    device = context.settings.device.type
    status, reasons, timing = "ok", (), outcome.timing
    accuracy = speedup = memory = None
    if timing is None:
        status, reasons = "failed", (outcome.reason,)
    elif alone.timing is not None:
        pairs = zip(outcome.first, alone.first, strict=True)
        accuracy = Accuracy(
            finite_or_none(max(abs(ours - expected) / abs(expected) for ours, expected in pairs)),
            ALLOWED_ERROR[shape.dtype],
        )
        if accuracy.error is None or not accuracy.error <= accuracy.allowed:
            status, reasons, timing = "red", (f"loss and gradient norm {outcome.first}, alone {alone.first}",), None
    if timing is not None:
        speedup = Speedup(alone.timing.median_us / timing.median_us if alone.timing is not None else None, None)
        memory = Memory(outcome.peak, METHODS[device]) if outcome.peak is not None else None
    return ResultRow(
        key=RowKey("scaling", shape.label, shape.dtype, "full", str(layout), device, context.threads),
        kind="baseline" if layout == Layout() else "backend",
        status=status, run=context.facts, reasons=reasons, accuracy=accuracy, timing=timing, memory=memory,
        speedup=speedup,
    )  # fmt: skip


def print_efficiency(shape: Shape, rows: Sequence[ResultRow], console: Console) -> None:
    console.print(shape.label, highlight=False)
    for row in rows:
        if row.timing is None or row.speedup is None:
            console.print(f"  {row.key.implementation:<16} {row.status}: {'; '.join(row.reasons)}", highlight=False)
            continue
        ratio = row.speedup.eager
        processes = _processes(row.key.implementation)
        efficiency = f"{ratio:6.2f}x, {100 * ratio / processes:4.0f} % of {processes}" if ratio is not None else ""
        console.print(
            f"  {row.key.implementation:<16} {row.timing.median_us / 1e6:8.3f} s an update {efficiency}",
            highlight=False,
        )


def _processes(name: str) -> int:
    count = 1
    for part in name.split():
        count *= int(part.partition("=")[2] or 1) if "=" in part else 1
    return count


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--worker"]:
        work(*argv[1:])
        return 0
    parser = build_parser("scaling", __doc__)
    parser.add_argument("--processes", type=int, nargs="+", metavar="N", help="default: 2, and 4 or all GPUs")
    arguments = parser.parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    most = torch.cuda.device_count() if device == "cuda" else 4
    processes = arguments.processes or [count for count in (2, 4, 8) if count <= most]
    if wrong := [count for count in processes if count not in (1, 2, 4, 8) or (device == "cuda" and count > most)]:
        parser.error(f"--processes: expected 1, 2, 4 or 8, and at most {most} GPUs; got {wrong[0]}")
    rows = run_rounds("scaling", arguments, SHAPES, partial(run_shape, processes=processes), print_efficiency)
    return 0 if all(row.status in ("ok", "unavailable") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
