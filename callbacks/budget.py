"""When money or time is up: what a run may cost steers its schedule and ends it."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.callbacks.cost_ledger import CostLedger


class Budget(Callback):
    """Lets the progress of a run follow what it has cost, so that the schedule ends when the budget does.

    The cost is that of all attempts, from the start of each process, as the ledger books it. The module's progress is
    the larger of tokens done over tokens planned and cost over budget. At the budget's end the run is saved and stops;
    the final validation and export come after it. With a budget, two runs of one config differ as their machines do.

    Args:
        usd: Dollars that training may cost; none: no limit.
        hours: Device-hours that training may take; none: no limit.

    Attributes:
        reached: Whether the budget has ended the run.

    Raises:
        ValueError: If a limit is not positive.
    """

    def __init__(self, usd: float | None = None, hours: float | None = None) -> None:
        for name, value in (("usd", usd), ("hours", hours)):
            if value is not None and not value > 0:
                raise ValueError(f"budget.{name} is {value}, expected more than 0")
        self.usd = usd
        self.hours = hours
        self.reached = False
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what earlier attempts have cost."""
        self._step = trainer.global_step
        self._follow(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the progress after an optimizer step, before the schedule of the next one is asked."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._follow(trainer, pl_module)

    def _follow(self, trainer: Any, pl_module: Any) -> None:
        if self.usd is None and self.hours is None:
            return
        spent = 0.0
        ledger = next(c for c in trainer.callbacks if isinstance(c, CostLedger)).ledger
        if ledger is not None:
            totals = ledger.totals()
            spent = max(totals.usd / (self.usd or float("inf")), totals.device_hours / (self.hours or float("inf")))
        pl_module.budget_progress = float(trainer.strategy.broadcast(spent))
        if pl_module.budget_progress >= 1:
            self.reached = True
            next(c for c in trainer.callbacks if isinstance(c, Checkpoints)).save_and_stop()
