"""When money or time is up: what a run may cost steers its schedule and ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.callbacks.cost_ledger import CostLedger
from ds_lightning.callbacks.pass_at_one import PassAtOne
from ds_lightning.cost import Ledger, Price, ledger_report
from ds_lightning.cost.budget import Limit, Mark, Pace, limits, shortest_start, tightest
from ds_lightning.cost.ledger_report import LEDGER_NAME

_Found = TypeVar("_Found", bound=Callback)


class _Standing(NamedTuple):
    """Where a run stands; rank zero's is that of all ranks."""

    progress: float = 0.0
    """Share of the money for training that is spent; from 1 on there is enough for one more step."""
    near: bool = False
    """Whether a validation or checkpoint on the way would be paid for with what the end needs."""
    said: str = ""
    """What is spent and what is missing, in words."""


class Budget(Callback):
    """Lets the progress of a run follow what it has cost, so that the schedule ends when the budget does.

    The budget is the total: of all attempts, from the start of each process to its end, the last validation, checkpoint
    and export included. These are paid for out of a reserve. At every optimizer step::

        progress = spent / (budget - reserve),  reserve = two steps + the end + margin

    and the module's progress is the larger of this and of tokens done over tokens planned. At progress 1 one more step
    is made, the last one, with the learning rate at its final value. ``the end`` is estimated from what the ledger
    booked in this run (:meth:`ds_lightning.cost.budget.Pace.closing`); the margin is half a percent of the budget, or
    four seconds if that is more. Validations and checkpoints on the way are left out where they would take what the end
    needs, and so is the last validation if it turns out to be too expensive. With a budget, two runs of one config
    differ as their machines do.

    Args:
        usd: Dollars that the run may cost; none: no limit.
        hours: Device-hours that the run may take; none: no limit.
        reserve: Seconds to keep for the end, in place of the estimate and the margin.

    Attributes:
        reached: The limit that has ended the run before its last step; none: none has.
        pays_validation: Whether there is enough left for the last validation.

    Raises:
        ValueError: If a limit is not positive or the reserve negative; in ``setup``, if the trainer has no callback
            that books the cost, or none that saves; in ``on_train_start``, if the start of a new run leaves too little.
    """

    def __init__(self, usd: float | None = None, hours: float | None = None, reserve: float | None = None) -> None:
        for name, value in (("usd", usd), ("hours", hours)):
            if value is not None and not value > 0:
                raise ValueError(f"budget.{name} is {value}, expected more than 0")
        if reserve is not None and not reserve >= 0:
            raise ValueError(f"budget.reserve is {reserve}, expected 0 seconds or more")
        self.usd = usd
        self.hours = hours
        self.reserve = reserve
        self.reached: dict[str, float] | None = None
        self.pays_validation = True
        self._pace = Pace()
        self._batches: int | None = None  # of the last validation
        self._mark = Mark()  # at the latest step
        self._validated = 0.0  # seconds of validations since, samples not among them
        self._validating: list[float] = []  # seconds booked as validation at its start and after each batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to go by, and forget an earlier run of the same callback."""
        if stage == "fit":
            self.reached, self.pays_validation, self._pace = None, True, Pace()
            if self._is_limited:
                _find(trainer, CostLedger)
                _find(trainer, Checkpoints)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take up what earlier attempts have cost, and end a run for which nothing is left."""
        if not self._is_limited:
            return
        self._batches = _validation_batches(trainer)
        if self._batches is None and self.reserve is None:
            raise ValueError(
                "budget.reserve is None and the validation data have no length to estimate it from, expected seconds"
            )
        self._validated = 0.0
        ledger = self._ledger(trainer)
        if ledger is not None:
            self._mark = Mark.of(ledger.totals())
        standing = self._stand(trainer)
        pl_module.budget_progress = standing.progress
        if standing.progress >= 1:
            if trainer.global_step == 0:
                raise ValueError(standing.said)
            _find(trainer, Checkpoints).stop_before_training(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Move the progress: Lightning asks for the learning rate of the next step right after this one."""
        if not self._is_limited:
            return
        if pl_module.budget_progress >= 1:
            _find(trainer, Checkpoints).save_and_stop()
            return
        self._measure(trainer)
        standing = self._stand(trainer)
        pl_module.budget_progress = standing.progress
        _find(trainer, Checkpoints).hold_off = standing.near or standing.progress >= 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        self._validating = []
        self._note_validation(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Measure a batch."""
        self._note_validation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time of a batch, without the first one where there are more: it warms up."""
        self._note_validation(trainer, pl_module)
        if len(self._validating) < 3:
            return
        start, *batches, end = self._validating
        first, last = batches[0], batches[-1]
        self._pace.batch = (last - first) / (len(batches) - 1) if len(batches) > 1 else last - start
        if not trainer.sanity_checking:
            self._pace.answers = end - last
            self._validated += end - start

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell whether the run has more to do, and whether its validation is paid for."""
        if not self._is_limited:
            return
        end, ledger = ("", 0.0, True), self._ledger(trainer)
        if ledger is not None:
            limit = tightest(self._limits(ledger))
            left = self._pace.validation(self._batches or 0, _growth(trainer)) + self._pace.save
            if self.reserve is None:  # for what comes after it, and for what nobody measured
                left += limit.margin / 2
            end = (limit.name, limit.total, limit.progress(left) < 1)
        name, total, self.pays_validation = trainer.strategy.broadcast(end)
        if pl_module.budget_progress >= 1 and _find(trainer, Checkpoints).stopped:
            self.reached = {name: total}

    def missing_for_start(self, run_dir: Path, price: Price, devices: int) -> str | None:
        """Return in words what another attempt lacks if earlier ones have not left enough to start it; none: nothing.

        Args:
            run_dir: Folder of the run.
            price: Price of a device from now on.
            devices: Devices held from now on.

        Raises:
            ValueError: If the ledger in the folder was tampered with.
        """
        path = run_dir / LEDGER_NAME
        if not self._is_limited or not path.is_file():
            return None
        report, seconds = ledger_report(run_dir), shortest_start(path)
        spent = {"spent_usd": report["usd"], "spent_hours": report["device_hours"]}
        found = limits(self.usd, self.hours, **spent, devices=devices, price=price.usd_per_device_hour)
        return next((_too_small(limit, seconds) for limit in found if limit.progress(seconds) >= 1), None)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, for the next attempt."""
        return self._pace.state() if self._is_limited else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was measured."""
        if state_dict:
            self._pace.restore(state_dict)

    @property
    def _is_limited(self) -> bool:
        return self.usd is not None or self.hours is not None

    def _limits(self, ledger: Ledger) -> list[Limit]:
        totals, terms = ledger.totals(), ledger.terms
        return limits(
            self.usd,
            self.hours,
            spent_usd=totals.usd,
            spent_hours=totals.device_hours,
            devices=terms.num_devices,
            price=terms.usd_per_device_hour,
        )

    def _ledger(self, trainer: Trainer) -> Ledger | None:
        return _find(trainer, CostLedger).ledger

    def _measure(self, trainer: Trainer) -> None:
        """Note what the ledger booked since the step before."""
        ledger = self._ledger(trainer)
        if ledger is None:
            return
        mark, before = Mark.of(ledger.totals()), self._mark
        self._pace.steps.append(mark.working - before.working)
        self._pace.save = mark.checkpoint - before.checkpoint or self._pace.save
        self._pace.samples = max(mark.validate - before.validate - self._validated, 0.0) or self._pace.samples
        self._mark, self._validated = mark, 0.0

    def _stand(self, trainer: Trainer) -> _Standing:
        standing, ledger = _Standing(), self._ledger(trainer)
        if ledger is not None:
            pace = self._pace
            end = pace.closing(self._batches or 0, _growth(trainer)) if self.reserve is None else self.reserve
            on_the_way = pace.validation(_batches_on_the_way(trainer)) + pace.save
            found = self._limits(ledger)
            kept = [2 * pace.step + end + (limit.margin if self.reserve is None else 0.0) for limit in found]
            progress = [limit.progress(seconds) for limit, seconds in zip(found, kept, strict=True)]
            near = any(limit.progress(seconds + on_the_way) >= 1 for limit, seconds in zip(found, kept, strict=True))
            furthest = progress.index(max(progress))
            standing = _Standing(max(progress), near, _too_small(found[furthest], kept[furthest]))
        return _Standing(*trainer.strategy.broadcast(standing))

    def _note_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_limited:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        ledger = self._ledger(trainer)
        if ledger is not None:
            self._validating.append(ledger.totals().seconds.get("validate", 0.0))


def _too_small(limit: Limit, seconds: float) -> str:
    more = seconds * limit.per_second
    return (
        f"budget.{limit.name} is {limit.total:.4g}, of which {limit.spent:.4g} are spent, and to go on takes "
        f"{more:.4g}, expected more than {limit.spent + more:.4g}"
    )


def _validation_batches(trainer: Any) -> int | None:
    """Return the number of batches of a validation that reads everything; none: the data do not tell."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not loop._data_source.is_defined():
        return 0
    loaders = loop._combined_loader
    if loaders is None:  # not validated on the way
        loaders = CombinedLoader(loop._data_source.dataloader(), "sequential")
    lengths = [sized_len(loader) for loader in loaders.flattened]
    return None if None in lengths else sum(length or 0 for length in lengths)


def _batches_on_the_way(trainer: Trainer) -> int:
    return int(sum(count for count in trainer.num_val_batches if count != float("inf")))


def _growth(trainer: Any) -> float:
    """Return how many more problems are answered at the end than on the way."""
    measured = [callback for callback in trainer.callbacks if isinstance(callback, PassAtOne)]
    return max((callback.problems / callback.problems_on_the_way for callback in measured), default=1.0)


def _find(trainer: Any, kind: type[_Found]) -> _Found:
    for callback in trainer.callbacks:
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"Budget: trainer.callbacks has no {kind.__name__}, expected one: add it, or remove Budget")
