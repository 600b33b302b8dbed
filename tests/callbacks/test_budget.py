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
from ds_lightning.cost import Ledger
from ds_lightning.optim import WarmupStableDecay
from ds_lightning.training import checkpoint
from tests.callbacks.toy_run import At, stop
from tests.training.toy_pretraining import Recorder, Rows, build, draw_step, split, trainer

STEPS = 12
STEP_TOKENS = draw_step(0)["step_tokens"]
FALL = WarmupStableDecay(warmup=0.0, decay=1.0)


class Clock(Callback):
    """A clock that stands still but for an hour in the last micro-batch of every step."""

    def __init__(self) -> None:
        self.hours = 0.0

    def __call__(self) -> int:
        return round(self.hours * 3600e9)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.hours += 1


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
    ) -> None:
        self.budget, self.clock, self.recorder = budget, Clock(), Recorder()
        cost = CostLedger("mine", usd_per_device_hour=2.0)
        cost.ledger = Ledger.open(folder / "ledger.jsonl", cost.price, clock=self.clock, started_ns=0, background=False)
        self.clock.hours = startup
        self.module = build(steps * STEP_TOKENS, lr=0.01, lr_schedule=FALL)
        callbacks = (self.clock, cost, budget, self.recorder, Checkpoints(every_n_steps=100), *callbacks)
        self.trainer = trainer(*callbacks, accumulate=accumulate, default_root_dir=folder, enable_checkpointing=True)
        newest, _ = checkpoint.newest_valid(folder / "checkpoints")
        done = checkpoint.verify(newest).step if newest else 0
        micro_batches = split(draw_step(0), accumulate) * steps
        data = Rows(micro_batches)
        data.train_dataloader = lambda: _Rest(micro_batches, done * accumulate)  # type: ignore[method-assign,assignment,return-value]
        path = newest and newest / checkpoint.STATE
        self.trainer.fit(self.module, data, ckpt_path=path)
        self.progress = self.module.budget_progress
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
        ({"usd": 10}, 5),
        ({"hours": 4}, 4),
        ({"usd": 10, "hours": 3}, 3),
        ({"usd": 4, "hours": 3}, 2),
        ({"usd": 9}, 5),  # a step begun is finished
        ({"usd": 1e-9}, 1),
    ],
)
def test_the_run_ends_with_the_step_in_which_dollars_or_hours_are_spent(
    tmp_path: Path, limits: dict[str, float], last_step: int
) -> None:
    run = Run(tmp_path, Budget(**limits))
    assert run.step == last_step
    assert run.budget.reached
    newest, skipped = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / f"step-{last_step:08d}"
    assert skipped == []
    assert checkpoint.verify(newest).tokens == run.module.tokens_seen == last_step * STEP_TOKENS


def test_micro_batches_are_no_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=3), accumulate=4)
    assert run.step == 3
    assert run.module.tokens_seen == 3 * STEP_TOKENS


def test_the_schedule_ends_when_the_budget_does(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(usd=8))
    assert run.recorder.rates == pytest.approx([0.01 * (1 - spent) for spent in (0, 0.25, 0.5, 0.75)])
    assert run.progress == 1.0
    assert run.module.progress == 1.0


def test_a_budget_larger_than_the_run_changes_nothing(tmp_path: Path) -> None:
    run, free = Run(tmp_path / "a", Budget(usd=48)), Run(tmp_path / "b", Budget())
    assert run.step == free.step == STEPS
    assert not run.budget.reached
    assert not free.budget.reached
    assert run.progress == 0.5, "24 of 48 dollars"
    assert free.progress == 0.0
    assert run.recorder.rates == pytest.approx([0.01 * (1 - done / STEPS) for done in range(STEPS)])
    assert all(map(torch.equal, run.module.state_dict().values(), free.module.state_dict().values()))


def test_the_start_of_the_process_is_paid_for(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=4), startup=2.0)
    assert run.step == 2
    assert run.recorder.rates == pytest.approx([0.01, 0.01 * (1 - 3 / 4)])  # the first rate was set before the start


def test_what_earlier_attempts_have_cost_counts(tmp_path: Path) -> None:
    first = Run(tmp_path, Budget(hours=3))
    assert (first.step, first.budget.reached) == (3, True)
    second = Run(tmp_path, Budget(hours=7), startup=1.0)  # 3 + 1 hours are gone
    assert (second.step, second.budget.reached) == (6, True)
    assert second.progress == 1.0
    assert second.recorder.rates[1:] == pytest.approx([0.01 * (1 - 5 / 7), 0.01 * (1 - 6 / 7)])


def test_a_run_resumed_on_a_spent_budget_ends_with_its_next_step(tmp_path: Path) -> None:
    Run(tmp_path, Budget(usd=4))
    again = Run(tmp_path, Budget(usd=4))
    assert (again.step, again.budget.reached) == (3, True)


def test_a_run_that_finishes_in_the_step_of_its_last_dollar_is_finished(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=3), steps=3)
    assert run.step == 3
    assert run.progress == 1.0
    assert not run.budget.reached


def test_a_run_that_something_else_stops_has_not_reached_its_budget(tmp_path: Path) -> None:
    run = Run(tmp_path, Budget(hours=9), At(stop, micro_batch=1))
    assert run.step == 2
    assert not run.budget.reached


def test_a_callback_forgets_its_earlier_run(tmp_path: Path) -> None:
    budget = Budget(hours=4)
    assert Run(tmp_path / "a", budget).budget.reached
    assert not Run(tmp_path / "b", budget, steps=2).budget.reached


def test_ranks_without_a_ledger_follow_the_first_one() -> None:
    budget, module = Budget(usd=4), SimpleNamespace(budget_progress=0.0)
    checkpoints, other = Mock(spec=Checkpoints), Mock(spec=CostLedger, ledger=None)
    run: Any = Mock(spec=Trainer, callbacks=[other, checkpoints])
    run.strategy.broadcast = lambda spent: 0.75
    budget.on_before_optimizer_step(run, module, None)  # type: ignore[arg-type]
    assert module.budget_progress == 0.75
    checkpoints.save_and_stop.assert_not_called()
    run.strategy.broadcast = lambda spent: 1.25
    budget.on_before_optimizer_step(run, module, None)  # type: ignore[arg-type]
    checkpoints.save_and_stop.assert_called_once_with()


@pytest.mark.parametrize("name", ["usd", "hours"])
@pytest.mark.parametrize("value", [-1, 0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^budget\.{name} is {value}, expected more than 0$"):
        Budget(**{name: value})


def test_a_trainer_that_books_or_saves_nothing_is_refused_before_training(tmp_path: Path) -> None:
    for callbacks, missing in (([], "CostLedger"), ([CostLedger()], "Checkpoints")):
        message = f"^Budget: trainer.callbacks has no {missing}, expected one: add it, or remove Budget$"
        with pytest.raises(ValueError, match=message):
            trainer(*callbacks, Budget(hours=1), default_root_dir=tmp_path).fit(build(), Rows([draw_step(0)]))
