"""Repeatedly kill -9, at random moments, one or all processes of a sharded run that saves after every update.

    python -m tests.support.sharded_kills FOLDER 40

FOLDER holds a run file, run.yaml, and the files it names. Every launch resumes from the previous one's checkpoints.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from nlhf_kernels.core import manifest

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("max_steps=400", "num_train_epochs=500", "logging_steps=500", "save_strategy=steps", "save_steps=1")


def kill(root: Path, count: int, seed: int = 0, *changes: str) -> list[int]:
    """Kill `count` launches of two processes; return the newest saved update of each. Raise if a checkpoint is damaged,
    an update is lost, or a launcher continues.

    Args:
        root: folder of the run file.
        count: number of launches; every second one loses all its processes, the others one.
        seed: seed of the random moments.
        changes: changes of the run file's `training`, in addition to those that make it save.
    """
    draw, updates = random.Random(seed), [0]
    output = root / "killed"
    for number in range(count):
        launcher = _launch(root, output, changes, resume=updates[-1] > 0)
        end = time.monotonic() + 120
        while launcher.poll() is None and _newest(output) <= updates[-1] and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(draw.random())
        assert launcher.poll() is None, "the run goes on until it is killed"
        children = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        victims = children if number % 2 else [draw.choice(children)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert launcher.wait(60) != 0, "the launcher ends, and says that its run has not"
        updates.append(_newest(output))
        assert updates[-1] > updates[-2], "nothing is lost, and the run goes on"
        for folder in output.glob("checkpoint-*"):
            manifest.verify(folder)
    return updates[1:]


def _launch(root: Path, output: Path, changes: tuple[str, ...], resume: bool) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nlhf_kernels", "train"]
    settings = [*CHANGES, *changes, "save_total_limit=3", f"output_dir={output}"]
    options = [word for setting in settings for word in ("--set", f"training.{setting}")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *launch, "--config", "run.yaml", *options, *(["--resume"] if resume else [])]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=root, env=environment, stdout=nothing, stderr=nothing)


def _newest(output: Path) -> int:
    numbers = [path.name.partition("-")[2] for path in output.glob("checkpoint-*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


if __name__ == "__main__":
    print(kill(Path(sys.argv[1]).resolve(), int(sys.argv[2]), 0, "fsdp_size=2", "tp_size=1"))
