"""transformers' Trainer, whose checkpoints are complete or absent, alone in its folder, resumed where it was.

What `NashTrainer` adds to the loop is in `trainer.py`; how a checkpoint is published, found and checked, in
`checkpoints.py`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from ..core import atomic, stopping
from ..core.loading import check_finite, quiet
from ..core.lock import lock_folder
from . import checkpoints, opponents
from .callbacks import close_bars
from .identity import Identity, identity_of
from .setup import OP

_log = logging.getLogger(__name__)
_Trainer: Any = Trainer  # its annotations contradict what subclasses are meant to do


class ResumableTrainer(_Trainer):  # type: ignore[misc]
    skipped_updates: int  # updates whose gradients were not finite
    opponent: opponents.Opponent | None
    identity: Identity | None = None  # as of the start; None where nothing is saved or resumed
    _stopping = False  # SIGTERM came, and this update is the last
    _work: str | None = None  # the folder in output_dir that a checkpoint is being written into

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if self.train_dataset is None:
            raise ValueError(f"{OP}: train: expected a train_dataset; got none")
        with stopping.stoppable():
            with stopping.deferred():
                done = self._train(resume, options)
            stopping.stop_if_requested()  # after the last update: not finished, where a policy is still to be saved
        return done

    def _train(self, resume: str | bool | None, options: dict[str, Any]) -> Any:
        output = Path(self.args.output_dir)
        with ExitStack() as held:
            found: str | None = self._on_first_process(lambda: self._enter(output, resume, held))
            self._identify(resume)  # on processes that save beside the first
            self.skipped_updates = 0 if found is None else checkpoints.skipped_updates(found)
            if found is not None and self.opponent is not None:
                opponents.load_opponent(self.opponent, Path(found) / checkpoints.OPPONENT)
            if found is not None and 0 < self.args.max_steps <= checkpoints.update_of(found):
                return self._as_it_ended(found)
            try:
                return super().train(resume_from_checkpoint=found, **options)
            finally:
                close_bars(self.callback_handler.callbacks)

    def _enter(self, output: Path, resume: str | bool | None, held: ExitStack) -> str | None:
        """Hold the folder, and the checkpoint to go on from."""
        output.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock_folder(output))
        atomic.remove_leftovers(output)
        self._identify(resume)
        changes = self.args.resume_changes or ()
        return checkpoints.resolve(output, resume, self.args.overwrite_output_dir, self.identity or {}, changes)

    def _identify(self, resume: str | bool | None) -> None:
        """Once, before weights are changed."""
        if self.identity is None and self.args.should_save and (resume or self._saves):
            self.identity = identity_of(self)

    @property
    def _saves(self) -> bool:
        return str(self.args.save_strategy.value) != "no"

    def _on_first_process(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on the first process, on all of them; so does an error end all of them."""
        if self.args.world_size == 1:
            return act()
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [None, None]
        raised: Exception | None = None
        if self.is_world_process_zero():
            try:
                said[0] = act()
            except Exception as error:
                raised, said[1] = error, f"{type(error).__name__}: {error}"
        broadcast_object_list(said)
        if raised is not None:
            raise raised
        if said[1] is not None:
            raise RuntimeError(f"{OP}: the first process ended: {said[1]}")
        return said[0]

    def _as_it_ended(self, found: str) -> TrainOutput:
        """transformers would make one update more."""
        self._load_from_checkpoint(found)
        self.state = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
        _log.warning("%s: %s is the run's end, after %d updates", OP, found, self.state.global_step)
        return TrainOutput(self.state.global_step, 0.0, {})

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work that changes no weights: where it fails, or SIGTERM ends it, the updates before it are saved first.

        Several processes cannot leave it one by one: they stop together at the end of an update.
        """
        if self.args.world_size > 1:
            yield
            return
        try:
            with stopping.abandonable():
                yield
        except (Exception, stopping.Stopped):
            if self.is_in_train:
                self._keep_what_was_learned()
            raise

    def stop_if_requested(self, control: Any) -> None:
        """At the end of an update: SIGTERM has it saved, and then ends the training. An evaluation that is due is not
        made."""
        self._stopping = stopping.requested()
        if self.args.world_size > 1:
            asked = torch.full((), float(self._stopping), dtype=torch.float32, device=self.args.device)
            self._stopping = bool(self.accelerator.reduce(asked, reduction="sum") > 0)
        if self._stopping:
            control.should_evaluate, control.should_save = False, self._saves
            if not self._saves:
                raise stopping.Stopped

    def stop_once_saved(self) -> None:
        if self._stopping:
            _log.warning("%s: stopped by SIGTERM after %d updates, which are saved", OP, self.state.global_step)
            raise stopping.Stopped

    def _keep_what_was_learned(self) -> None:
        """A judge that fails late costs no update. Several processes fail one by one: what they have is not saved."""
        step = self.state.global_step
        if self._saves and step and self.args.world_size == 1:
            if not (Path(self.args.output_dir) / f"checkpoint-{step}").exists():
                self._save_checkpoint(self.model, None)
            _log.warning("%s: %d updates are safe in checkpoint-%d", OP, step, step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        check_finite(f"{OP}: update {self.state.global_step}: the model is not saved", self.model)
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        place: str = super()._get_output_dir(trial)
        return place if self._work is None else f"{place}/{self._work}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        work = self._on_first_process(lambda: checkpoints.work_folder(output))
        try:
            with atomic.explaining(output / name):
                self._work = work
                try:
                    with quiet():  # its bars would cross the training's
                        super()._save_checkpoint(model, trial)
                finally:
                    self._work = None
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._finish(output / work / name, output / name)
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(output / work, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _finish(self, work: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(work):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(work / "trainer_state.json"))
        if self.opponent is not None:
            opponents.save_opponent(self.opponent, work / checkpoints.OPPONENT)
        checkpoints.write_run(work, self.identity or {}, self.skipped_updates)
        checkpoints.publish(work, final)
        checkpoints.rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
