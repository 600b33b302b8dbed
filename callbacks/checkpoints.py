"""When checkpoints are written, and in which state of Lightning's loops."""

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ds_lightning.training import checkpoint
from ds_lightning.training.random_state import restore_random_state, write_random_state
from ds_lightning.training.strategy import zero_stage

_VALIDATION = "epoch_loop.val_loop.batch_progress"


@runtime_checkable
class _Phases(Protocol):
    """A callback that books time by phase."""

    def phase(self, name: str) -> AbstractContextManager[Any]: ...


class Checkpoints(Checkpoint):
    """Saves the run at optimizer steps, so that a resumed run is bitwise the run that was never interrupted.

    Every checkpoint holds the loops as they stand at the end of the micro-batch that made the optimizer step: the
    one state from which Lightning continues a running epoch without shifting a counter. Where a validation is due at
    the step, the save waits until it is over, so that it is neither skipped nor run twice after a resume. At the last
    step it waits for the end of training, since Lightning does nothing at all on resuming a finished run.

    Lightning calls callbacks of this base class after all others, so what other callbacks do in
    ``on_train_batch_end`` is in the checkpoint. What the LightningModule does in its own ``on_train_batch_end`` is
    not: it comes later still.

    The metrics of such a step reach the loggers only after its save, so they are in the checkpoint, and a resumed run
    logs them once more: a process killed in between leaves no hole in the curves.

    Other callbacks stop a run early through ``save_and_stop``. They set ``hold_off`` where nothing is left for
    validations and saves on the way: those that fall due are left out, but for the last save.

    Checkpoints go to ``checkpoints/`` in the trainer's ``default_root_dir``. A save that fails (a full disk, a
    permission) prints one line and training goes on; ``failed_saves`` counts them. The last save of a run raises.

    The random state of every rank is part of the checkpoint (Python, NumPy, torch, CUDA), in a file of its own.

    What goes wrong on one rank goes wrong on all: either every rank has saved, or none has.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        every_n_seconds: Seconds between two checkpoints, instead of steps.
        keep_last: Number of checkpoints to keep.

    Raises:
        ValueError: If not exactly one interval is given, or a number is not positive.
    """

    def __init__(
        self, every_n_steps: int | None = None, every_n_seconds: float | None = None, keep_last: int = 2
    ) -> None:
        super().__init__()
        if (every_n_steps is None) == (every_n_seconds is None):
            raise ValueError(
                f"Checkpoints: every_n_steps is {every_n_steps} and every_n_seconds is {every_n_seconds}, "
                "expected exactly one of them"
            )
        for name, value in (("every_n_steps", every_n_steps), ("every_n_seconds", every_n_seconds)):
            if value is not None and value <= 0:
                raise ValueError(f"Checkpoints: {name} is {value}, expected more than 0")
        if keep_last < 1:
            raise ValueError(f"Checkpoints: keep_last is {keep_last}, expected at least 1")
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.keep_last = keep_last
        self.failed_saves = 0
        self.stopped = False
        self.hold_off = False
        self._stop_requested = False
        self._step = 0  # optimizer steps at the latest boundary
        self._at_boundary = False
        self._saved_step = 0
        self._attempted_step = 0  # of the latest save, whether it failed or not
        self._attempted_at = 0.0
        self._loops: dict[str, Any] | None = None  # of the fit loop, at the latest boundary
        self._saving: dict[str, Any] | None = None
        self._unlogged: tuple[int, dict[str, float]] | None = None  # step and metrics of the save, not yet logged

    def save_and_stop(self) -> None:
        """End training at the next optimizer step with a checkpoint of it; ``stopped`` then turns true.

        Neither a validation nor a log entry is made that the uninterrupted run would not make: a validation due at
        that step is left to the resumed run. One that is running now is finished first, since its result would be
        lost. If the next step is the last one, training ends as it would have, and ``stopped`` stays false.
        """
        self._stop_requested = True

    def stop_before_training(self, trainer: Trainer) -> None:
        """End training in ``on_train_start`` without a step: of a resumed run, whose checkpoint is there."""
        self.stopped = True
        _leave(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run of the same callback."""
        self._unlogged = None
        if stage == "fit":
            self._loops = None
            self.stopped = self.hold_off = self._stop_requested = self._at_boundary = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the random state of the checkpoint, after everything that set-up has drawn."""
        self._step = self._saved_step = self._attempted_step = trainer.global_step
        self._attempted_at = time.monotonic()
        validation = trainer.fit_loop.epoch_loop.val_loop
        if validation.restarted_mid_evaluation:
            validation.batch_progress.total.reset_on_restart()  # Lightning does so for the current epoch only
        if trainer.ckpt_path is not None:
            path = Path(trainer.ckpt_path).with_name(checkpoint.rank_file(trainer.global_rank))
            for line in restore_random_state(path):
                _report(line)
        if self._unlogged is not None:
            step, metrics = self._unlogged
            self._unlogged = None
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Leave the epoch if the last boundary was where to stop.

        Only here has the step been logged, and has ``should_stop`` no say any more in what is logged or validated.
        """
        self._at_boundary = False
        if self.stopped:
            _leave(trainer)
            raise StopIteration

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after an optimizer step; other micro-batches are skipped."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._at_boundary = True
        epoch_loop = trainer.fit_loop.epoch_loop
        loops = copy.deepcopy(trainer.fit_loop.state_dict())
        validation_is_due = self._validation_is_due(trainer)
        if validation_is_due and self.hold_off and not self._stop_requested:
            epoch_loop._skip_next_val, validation_is_due = True, False
        self._loops = _after_validation(loops) if validation_is_due else loops
        if epoch_loop._is_training_done:
            return
        if self._stop_requested:
            loops = _before_validation(loops) if validation_is_due else loops
            self._save(trainer, pl_module, loops, must_succeed=True)
            epoch_loop._skip_next_val = validation_is_due
            self.stopped = True
        elif self._is_due(trainer) and not validation_is_due and not self.hold_off:
            self._unlogged = _metrics_to_log(trainer)
            self._save(trainer, pl_module, self._loops)
            self._unlogged = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the save that waited for this validation, or stop if that was asked for meanwhile."""
        epoch_loop = trainer.fit_loop.epoch_loop
        if self._loops is None or not self._at_boundary or epoch_loop._is_training_done:
            return
        if self._stop_requested or self._is_due(trainer):
            self._loops[_VALIDATION] = epoch_loop.val_loop.batch_progress.state_dict()
            self._save(trainer, pl_module, self._loops, must_succeed=self._stop_requested)
            self.stopped = self._stop_requested

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if self._loops is not None and not self.stopped:
            self._loops[_VALIDATION] = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
            self._save(trainer, pl_module, self._loops, must_succeed=True)
        self._loops = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the loops' snapshot of the boundary into the checkpoint, and what is still to be logged."""
        if self._saving is not None:
            checkpoint["loops"]["fit_loop"] = self._saving
            checkpoint["unlogged"] = self._unlogged

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was still to be logged until training starts."""
        self._unlogged = checkpoint.get("unlogged")

    def state_dict(self) -> dict[str, Any]:
        """Return the number of failed saves."""
        return {"failed_saves": self.failed_saves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self.failed_saves = state_dict["failed_saves"]

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.should_stop:  # now, and not after the validation that Lightning adds to a stop
            return True
        if self.every_n_steps is not None:
            return self._step // self.every_n_steps > self._attempted_step // self.every_n_steps
        assert self.every_n_seconds is not None
        elapsed = time.monotonic() - self._attempted_at
        return trainer.strategy.broadcast(elapsed >= self.every_n_seconds)

    def _validation_is_due(self, trainer: Trainer) -> bool:
        """Whether Lightning validates after this batch; a request to stop is no reason of its own."""
        should_stop, trainer.should_stop = trainer.should_stop, False
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        trainer.should_stop = should_stop
        return due

    def _save(self, trainer: Trainer, pl_module: Any, loops: dict[str, Any], *, must_succeed: bool = False) -> None:
        if self._saved_step == self._step:
            return
        self._attempted_step, self._attempted_at = self._step, time.monotonic()
        folder = Path(trainer.default_root_dir) / "checkpoints"
        with _phase(trainer, "checkpoint"):
            try:
                self._write(trainer, folder, loops, tokens=int(getattr(pl_module, "tokens_seen", 0)))
            except OSError as error:
                self.failed_saves += 1
                if must_succeed:
                    raise
                _report(f"checkpoint of step {self._step} not written, training goes on: {error}")
                return
            self._saved_step = self._step
            try:
                if trainer.is_global_zero:
                    checkpoint.retain(folder, self.keep_last)
            except OSError as error:
                _report(f"old checkpoints not deleted: {error}")

    def _write(self, trainer: Trainer, folder: Path, loops: dict[str, Any], *, tokens: int) -> None:
        temporary = checkpoint.temporary(folder, self._step)
        self._saving = loops
        try:
            with _together(trainer):
                if trainer.is_global_zero:
                    checkpoint.begin(temporary)
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            with _together(trainer):
                trainer.strategy.save_checkpoint(state, temporary / checkpoint.STATE)
                write_random_state(temporary / checkpoint.rank_file(trainer.global_rank))
            with _together(trainer):
                if trainer.is_global_zero:
                    stage = zero_stage(trainer.strategy)
                    checkpoint.publish(temporary, tokens=tokens, ranks=trainer.world_size, zero_stage=stage)
        finally:
            self._saving = None
            if trainer.is_global_zero:
                checkpoint.discard(temporary)


@contextmanager
def _together(trainer: Trainer) -> Iterator[None]:
    """Wait for all ranks; an error of the file system on one of them is then raised on all.

    Otherwise the others would wait for it where it never comes.
    """
    error: OSError | None = None
    try:
        yield
    except OSError as raised:
        error = raised
    if not trainer.strategy.reduce_boolean_decision(error is not None, all=False):
        return
    found: list[OSError | None] = [error]
    if trainer.world_size > 1:
        found = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, error)
    if error is not None:
        raise error
    rank, theirs = next((rank, each) for rank, each in enumerate(found) if each is not None)
    raise OSError(theirs.errno, f"{theirs.strerror} on rank {rank}", theirs.filename)


def _leave(trainer: Trainer) -> None:
    """Let Lightning end training here, whatever number of epochs and steps it was to make."""
    trainer.should_stop = True
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None


def _metrics_to_log(trainer: Trainer) -> tuple[int, dict[str, float]] | None:
    """Return what Lightning is about to log for this step, and under which number."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    return trainer.fit_loop.epoch_loop._batches_that_stepped, {**metrics, "epoch": float(trainer.current_epoch)}


def _after_validation(loops: dict[str, Any]) -> dict[str, Any]:
    """Turn the fit loop's state after a batch into the one after the validation that follows it.

    From the state before it, Lightning would not validate either, but make an iterator over the validation data to
    count its batches, and that draws a number from torch's generator.
    """
    loops = copy.deepcopy(loops)
    for batches in (loops["epoch_loop.batch_progress"]["total"], loops["epoch_loop.batch_progress"]["current"]):
        batches["completed"] += 1
    return loops


def _before_validation(loops: dict[str, Any]) -> dict[str, Any]:
    """Turn the fit loop's state after a batch into the one in which the validation after it has just begun.

    Lightning runs a validation that it finds interrupted before it goes on, and one that it finds not begun never.
    """
    loops = _after_validation(loops)
    validation = loops[_VALIDATION]
    finished = validation["total"]["completed"]
    validation["total"] = {"ready": finished + 1, "started": finished + 1, "processed": finished, "completed": finished}
    validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False
    return loops


def _phase(trainer: Any, name: str) -> AbstractContextManager[Any]:
    for callback in trainer.callbacks:
        if isinstance(callback, _Phases):
            return callback.phase(name)
    return nullcontext()


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
