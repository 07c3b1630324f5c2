"""Callbacks around the optimizer step, and the progress bar."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from transformers import ProgressCallback, TrainerCallback


class OptimizerHooks(TrainerCallback):
    """Call the trainer before and after the optimizer step, and after a checkpoint."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.timer.start()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.before_optimizer()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.after_optimizer_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.after_optimizer()
        self.trainer.stop_if_requested(control)

    def on_save(self, *_: Any, **__: Any) -> None:
        self.trainer.stop_once_saved()


class Progress(ProgressCallback):
    """transformers' progress bar with the speed; logs are printed in lines as wide as the terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is None or not logs:  # not training, or not the first process
            return
        values = {name: value for name, value in logs.items() if name != "total_flos"}
        width = shutil.get_terminal_size().columns
        self.training_bar.write(log_lines({"update": state.global_step, **values}, width), file=sys.stderr)
        if "tokens_per_second" in logs:
            self.training_bar.set_postfix_str(speed_line(logs))


def close_bars(callbacks: Iterable[Any]) -> None:
    """Close the bars of a training that ended with an exception; an open one would be drawn again below the error."""
    for callback in callbacks:
        if isinstance(callback, Progress) and callback.training_bar is not None:
            callback.training_bar.close()
            callback.training_bar = None


def log_lines(logs: dict[str, Any], width: int) -> str:
    """Return names and numbers side by side, without breaking a line inside a pair."""
    lines = [""]
    for name, value in logs.items():
        pair = f"  {name} {f'{value:.4g}' if isinstance(value, float) else value}"
        if lines[-1] and len(lines[-1]) + len(pair) > width:
            lines.append("")
        lines[-1] += pair
    return "\n".join(lines)


def speed_line(logs: dict[str, float]) -> str:
    """Return a text short enough for 80 columns with the bar; the log has the shares of all phases."""
    return f"{logs['tokens_per_second']:.0f} tokens/s, {100 * logs['time/rollout']:.0f}% rollout"
