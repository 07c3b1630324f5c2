"""transformers' Trainer with complete or absent checkpoints, a locked output folder and exact resumption.

`trainer.py` adds the training loop of `NashTrainer`; `checkpoints.py` publishes, finds and checks checkpoints.
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
from ..engine.peft_models import is_adapted
from . import checkpoints, opponents, sharded_checkpoints
from .callbacks import close_bars
from .identity import Identity, identity_of
from .layout import Layout
from .processes import result_of_one
from .setup import OP
from .sharded import reshard, whole_weights

_log = logging.getLogger(__name__)
_Trainer: Any = Trainer  # its annotations contradict what subclasses are meant to do


class ResumableTrainer(_Trainer):  # type: ignore[misc]
    skipped_updates: int  # updates whose gradients were not finite
    opponent: opponents.Opponent | None
    layout: Layout
    identity: Identity | None = None  # of the run, as of its start; None where nothing is saved or resumed
    _stopping = False  # after SIGTERM: this update is the last
    _work: str | None = None  # name of the folder in output_dir that a checkpoint is being written into

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if self.train_dataset is None:
            raise ValueError(f"{OP}: train: expected a train_dataset; got none")
        with stopping.stoppable():
            with stopping.deferred():
                result = self._train(resume, options)
            stopping.stop_if_requested()  # after the last update, a policy may still have to be saved
        return result

    def _train(self, resume: str | bool | None, options: dict[str, Any]) -> Any:
        output = Path(self.args.output_dir)
        with ExitStack() as locks:
            if self.layout.sharded:  # all processes gather weights for it
                self._identify(resume)
            checkpoint: str | None = self._on_first_process(lambda: self._open_output(output, resume, locks))
            self._identify(resume)  # on processes that save beside the first
            self.skipped_updates = 0 if checkpoint is None else checkpoints.skipped_updates(checkpoint)
            is_sharded = checkpoint is not None and sharded_checkpoints.is_sharded(checkpoint)
            if self.layout.sharded and checkpoint is not None and not is_sharded:
                raise ValueError(
                    f"{OP}: resume_from_checkpoint: expected a checkpoint of split models; got {checkpoint}, of whole "
                    "ones (a run of split models can begin with its weights, as `model`)"
                )
            if checkpoint is not None and self.opponent is not None and not is_sharded:
                opponents.load_opponent(self.opponent, Path(checkpoint) / checkpoints.OPPONENT)
            if checkpoint is not None and 0 < self.args.max_steps <= checkpoints.update_of(checkpoint):
                return self._load_finished(checkpoint)
            try:
                return super().train(resume_from_checkpoint=checkpoint, **options)
            finally:
                close_bars(self.callback_handler.callbacks)

    def _open_output(self, output: Path, resume: str | bool | None, locks: ExitStack) -> str | None:
        """Lock the folder; return the checkpoint to go on from."""
        output.mkdir(parents=True, exist_ok=True)
        locks.enter_context(lock_folder(output))
        atomic.remove_leftovers(output)
        self._identify(resume)
        changes = self.args.resume_changes or ()
        return checkpoints.resolve(output, resume, self.args.overwrite_output_dir, self.identity or {}, changes)

    def _identify(self, resume: str | bool | None) -> None:
        """Set the run's identity, once, before weights are changed."""
        concerned = self.args.should_save or self.layout.sharded
        if self.identity is None and concerned and (resume or self._saves):
            self.identity = identity_of(self)

    @property
    def _saves(self) -> bool:
        return str(self.args.save_strategy.value) != "no"

    def _on_first_process(self, act: Callable[[], Any]) -> Any:
        """Call `act` on the first process; return its result on all processes, or raise its error on all of them."""
        if self.args.world_size == 1:
            return act()
        from accelerate.utils import broadcast_object_list

        failed = f"{OP}: the first process ended"
        return result_of_one(act, self.is_world_process_zero(), broadcast_object_list, failed)

    def _load_finished(self, checkpoint: str) -> TrainOutput:
        """Load a checkpoint of the run's end; transformers' own train() would make one update more."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        _log.warning("%s: %s is the run's end, after %d updates", OP, checkpoint, self.state.global_step)
        return TrainOutput(self.state.global_step, 0.0, {})

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Save the updates so far if the enclosed work, which changes no weights, fails or is ended by SIGTERM.

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
                self._save_before_leaving()
            raise

    def stop_if_requested(self, control: Any) -> None:
        """Request a checkpoint at the end of an update after SIGTERM, and skip an evaluation that is due.

        `stop_once_saved` then ends the training.

        Args:
            control: transformers' TrainerControl.
        """
        self._stopping = stopping.requested()
        if self.args.world_size > 1:
            votes = torch.full((), float(self._stopping), dtype=torch.float32, device=self.args.device)
            self._stopping = bool(self.accelerator.reduce(votes, reduction="sum") > 0)
        if self._stopping:
            control.should_evaluate, control.should_save = False, self._saves
            if not self._saves:
                raise stopping.Stopped

    def stop_once_saved(self) -> None:
        """End the training after SIGTERM, once a checkpoint is written."""
        if self._stopping:
            _log.warning("%s: stopped by SIGTERM after %d updates, which are saved", OP, self.state.global_step)
            raise stopping.Stopped

    def _save_before_leaving(self) -> None:
        """Save a checkpoint, so that a judge's error loses no update; not with several processes, which fail one by
        one."""
        step = self.state.global_step
        if self._saves and step and self.args.world_size == 1:
            if not (Path(self.args.output_dir) / f"checkpoint-{step}").exists():
                self._save_checkpoint(self.model, None)
            _log.warning("%s: %d updates are safe in checkpoint-%d", OP, step, step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as `from_pretrained` reads it. All processes must call.

        Args:
            output_dir: folder; None: that of the run.
        """
        if self.is_fsdp_enabled:  # transformers would leave it out, or not, as accelerate's plugin says
            self._save(self.args.output_dir if output_dir is None else output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.layout.sharded:
            reshard(self.model)
        check_finite(f"{OP}: update {self.state.global_step}: the model is not saved", self.model)
        if self.layout.sharded and self._work is not None and not is_adapted(self.model):
            if self.args.should_save:  # the weights of a checkpoint are in its `sharded/`
                self.model.config.save_pretrained(output_dir)
                self.processing_class.save_pretrained(output_dir)
            return
        if self.is_fsdp_enabled or (
            self.layout.sharded and is_adapted(self.model)
        ):  # what transformers does not gather
            state_dict = whole_weights(self.model, keep=self.args.should_save)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.layout.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded_checkpoints.save_sharded(Path(output_dir), self.model, self.optimizer, self.opponent)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not sharded_checkpoints.is_sharded(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        sharded_checkpoints.load_sharded(Path(resume_from_checkpoint), self.model, opponent=self.opponent)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not sharded_checkpoints.is_sharded(best):
            super()._load_best_model()
            return
        sharded_checkpoints.load_sharded(Path(best), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharded_checkpoints.is_sharded(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        sharded_checkpoints.load_sharded(folder, self.model, self.optimizer, self.opponent)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

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
                    self._publish(output / work / name, output / name)
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(output / work, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _publish(self, work: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(work):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(work / "trainer_state.json"))
        if self.opponent is not None and not self.layout.sharded:
            opponents.save_opponent(self.opponent, work / checkpoints.OPPONENT)
        checkpoints.write_run(work, self.identity or {}, self.skipped_updates)
        checkpoints.publish(work, final)
        checkpoints.rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
