"""When money or time is up: what a run may cost steers its schedule and ends it."""

from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.callbacks.cost_ledger import CostLedger

_Found = TypeVar("_Found", bound=Callback)


class Budget(Callback):
    """Lets the progress of a run follow what it has cost, so that the schedule ends when the budget does.

    The cost is that of all attempts, from the start of each process, as the ledger books it. The module's progress is
    the larger of tokens done over tokens planned and cost over budget. At the budget's end the run is saved and stops;
    the final validation and export come after it. With a budget, two runs of one config differ as their machines do.

    Args:
        usd: Dollars that training may cost; none: no limit.
        hours: Device-hours that training may take; none: no limit.

    Attributes:
        reached: Whether the budget has ended the run before its last step.

    Raises:
        ValueError: If a limit is not positive; in ``setup``, if the trainer has no callback that books the cost, or
            none that saves.
    """

    def __init__(self, usd: float | None = None, hours: float | None = None) -> None:
        for name, value in (("usd", usd), ("hours", hours)):
            if value is not None and not value > 0:
                raise ValueError(f"budget.{name} is {value}, expected more than 0")
        self.usd = usd
        self.hours = hours
        self.reached = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to go by."""
        if stage == "fit" and self._is_limited:
            _find(trainer, CostLedger)
            _find(trainer, Checkpoints)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what earlier attempts have cost."""
        self._follow(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Move the progress: Lightning asks for the learning rate of the next step right after this one."""
        self._follow(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell whether the run has more to do."""
        self.reached = self._is_limited and pl_module.budget_progress >= 1 and _find(trainer, Checkpoints).stopped

    @property
    def _is_limited(self) -> bool:
        return self.usd is not None or self.hours is not None

    def _follow(self, trainer: Any, pl_module: Any) -> None:
        if not self._is_limited:
            return
        spent = 0.0
        ledger = _find(trainer, CostLedger).ledger
        if ledger is not None:
            totals = ledger.totals()
            spent = max(totals.usd / (self.usd or float("inf")), totals.device_hours / (self.hours or float("inf")))
        pl_module.budget_progress = float(trainer.strategy.broadcast(spent))
        if pl_module.budget_progress >= 1:
            _find(trainer, Checkpoints).save_and_stop()


def _find(trainer: Any, kind: type[_Found]) -> _Found:
    for callback in trainer.callbacks:
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"Budget: trainer.callbacks has no {kind.__name__}, expected one: add it, or remove Budget")
