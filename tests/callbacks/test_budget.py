"""Oracles: arithmetic on a clock that moves one hour a step, at a price of two dollars an hour."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.callbacks import Budget, Checkpoints, CostLedger
from ds_lightning.cost import Ledger, find_price
from ds_lightning.optim import WarmupStableDecay
from ds_lightning.training import checkpoint
from tests.callbacks.toy_run import At, stop
from tests.training.toy_pretraining import Recorder, Rows, build, draw_step, split, trainer

STEPS, VALIDATION = 12, 5
STEP_TOKENS = draw_step(0)["step_tokens"]
FALL = WarmupStableDecay(warmup=0.0, decay=1.0)


class Clock(Callback):
    """A clock that moves by an hour in the last micro-batch of every step, and otherwise as it is told.

    Args:
        batch: Hours of a validation batch.
        first: Hours more of the first batch of a validation.
        save: Hours of a checkpoint.
        late: Hours at the end of training, which nobody expects.
    """

    def __init__(self, batch: float = 0.0, first: float = 0.0, save: float = 0.0, late: float = 0.0) -> None:
        self.hours = 0.0
        self.batch, self.first, self.save, self.late = batch, first, save, late
        self.validations: list[int] = []

    def __call__(self) -> int:
        return round(self.hours * 3600e9)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.hours += 1

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.hours += self.batch + (self.first if batch_idx == 0 else 0.0)
        if batch_idx == 0:
            self.validations.append(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        self.hours += self.save

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.hours += self.late


class Run:
    """One attempt of a run of ``STEPS`` steps in ``folder``, which goes on where an earlier one stopped."""

    def __init__(
        self,
        folder: Path,
        budget: Budget,
        *callbacks: Callback,
        startup: float = 0.0,
        steps: int = STEPS,
        accumulate: int = 1,
        clock: Clock | None = None,
        price: float = 2.0,
        devices: int = 1,
        save_every: int = 100,
        **options: Any,
    ) -> None:
        self.budget, self.clock, self.recorder = budget, clock or Clock(), Recorder()
        cost = CostLedger("mine", usd_per_device_hour=price)
        cost.ledger = Ledger.open(
            folder / "ledger.jsonl",
            cost.price,
            num_devices=devices,
            clock=self.clock,
            started_ns=0,
            background=False,
        )
        self.clock.hours = startup
        self.module = build(steps * STEP_TOKENS, lr=0.01, lr_schedule=FALL)
        callbacks = (self.clock, cost, budget, self.recorder, Checkpoints(every_n_steps=save_every), *callbacks)
        options |= {"default_root_dir": folder, "enable_checkpointing": True}
        self.trainer = trainer(*callbacks, accumulate=accumulate, **options)
        newest, _ = checkpoint.newest_valid(folder / "checkpoints")
        done = checkpoint.verify(newest).step if newest else 0
        micro_batches = split(draw_step(0), accumulate) * steps
        data = Rows(micro_batches, [draw_step(1)] * VALIDATION)
        data.train_dataloader = lambda: _Rest(micro_batches, done * accumulate)  # type: ignore[method-assign,assignment,return-value]
        path = newest and newest / checkpoint.STATE
        self.trainer.fit(self.module, data, ckpt_path=path)
        self.progress = self.module.budget_progress
        if budget.reached and budget.pays_validation:
            self.trainer.limit_val_batches = 1.0
            self.trainer.validate(self.module, data, verbose=False)
        self.totals = cost.ledger.totals()
        cost.ledger.close()

    @property
    def step(self) -> int:
        return self.trainer.global_step


class _Rest:
    """Batches from where the run stands; the length is that of the whole run, as Lightning counts."""

    def __init__(self, batches: list[dict[str, Any]], first: int) -> None:
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches[self.first :])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("limits", "last_step"),
    [
        ({"usd": 10.2}, 5),
        ({"hours": 4.1}, 4),
        ({"usd": 10.2, "hours": 3.1}, 3),
        ({"usd": 4.2, "hours": 3.1}, 2),
        ({"usd": 9}, 4),  # a fifth hour would cost more
    ],
)
def test_the_run_ends_with_the_last_step_that_is_paid_for(
    tmp_path: Path, limits: dict[str, float], last_step: int
) -> None:
    run = Run(tmp_path, Budget(**limits, reserve=0))
    assert run.step == last_step
    assert run.budget.reached in [{name: value} for name, value in limits.items()]
    newest, skipped = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / f"step-{last_step:08d}"
    assert skipped == []
    assert checkpoint.verify(newest).tokens == run.module.tokens_seen == last_step * STEP_TOKENS


def test_micro_batches_are_no_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=3.1, reserve=0), accumulate=4)
    assert run.step == 3
    assert run.module.tokens_seen == 3 * STEP_TOKENS


def test_the_last_step_is_made_with_the_final_rate(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(usd=12.2, reserve=0))  # 6.1 hours, two steps of which are kept for the end
    assert run.recorder.rates == pytest.approx([0.01 * max(1 - hours / 4.1, 0) for hours in range(6)])
    assert run.progress >= 1.0
    assert run.module.progress == 1.0


def test_a_budget_larger_than_the_run_changes_nothing(tmp_path: Path) -> None:
    run, free = Run(tmp_path / "a", Budget(usd=52, reserve=0)), Run(tmp_path / "b", Budget())
    assert run.step == free.step == STEPS
    assert run.budget.reached is free.budget.reached is None
    assert run.progress == 0.5, "24 of 48 dollars: four are kept"
    assert free.progress == 0.0
    assert run.recorder.rates == pytest.approx([0.01 * (1 - done / STEPS) for done in range(STEPS)])
    assert all(map(torch.equal, run.module.state_dict().values(), free.module.state_dict().values()))


def test_the_start_of_the_process_is_paid_for(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=4.1, reserve=0), startup=2.0)
    assert run.step == 2
    assert run.recorder.rates == pytest.approx([0.01, 0.0])  # the first rate was set before the start


def test_what_earlier_attempts_have_cost_counts(tmp_path: Path) -> None:
    first = Run(tmp_path, Budget(hours=3.1, reserve=0))
    assert (first.step, first.budget.reached) == (3, {"hours": 3.1})
    second = Run(tmp_path, Budget(hours=7.1, reserve=0), startup=1.0)  # 3 + 1 hours are gone
    assert (second.step, second.budget.reached) == (6, {"hours": 7.1})
    assert second.recorder.rates[1:] == pytest.approx([0.01 * (1 - 5 / 5.1), 0.0])


@pytest.mark.parametrize(("budget", "price", "last_step"), [({"usd": 16.2}, 4.0, 5), ({"hours": 9.1}, 4.0, 6)])
def test_a_price_or_a_number_of_devices_that_changes_counts_from_then_on(
    tmp_path: Path, budget: dict[str, float], price: float, last_step: int
) -> None:
    Run(tmp_path, Budget(hours=3.1, reserve=0))  # three hours at two dollars
    run = Run(tmp_path, Budget(**budget, reserve=0), price=price, devices=2 if "hours" in budget else 1)
    assert run.step == last_step
    assert run.totals.usd == pytest.approx(6 + (last_step - 3) * price * (2 if "hours" in budget else 1))


def test_a_run_resumed_on_a_spent_budget_trains_no_further_step(tmp_path: Path) -> None:
    Run(tmp_path, Budget(usd=4.2, reserve=0))
    again = Run(tmp_path, Budget(usd=4.2, reserve=0))
    assert (again.step, again.budget.reached) == (2, {"usd": 4.2})
    assert again.recorder.rates == []
    assert again.totals.usd == 4


@pytest.mark.parametrize("hours", [40.0, 40.5, 41.0])
@pytest.mark.parametrize(("limit", "every"), [(1.0, 10), (2, 9), (2, 3), (0, 10)])
def test_the_end_is_paid_out_of_the_budget(tmp_path: Path, hours: float, limit: float, every: int) -> None:
    clock = Clock(batch=0.5, save=0.25)
    options: dict[str, Any] = {"limit_val_batches": limit, "val_check_interval": every, "save_every": 8}
    run = Run(tmp_path, Budget(hours=hours), steps=60, startup=1.5, clock=clock, **options)
    assert run.budget.reached == {"hours": hours}
    assert run.recorder.rates[-1] == 0.0
    assert clock.validations[-1] == run.step, "the last validation reads what was held out"
    export = 0.25
    if limit == 0:  # no validation batch was measured: it counts as a step
        export += VALIDATION * 0.5
    assert run.totals.device_hours + export <= hours
    assert run.totals.device_hours + export >= hours - 0.005 * hours - 1, "the margin, and less than a step"


def test_a_validation_on_the_way_that_would_eat_the_reserve_is_left_out(tmp_path: Path) -> None:
    clock = Clock(batch=1.0)
    run = Run(tmp_path, Budget(hours=31), steps=60, clock=clock, val_check_interval=8)
    # 8 steps, validation, 8 steps, validation: 26 hours. Five are kept, two of them not spent by a fast export.
    assert clock.validations == [8, run.step]
    assert 31 - 1 - 2 - 0.155 <= run.totals.device_hours <= 31


def test_the_first_batch_of_a_validation_warms_up(tmp_path: Path) -> None:
    clock = Clock(batch=0.5, first=2.0)
    run = Run(tmp_path, Budget(hours=60), steps=60, clock=clock, val_check_interval=10, save_every=8)
    assert run.budget.state_dict()["batch"] == 0.5 * 3600


def test_a_last_validation_that_has_become_too_expensive_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=10.1, reserve=0), clock=Clock(batch=0.5), val_check_interval=3)
    assert run.budget.reached
    assert not run.budget.pays_validation
    assert run.totals.device_hours <= 10.1


@pytest.mark.parametrize(("late", "pays"), [(2.85, True), (2.95, False)])
def test_half_of_the_margin_is_for_what_comes_after_the_last_validation(
    tmp_path: Path, *, late: float, pays: bool
) -> None:
    clock = Clock(batch=0.5, late=late)
    run = Run(tmp_path, Budget(hours=40.5), steps=60, clock=clock, val_check_interval=10)
    # 30 steps and two validations of 2.5 hours: 3 hours are left with a third one, the margin is 0.2.
    assert run.totals.device_hours == 35 + late + (2.5 if pays else 0)
    assert run.budget.pays_validation == pays


def test_a_new_run_that_cannot_pay_for_its_end_is_refused(tmp_path: Path) -> None:
    message = "^budget.usd is 9, of which 6 are spent, and to go on takes 5.045, expected more than 11.04$"
    with pytest.raises(ValueError, match=message):  # 5 batches of half an hour, and half a percent
        Run(tmp_path / "a", Budget(usd=9), startup=2.0, clock=Clock(batch=0.5), num_sanity_val_steps=2)
    with pytest.raises(ValueError, match=r"^budget.hours is 1, of which 1.5 are spent, .* expected more than 1\.50"):
        Run(tmp_path / "b", Budget(hours=1), startup=1.5)


def test_a_start_that_is_not_paid_for_is_known_from_the_ledger(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(usd=12.2, reserve=0), startup=1.5)
    assert run.totals.usd == 11
    price = find_price("mine", usd_per_device_hour=2.0)
    assert Budget(usd=14.1).missing_for_start(tmp_path, price, 1) is None
    said = Budget(usd=13.9).missing_for_start(tmp_path, price, 1)
    assert said == "budget.usd is 13.9, of which 11 are spent, and to go on takes 3, expected more than 14"
    assert Budget(usd=14.1).missing_for_start(tmp_path, price, 2) is not None
    assert Budget().missing_for_start(tmp_path, price, 1) is None
    assert Budget(usd=1).missing_for_start(tmp_path / "new", price, 1) is None


def test_a_run_that_finishes_in_the_step_of_its_last_dollar_is_finished(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=4.1, reserve=0), steps=3)
    assert run.step == 3
    assert run.progress >= 1.0
    assert not run.budget.reached


def test_a_run_that_something_else_stops_has_not_reached_its_budget(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=9, reserve=0), At(stop, micro_batch=1))
    assert run.step == 2
    assert not run.budget.reached


def test_a_callback_forgets_its_earlier_run(tmp_path: Path) -> None:
    budget = Budget(hours=4.1, reserve=0)
    assert Run(tmp_path / "a", budget).budget.reached
    assert not Run(tmp_path / "b", budget, steps=2).budget.reached


def test_ranks_without_a_ledger_follow_the_first_one() -> None:
    budget, module = Budget(usd=4), SimpleNamespace(budget_progress=0.0)
    checkpoints, other = Mock(spec=Checkpoints, hold_off=False), Mock(spec=CostLedger, ledger=None)
    run: Any = Mock(spec=Trainer, callbacks=[other, checkpoints])
    for progress, near in ((0.75, False), (0.9, True), (1.25, True)):
        run.strategy.broadcast = lambda standing, said=(progress, near, ""): said
        budget.on_before_optimizer_step(run, module, None)
        assert (module.budget_progress, checkpoints.hold_off) == (progress, near)
        checkpoints.save_and_stop.assert_not_called()
    budget.on_before_optimizer_step(run, module, None)
    checkpoints.save_and_stop.assert_called_once_with()


@pytest.mark.parametrize("name", ["usd", "hours"])
@pytest.mark.parametrize("value", [-1, 0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^budget\.{name} is {value}, expected more than 0$"):
        Budget(**{name: value})


def test_a_negative_reserve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^budget\.reserve is -1, expected 0 seconds or more$"):
        Budget(usd=1, reserve=-1)


def test_a_trainer_that_books_or_saves_nothing_is_refused_before_training(tmp_path: Path) -> None:
    for callbacks, missing in (([], "CostLedger"), ([CostLedger()], "Checkpoints")):
        message = f"^Budget: trainer.callbacks has no {missing}, expected one: add it, or remove Budget$"
        with pytest.raises(ValueError, match=message):
            trainer(*callbacks, Budget(hours=1), default_root_dir=tmp_path).fit(build(), Rows([draw_step(0)]))
