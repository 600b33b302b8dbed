"""What becomes of a run in which one rank no longer moves, and the others wait for it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.callbacks.cost_ledger import CostLedger
from ds_lightning.cost.heartbeat import Heartbeat, read_heartbeat
from ds_lightning.training.failure import wait_for_launcher

_BEAT_SECONDS = 1.0  # between two writes; a process that is stopped may have gone on for so long after its last
_FLUSH_SECONDS = 5.0


class Standing(NamedTuple):
    """How far a rank has come, as its file tells."""

    hooks: int
    """Calls of the trainer so far: the same on all ranks at the same point of the run."""
    collectives: int
    """Operations between ranks that this one has begun."""
    phase: str
    step: int
    """Optimizer steps made."""
    place: str
    """Where its main thread is, innermost."""
    host: str

    @property
    def position(self) -> tuple[int, int]:
        """Where it stands in the order of what all ranks do."""
        return self.hooks, self.collectives


class Watchdog(Callback):
    """Ends a run on all ranks, with status 1, when one of them hangs, and says which and where.

    Every rank counts the trainer's calls and the operations between ranks, and a thread of its own writes the counts to
    a file in the run's folder. It runs also while Python waits inside a collective. Where a rank has not moved for
    ``timeout``, its thread reads the files of the others: the ranks that are behind are those that hang, and the rest
    waits for them. The end is hard (``os._exit``): who waits in a collective hears of nothing else. The ledger is
    flushed before it.

    Nothing is said where no rank is behind another, such as when all wait for a network that lost a message: then the
    time-out of the process group ends the run. A process that is stopped or holds Python's lock cannot speak for
    itself, and is named by the others. Watched is training, with its validations and saves; the folder must be one for
    all ranks.

    Args:
        timeout: Seconds; more than the longest time in which one rank works while others wait, such as a save or a
            rollout of uneven lengths. None: nothing is watched.

    Raises:
        ValueError: If the time-out is not positive.
    """

    def __init__(self, timeout: float | None = 300.0) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"watchdog.timeout is {timeout}, expected more than 0 seconds or null")
        self.timeout = timeout
        self._hooks, self._phase = 0, ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch from here on."""
        if self.timeout is None or trainer.world_size == 1:
            return
        self._hooks = 0
        self._enter("start")
        self._stop = threading.Event()
        attempt = trainer.strategy.broadcast(time.time_ns())
        watch = _Watch(self, trainer, attempt, self.timeout)
        trainer.strategy.barrier("watchdog")  # a file of an earlier attempt is gone when another rank may read it
        self._thread = threading.Thread(target=watch.run, args=(self._stop,), name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("forward")

    def on_before_backward(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("optimizer step")

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the phase: other callbacks, and the wait for the next batch."""
        self._enter("the time between steps")

    def on_validation_batch_start(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("validation")

    def on_validation_end(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("the time between steps")

    def on_save_checkpoint(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("checkpoint")

    def on_train_end(self, *args: Any) -> None:
        """Note the phase."""
        self._enter("end of training")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no longer, once all have come here."""
        if self._thread is not None:
            trainer.strategy.barrier("watchdog")
            self._end()

    def on_exception(self, *args: Any) -> None:
        """Watch no longer: this process is about to end."""
        self._end()

    def _enter(self, phase: str) -> None:
        self._hooks, self._phase = self._hooks + 1, phase

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None


class _Watch:
    """The thread of one rank."""

    def __init__(self, watchdog: Watchdog, trainer: Trainer, attempt: int, timeout: float) -> None:
        self.watchdog, self.trainer, self.attempt, self.timeout = watchdog, trainer, attempt, timeout
        self.beat = min(_BEAT_SECONDS, timeout / 20)
        self.rank, self.ranks = trainer.global_rank, trainer.world_size
        self.folder = Path(trainer.default_root_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = Heartbeat(self._path(self.rank))
        self.main = threading.main_thread().ident
        self._write()

    def run(self, stop: threading.Event) -> None:
        """Write, and look around when this rank has not moved.

        Looks are counted, and not seconds: while all processes are stopped, as with a suspended machine, none happens.
        """
        position, idle, suspects = (0, 0), 0, list[int]()
        while not stop.wait(self.beat):
            now = self._write().position
            if now != position:
                position, idle, suspects = now, 0, []
            idle += 1
            if idle * self.beat > self.timeout:
                standings = [self._read(rank) for rank in range(self.ranks)]
                before, suspects = suspects, behind(standings)
                if suspects and suspects == before:  # two looks: a file may have been caught while it was written
                    self._end_run(standings, suspects)
        self.file.close(remove=True)

    def _end_run(self, standings: list[Standing | None], suspects: list[int]) -> None:
        """Say what there is to say, and end this process; the one that started others goes before them."""
        if self.rank == min(set(range(self.ranks)) - set(suspects)):
            print(f"ds-lightning: {verdict(standings, suspects, self.timeout)}", file=sys.stderr, flush=True)
        if self.rank in suspects:
            faulthandler.dump_traceback(file=sys.stderr)
        if self.rank == 0:
            _flush_ledger(self.trainer)
        time.sleep(3 * self.beat)  # until all have seen it
        wait_for_launcher(self.trainer, _FLUSH_SECONDS)
        for process in getattr(self.trainer.strategy.launcher, "procs", ()):
            process.kill()  # one that is stopped does not end by itself
        os._exit(1)

    def _write(self) -> Standing:
        standing = Standing(
            self.watchdog._hooks,
            _collectives(),
            self.watchdog._phase,
            self.trainer.global_step,
            _place(self.main),
            socket.gethostname(),
        )
        with contextlib.suppress(OSError):  # a full disk is for those to report who have more to write
            self.file.write({"attempt": self.attempt, **standing._asdict()})
        return standing

    def _read(self, rank: int) -> Standing | None:
        """Return where a rank stands; none: it has not begun, is gone, or its file was caught while it was written."""
        found = read_heartbeat(self._path(rank))
        if found is None or found.pop("attempt") != self.attempt:
            return None
        return Standing(**found)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.heartbeat"


def behind(standings: Sequence[Standing | None]) -> list[int]:
    """Return the ranks that others wait for; none are where all have come equally far."""
    positions = [(0, 0) if standing is None else standing.position for standing in standings]
    return [rank for rank, position in enumerate(positions) if position < max(positions)]


def verdict(standings: Sequence[Standing | None], suspects: list[int], timeout: float) -> str:
    """Return the line that names the ranks that hang, and what the others wait for."""

    def tell(rank: int) -> str:
        standing = standings[rank]
        if standing is None:
            return f"rank {rank} has not begun to train, or is gone"
        phase = f"{standing.phase} of step {standing.step + 1}"
        return f"rank {rank} on {standing.host} was last at {standing.place} ({phase})"

    front = max((standing for standing in standings if standing is not None), key=lambda standing: standing.position)
    several, where = len(suspects) > 1, "; ".join(tell(rank) for rank in suspects)
    return (
        f"rank{'s' * several} {', '.join(map(str, suspects))} of {len(standings)} hang{'s' * (not several)}: nothing "
        f"has moved for {timeout:g} s, {where}, while others wait in {front.phase} of step {front.step + 1}; the run "
        "ends, and the same command goes on from the newest checkpoint"
    )


def _collectives() -> int:
    """Return the number of operations between ranks that this one has begun, in all groups."""
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]


def _place(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "an unknown place"
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _flush_ledger(trainer: Any) -> None:
    """Put the ledger on disk; where the disk is what hangs, its heartbeat has to do."""
    for callback in trainer.callbacks:
        if isinstance(callback, CostLedger) and callback.ledger is not None and not callback.ledger.closed:
            flush = threading.Thread(target=callback.ledger.flush, daemon=True)
            flush.start()
            flush.join(_FLUSH_SECONDS)
