"""When the ledger of a run changes phase, and when its sums are logged and saved."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator

from ds_lightning.cost import Ledger, find_hardware, find_price
from ds_lightning.cost.allocation import unbooked_allocation_ns
from ds_lightning.cost.energy import EnergyMeter, nvml_meter
from ds_lightning.cost.ledger_report import LEDGER_NAME
from ds_lightning.cost.prices import Market

log = logging.getLogger(__name__)

_current: Ledger | None = None  # a process books its time once, whatever number of trainers it makes


class CostLedger(Callback):
    """Books every second of the run in ``<default_root_dir>/ledger.jsonl`` and logs what it has cost.

    Phases: ``startup`` from the start of the process to the first batch, ``data`` while waiting for a batch, ``train``
    from there to the end of the batch, ``validate``, ``idle`` after training; whatever else runs in between says so
    with :meth:`phase`. On a GPU, work that was queued in one phase may still run in the next: the sum is exact, the
    border between ``data`` and ``train`` is where Python was.

    Logged at optimizer steps: ``cost/usd``, ``cost/device_hours`` and ``cost/tokens_per_usd`` of all attempts together.
    Rank zero writes for all devices; the ledger stays open until the process ends. Where ``pynvml`` is installed, the
    energy of the GPUs of its machine is booked too, from the opening of the ledger on.

    Args:
        device: Device in the price list, such as ``h100``; ``cpu`` is a machine with two virtual cores a process.
        usd_per_device_hour: Your own price in US dollars; none: the price list's.
        market: ``on-demand`` or ``spot``.
        prices_file: Price list to read instead of the newest one that ships with the package.
        from_allocation: Book from the start of the Slurm allocation on, not of the process: where a job is one run.

    Raises:
        ValueError: If there is no price for the device, or the price is negative or not a number.
    """

    def __init__(
        self,
        device: str = "cpu",
        usd_per_device_hour: float | None = None,
        market: Market = "on-demand",
        prices_file: str | None = None,
        from_allocation: bool = False,
    ) -> None:
        self.price = find_price(device, market=market, usd_per_device_hour=usd_per_device_hour, file=prices_file)
        self.from_allocation = from_allocation
        self.ledger: Ledger | None = None
        self._stage = ""
        self._last_step = 0
        self._before_validation = "startup"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the run's ledger, or go on in the one that this process has open.

        Raises:
            ValueError: If the ledger was tampered with or another process writes it, or the environment does not tell
                when the allocation began.
        """
        global _current
        if not trainer.is_global_zero:
            return
        self._stage = stage
        path = Path(trainer.default_root_dir) / LEDGER_NAME
        if self.ledger is None or self.ledger.closed or self.ledger.path != path:
            started = unbooked_allocation_ns(path) if self.from_allocation and _current is None else None
            if _current is not None:
                _current.close()
            self._check_device(trainer)
            devices = trainer.world_size
            self.ledger = _current = Ledger.open(
                path, self.price, num_devices=devices, started_ns=started, meter=_meter(trainer)
            )
        self.ledger.enter("startup")

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context whose time is booked under a phase: checkpoints, exports, samples, rollouts.

        Raises:
            ValueError: If there is no such phase.
        """
        return nullcontext() if self.ledger is None else self.ledger.phase(name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch."""
        self._last_step = trainer.global_step
        self._enter("data")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Train on the batch that has come."""
        self._enter("train")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Wait for the next batch; after an optimizer step, log."""
        self._enter("data")
        if self.ledger is None or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.ledger.progress(step=trainer.global_step, tokens=int(pl_module.tokens_seen))
        totals = self.ledger.totals()
        pl_module.log("cost/usd", totals.usd, prog_bar=True, rank_zero_only=True)
        pl_module.log("cost/device_hours", totals.device_hours, rank_zero_only=True)
        if totals.usd > 0:
            pl_module.log("cost/tokens_per_usd", pl_module.tokens_seen / totals.usd, rank_zero_only=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate; the check before training included."""
        self._before_validation = self._enter("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what validation interrupted."""
        self._enter(self._before_validation)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test: booked as validation."""
        self._enter("validate")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is trained from here on."""
        self._enter("idle")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put on disk what the run cost until it failed."""
        self._rest()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the run's sums on disk; the ledger closes with the process."""
        self._rest()

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger's state for the checkpoint."""
        return {} if self.ledger is None else self.ledger.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Book as lost what was done after the checkpoint, when training goes on from it.

        Raises:
            ValueError: If the ledger lacks records that were written before the checkpoint.
        """
        if self.ledger is not None and self._stage == "fit" and state_dict:
            self.ledger.resume_from(state_dict)

    def _enter(self, phase: str) -> str:
        return phase if self.ledger is None else self.ledger.enter(phase)

    def _check_device(self, trainer: Trainer) -> None:
        """Say that a run on a GPU is booked at the price of a processor, which nobody means."""
        if isinstance(trainer.accelerator, CUDAAccelerator) and self.price.device == "cpu":
            name = torch.cuda.get_device_name(trainer.device_ids[0])
            known = find_hardware(name)
            log.warning(
                "cost.device is 'cpu', but the run is on %s, expected its name in the price list: --cost.device %s",
                name,
                known.device if known else "NAME --cost.usd_per_device_hour PRICE",
            )

    def _rest(self) -> None:
        if self.ledger is not None and not self.ledger.closed:
            self.ledger.enter("idle")
            self.ledger.flush()


def _meter(trainer: Trainer) -> EnergyMeter | None:
    """Return a meter of the GPUs of this machine that the run holds; the other machines' are not read."""
    if not isinstance(trainer.accelerator, CUDAAccelerator):
        return None
    return nvml_meter([str(torch.cuda.get_device_properties(index).uuid) for index in trainer.device_ids])
