"""A small training run in a separate process, which a test can kill or launch several times.

    python -m tests.support.train_run FOLDER '{"max_steps": 4, "die_while_saving": true, ...}'

Writes FOLDER/result.json: the log of every update and a checksum of the trained weights; and per process
FOLDER/process-N.json: checksums of policy, opponent and reference before the first update and after the last.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGGED = ("loss", "grad_norm", "kl", "preference", "length", "beta", "learning_rate")


def main(folder: str, options: dict[str, Any]) -> None:
    from nlhf_kernels.core.processes import leave_process_group

    train(folder, options)
    leave_process_group()
    remaining = [name for name in thread_names() if name.startswith("pt_gloo")]
    assert not remaining, f"these threads abort the process if they run while the interpreter shuts down: {remaining}"


def train(folder: str, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    from tests.support.tiny_models import tiny_model
    from tests.support.training import lora, make_trainer

    if options.pop("die_while_saving", False):
        _die_while_saving()
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(1000 + rank)  # seeds differ between processes, as a user's may
    if options.pop("models_differ", False):
        options["model"] = tiny_model("llama", seed=rank)
    if (adapters := options.pop("lora", None)) is not None:
        options["peft_config"] = lora(**adapters)
    trainer = make_trainer(folder, **options)
    before = players(trainer)
    trainer.train()
    Path(folder, f"process-{rank}.json").write_text(json.dumps([before, players(trainer)]))
    if trainer.is_world_process_zero():
        (Path(folder) / "result.json").write_text(json.dumps(outcome(trainer)))


def thread_names() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread may have ended
            names.append((task / "comm").read_text().strip())
    return names


def outcome(trainer: Any) -> dict[str, Any]:
    from tests.support.training import history

    weights = {name: value.detach().double() for name, value in trainer.model.named_parameters()}
    return {
        "history": history(trainer, *LOGGED),
        "weights": {name: [float(value.sum()), float(value.square().sum())] for name, value in weights.items()},
        "evaluations": [entry for entry in trainer.state.log_history if "eval_kl" in entry],
        "batch": len(trainer.experiences[0].prompts),
    }


def players(trainer: Any) -> dict[str, str]:
    """Return a checksum of every tensor of the policy, the opponent's state and the reference."""
    tensors = {f"policy/{name}": value for name, value in trainer.rollout_policy.model.named_parameters()}
    if trainer.opponent is not None:
        tensors |= {f"opponent/{name}": value for name, value in trainer.opponent.state().items()}
        tensors |= {f"played/{name}": value for name, value in trainer.opponent.rollout_weights.items()}
    if trainer.policy_loss.reference is not None:
        tensors |= {f"reference/{name}": value for name, value in trainer.policy_loss.reference.named_parameters()}
    return {name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def _die_while_saving() -> None:
    """End the process, as kill -9 does, in the second checkpoint after its weights are written."""
    from nlhf_kernels.train import NashTrainer

    saved, whole = [0], NashTrainer._save_optimizer_and_scheduler

    def save(self: Any, folder: str) -> None:
        saved[0] += 1
        if saved[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, folder)

    NashTrainer._save_optimizer_and_scheduler = save


def start(folder: Path, processes: int = 1, **options: Any) -> subprocess.CompletedProcess:
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, "-m", "tests.support.train_run", str(folder), json.dumps(options)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
