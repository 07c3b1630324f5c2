"""The trainer's ears in its own loop, and its progress bar."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback

from .meters import PHASES


class Updates(TrainerCallback):
    """Before the optimizer looks at gradients, and after it has moved the weights."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.clock.start()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.before_optimizer()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.after_optimizer()


class Progress(ProgressCallback):
    """transformers' bar, with the speed and where the time goes beside it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
        super().on_log(args, state, control, logs=logs, **options)  # type: ignore[no-untyped-call]
        if self.training_bar is not None and logs and "tokens_per_second" in logs:
            self.training_bar.set_postfix_str(speed_line(logs))


def speed_line(logs: dict[str, float]) -> str:
    shares = (f"{name} {100 * logs[f'time/{name}']:.0f}%" for name in PHASES)
    return f"{logs['tokens_per_second']:.0f} tokens/s, " + ", ".join(shares)
