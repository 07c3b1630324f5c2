"""Repeatedly kill -9 one or all processes of a sharded run that saves after every update: between two checkpoints,
while one is written, and while the run starts.

    python -m tests.support.sharded_kills FOLDER 40

FOLDER holds a run file, run.yaml, and the files it names. Every launch resumes from the previous one's checkpoints.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nlhf_kernels.core import atomic, manifest

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("between", "writing", "starting")
CHANGES = ("max_steps=400", "num_train_epochs=500", "logging_steps=500", "save_strategy=steps", "save_steps=1")


def kill(root: Path, count: int, seed: int = 0, *changes: str, seconds: float = math.inf) -> list[int]:
    """Kill launches of two processes; return the newest saved update of each. Raise if a checkpoint is damaged, an
    update is lost, or a launcher continues.

    Args:
        root: folder of the run file.
        count: number of launches: in every six, each phase is met twice, once with all processes killed, once with one.
        seed: seed of the random moments.
        changes: changes of the run file's `training`, in addition to those that make it save.
        seconds: time after which no launch begins, once there were two.
    """
    draw, updates = random.Random(seed), [0]
    output, begun = root / "killed", time.monotonic()
    for number in range(count):
        if number >= 2 and time.monotonic() - begun > seconds:
            break
        launcher, phase = _launch(root, output, changes, resume=updates[-1] > 0), PHASES[number % len(PHASES)]
        _wait_for(phase, launcher, output, updates[-1], draw)
        assert launcher.poll() is None, "the run goes on until it is killed"
        children = _children(launcher)
        victims = children if number % 2 else [draw.choice(children)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert launcher.wait(60) != 0, "the launcher ends, and says that its run has not"
        updates.append(_newest(output))
        assert updates[-1] >= updates[-2] + (phase != "starting"), "nothing is lost, and the run goes on"
        for folder in output.glob("checkpoint-*"):
            manifest.verify(folder)
    return updates[1:]


def _wait_for(phase: str, launcher: subprocess.Popen, output: Path, saved: int, draw: random.Random) -> None:
    """Wait for a random moment of a phase, 120 seconds at most."""
    end = time.monotonic() + 120

    def until(reached: Callable[[], object]) -> None:
        while launcher.poll() is None and time.monotonic() < end and not reached():
            time.sleep(0.002)

    until(lambda: len(_children(launcher)) == 2)
    if phase == "starting":
        time.sleep(draw.uniform(0, 5))
        return
    until(lambda: _newest(output) > saved)
    if phase == "writing":
        until(lambda: any(output.glob(f".*{atomic.UNFINISHED}")))
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.random())


def _children(launcher: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


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
