"""Runs killed by SIGKILL at random moments and restarted end with the bits of an uninterrupted run.

A few kills by default; `pytest tests/test_kills.py --kills 100` for more and for the slow experiment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.core.identity import weights_digest
from nlhf_kernels.core.terminal import SILENT
from nlhf_kernels.experiment.corpus import Material
from nlhf_kernels.experiment.pipeline import Experiment
from nlhf_kernels.experiment.presets import PRESETS
from nlhf_kernels.preference import PreferenceTraining, train_preference_model
from nlhf_kernels.train.checkpoints import list_checkpoints
from tests.support.experiment import fake_packages
from tests.support.preference import comparison_model, shorter_wins
from tests.support.training import history, make_trainer, single_thread  # noqa: F401

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-2}
MANY = 10  # minimum `--kills` for the slow experiment


def training(folder: Path) -> object:
    trainer = make_trainer(folder / "run", algorithm="nash-ema", ema_decay=0.5, **RUN)
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(folder / "run")))
    assert len(list_checkpoints(folder / "run")) == 2 and not list((folder / "run").glob("*.nlhf-*"))
    weights = [weights_digest(each) for each in (trainer.model.named_parameters(), trainer.opponent.state().items())]
    return [*weights, history(trainer, "loss", "kl", "preference", "learning_rate")]


def preference(folder: Path) -> object:
    model = comparison_model(architecture="gpt2")
    settings = PreferenceTraining(steps=30, batch_size=4, learning_rate=1e-3, seed=3)
    report = train_preference_model(
        model, shorter_wins(10), settings, progress=False, checkpoint=folder / "run", checkpoint_every=3
    )
    assert [path.name for path in folder.iterdir() if path.name != "result"] in (["run"], [".run.nlhf-lock", "run"])
    return [weights_digest(model.named_parameters()), report.losses]


def experiment(folder: Path) -> object:
    packages = folder.parent / "packages"
    if not packages.exists():
        fake_packages(packages)
    made = Experiment(folder / "run", PRESETS["tiny"], Material(), torch.device("cpu"), SILENT, folders=[packages])
    results = made.run()
    return [results[name] for name in ("sft", "preference_model", "reward_model", "cycles", "tournament")]


def forked(run: Callable[[Path], object], folder: Path, seconds: float | None = None) -> bool:
    """Call `run` in a process killed after `seconds`; return whether it finished."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            found = run(folder)
            (folder / "result").write_text(json.dumps(found))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL), "it failed by itself"
    return code == 0


@pytest.mark.parametrize("run", [training, preference, experiment])
def test_killed_again_and_again(run, tmp_path, request) -> None:
    kills = request.config.getoption("--kills")
    if run is experiment and kills < MANY:
        pytest.skip(f"slow: --kills {MANY} or more")
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    began = time.monotonic()
    assert forked(run, tmp_path / "straight")
    whole, drawn = time.monotonic() - began, random.Random(kills)
    for _ in range(kills):
        if forked(run, tmp_path / "killed", drawn.uniform(0, whole if run is not experiment else whole / 3)):
            break
    assert forked(run, tmp_path / "killed")
    first, last = ((tmp_path / name / "result").read_text() for name in ("straight", "killed"))
    assert json.loads(last) == json.loads(first)
