"""Small training runs, each with its own layout, in one launch of several processes, since starting takes longest.

    torchrun --nproc-per-node 2 -m tests.support.sharded_runs FOLDER '{"tp": {"tp_size": 2, ...}, ...}'

A run consists of its layout and the options of `make_trainer`. Its log and sums of its weights go to FOLDER/NAME.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGGED = ("loss", "grad_norm", "kl", "preference", "length", "entropy")
SIZES = ("tp_size", "fsdp_size", "dp_replicate_size")


def start(folder: Path, processes: int, runs: Mapping[str, Mapping[str, Any]], timeout: int = 600) -> Any:
    """Launch the runs and return the completed launcher."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, "-m", "tests.support.sharded_runs", str(folder), json.dumps(runs)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def outcome(trainer: Any) -> dict[str, Any]:
    """Return a run's log, and the sum and sum of squares of every weight. All processes must call it."""
    from nlhf_kernels.train.sharded import reshard, whole
    from tests.support.training import history

    reshard(trainer.model)
    weights = {name: whole(value.detach()).double() for name, value in trainer.model.named_parameters()}
    return {
        "history": history(trainer, *LOGGED),
        "weights": {name: [float(value.sum()), float(value.square().sum())] for name, value in weights.items()},
        "evaluations": [entry for entry in trainer.state.log_history if "eval_kl" in entry],
    }


def load(path: str, sizes: Mapping[str, int]) -> Any:
    """Load the model in a folder, sharded if a size is above 1."""
    from transformers import AutoModelForCausalLM

    from nlhf_kernels.core.upstream import distributed_config_class

    split = {"distributed_config": distributed_config_class()(**sizes)} if sizes else {}
    return AutoModelForCausalLM.from_pretrained(path, **split)


@contextmanager
def accelerate_fsdp(settings: Mapping[str, str] | None) -> Iterator[None]:
    """Do as `accelerate launch --use_fsdp` does, with the plugin on a CPU too, where accelerate would leave it out.

    Args:
        settings: of the plugin, by the names of its environment variables; None: without it.
    """
    if settings is None:
        yield
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    initialise, kind = AcceleratorState.__init__, PartialState._shared_state.get("distributed_type")

    def with_plugin(self: Any, *args: Any, **options: Any) -> None:
        initialise(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            self.fsdp_plugin, self.distributed_type = options["fsdp_plugin"], DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    before = dict(os.environ)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", **settings}
    AcceleratorState.__init__ = with_plugin
    try:
        yield
    finally:
        AcceleratorState.__init__ = initialise
        AcceleratorState._reset_state()
        if PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = kind or DistributedType.MULTI_CPU
        os.environ.clear()
        os.environ |= before


def train(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """Train one run; models are folders. Every call of the judge adds a line to FOLDER/NAME-RANK.calls."""
    from tests.support.training import likes_e, lora, make_trainer

    rank = int(os.environ["RANK"])
    sizes = {size: options[size] for size in SIZES if size in options}
    for role in ("model", "reference_model", "eval_opponent"):
        if role in options:
            options[role] = load(options[role], sizes)
    if (adapters := options.pop("lora", None)) is not None:
        options["peft_config"] = lora(**adapters)
    resume = options.pop("resume", False)

    def judge(prompts: Any, first: Any, second: Any) -> list[float]:
        with (folder / f"{name}-{rank}.calls").open("a") as file:
            file.write(f"{len(prompts)}\n")
        return likes_e(prompts, first, second)

    trainer = make_trainer(options.pop("output", folder / name), judge=judge, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: str, runs: dict[str, dict[str, Any]]) -> None:
    import torch
    from accelerate.state import AcceleratorState

    from nlhf_kernels.core.processes import leave_process_group

    torch.set_num_threads(1)
    failed = False
    for name, options in runs.items():
        try:
            saves = options.pop("saves", False)
            with accelerate_fsdp(options.pop("plugin", None)):
                trainer = train(Path(folder), name, options)
                result = outcome(trainer)
                if saves:
                    trainer.save_model(str(Path(folder) / f"{name}-saved"))
            if trainer.is_world_process_zero():
                (Path(folder) / f"{name}.json").write_text(json.dumps(result))
            del trainer
        except Exception:
            failed = True
            (Path(folder) / f"{name}-{os.environ['RANK']}.error").write_text(traceback.format_exc())
        AcceleratorState._reset_state()
    leave_process_group()
    sys.exit(int(failed))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
