"""Stages of a run with a time limit: each gets a share of the remaining time, each command its own process.

Time that a stage does not use goes to the stages after it, and so does the time of a stage whose share is too short to
finish a command. A command that exceeds its time is ended together with every process it started; what it has written
by then stays.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .machine import ROOT, without_paths

GRACE_S = 5.0  # from SIGTERM to SIGKILL
MAX_REASON = 160


@dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the remaining time, relative to the shares of the later stages
    commands: tuple[tuple[str, ...], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot run here; empty: it can
    least: float = 0.0  # seconds below which a command is not started, and which the commands before it leave to it


@dataclass(frozen=True)
class Outcome:
    status: str  # ok, failed, unavailable; done: an earlier run did it
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.status} {self.seconds:.0f} s{': ' if self.reasons else ''}{'; '.join(self.reasons)}"


def run_stages(
    stages: Sequence[Stage],
    seconds: float,
    log: Path,
    finished: Mapping[str, Outcome],
    tell: Callable[[Stage, Outcome], None],
) -> dict[str, Outcome]:
    """Run the stages in order, without those in `finished`. `tell` is called after each, so that an interrupted run
    keeps its outcomes."""
    deadline = time.monotonic() + seconds
    outcomes = {}
    with log.open("ab") as file:
        for index, stage in enumerate(stages):
            if stage.name in finished:
                outcome = Outcome("done", finished[stage.name].seconds)
            elif stage.missing:
                outcome = Outcome("unavailable", 0.0, (stage.missing,))
            else:
                remaining = [each for each in stages[index:] if each.name not in finished and not each.missing]
                seconds_left = deadline - time.monotonic()
                outcome = run_stage(stage, seconds_left * stage.share / sum(each.share for each in remaining), file)
            outcomes[stage.name] = outcome
            tell(stage, outcome)
    return outcomes


def run_stage(stage: Stage, seconds: float, log: IO[bytes]) -> Outcome:
    """Run the stage's commands in turn; a failure does not skip those after it."""
    start, reasons = time.monotonic(), []
    for index, command in enumerate(stage.commands):
        left = seconds - (time.monotonic() - start)
        if stage.least > 0 and left < stage.least:
            reason = f"expected at least {stage.least:.0f} s; {max(left, 0.0):.0f} s were left"
        else:
            later = stage.least * (len(stage.commands) - index - 1)
            reason = run_command(command, max(left - later, stage.least), stage.environment, log)
        if reason:
            number = f" ({index + 1} of {len(stage.commands)})" if len(stage.commands) > 1 else ""
            reasons.append(without_paths(f"{program(command)}{number}: {reason}")[:MAX_REASON])
    return Outcome("failed" if reasons else "ok", time.monotonic() - start, tuple(reasons))


def program(command: Sequence[str]) -> str:
    """Return the name of the module that Python runs, or of the program."""
    return command[2] if command[1:2] == ("-m",) else Path(command[0]).name


def run_command(command: Sequence[str], seconds: float, environment: Mapping[str, str], log: IO[bytes]) -> str:
    """Run a command, its output to the log. Return why it failed, empty if it did not."""
    if seconds <= 0:
        return "no time left"
    log.write(f"\n== {' '.join(command)} ({seconds:.0f} s)\n".encode())
    log.flush()
    begin = log.tell()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            start_new_session=True,  # its own process group, workers included, so that it can be ended
        )  # fmt: skip
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s, its share of the time"
    finally:
        end(process)
    return "" if code == 0 else f"exit code {code}: {last_line(Path(log.name), begin)}"


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except (ProcessLookupError, PermissionError):
            break  # no process of the group is left
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def last_line(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")
