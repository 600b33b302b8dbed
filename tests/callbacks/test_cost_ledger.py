"""Oracles: the phases that a list of hooks must give, called by hand, and the wall-clock of real short fits."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from ds_lightning.callbacks import cost_ledger
from ds_lightning.callbacks.cost_ledger import CostLedger
from ds_lightning.cost import iter_ledger, ledger_report, read_ledger


class Logged:
    """A module that remembers what is logged."""

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.values: dict[str, float] = {}

    def log(self, name: str, value: float, **_: Any) -> None:
        self.values[name] = value


class Toy(LightningModule):
    """One weight, trained on numbers; each step takes a while and two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokens_seen = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        time.sleep(0.03)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.tokens_seen += 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(8, 1))  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def trainer(folder: Path, callbacks: list[Callback], max_steps: int = 4, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        val_check_interval=2,
        accumulate_grad_batches=2,
        **options,
    )


def mocks(folder: Path, **values: Any) -> tuple[Any, Any]:
    defaults = {"is_global_zero": True, "default_root_dir": str(folder), "world_size": 4, "global_step": 0}
    defaults |= {"accelerator": None}
    return SimpleNamespace(**{**defaults, **values}), Logged()


def test_hooks_switch_phases(tmp_path: Path) -> None:
    callback = CostLedger("h800")
    run, module = mocks(tmp_path)
    callback.setup(run, module, "fit")
    ledger = callback.ledger
    assert ledger is not None
    seen = [ledger.current_phase]
    for hook, args in (
        ("on_validation_start", ()),
        ("on_validation_end", ()),
        ("on_train_start", ()),
        ("on_train_batch_start", (None, 0)),
        ("on_train_batch_end", (None, None, 0)),
        ("on_validation_start", ()),
        ("on_validation_end", ()),
        ("on_train_end", ()),
    ):
        getattr(callback, hook)(run, module, *args)
        seen.append(ledger.current_phase)
    assert seen == ["startup", "validate", "startup", "data", "train", "data", "validate", "data", "idle"]
    with callback.phase("export"):
        assert ledger.current_phase == "export"
    callback.teardown(run, module, "fit")
    ledger.close()
    terms = read_ledger(tmp_path / "ledger.jsonl").last_terms
    assert terms is not None
    assert (terms.device, terms.num_devices, terms.usd_per_device_hour) == ("h800", 4, 2.0)


def test_costs_are_logged_when_an_optimizer_step_is_done(tmp_path: Path) -> None:
    callback = CostLedger("mine", usd_per_device_hour=3600)
    run, module = mocks(tmp_path)
    callback.setup(run, module, "fit")
    callback.on_train_start(run, module)
    callback.on_train_batch_end(run, module, None, None, 0)
    assert module.values == {}
    run.global_step, module.tokens_seen = 1, 96
    assert callback.ledger is not None
    before = callback.ledger.totals().usd
    callback.on_train_batch_end(run, module, None, None, 1)
    assert before < module.values["cost/usd"] < callback.ledger.totals().usd
    callback.ledger.close()
    assert module.values["cost/device_hours"] == pytest.approx(module.values["cost/usd"] / 3600)
    assert module.values["cost/tokens_per_usd"] == pytest.approx(96 / module.values["cost/usd"])
    assert list(iter_ledger(tmp_path / "ledger.jsonl"))[-1]["progress"] == {"step": 1, "tokens": 96}


def test_free_hardware_has_no_tokens_per_dollar(tmp_path: Path) -> None:
    callback = CostLedger("mine", usd_per_device_hour=0)
    run, module = mocks(tmp_path, global_step=1)
    callback.setup(run, module, "fit")
    callback.on_train_batch_end(run, module, None, None, 0)
    assert set(module.values) == {"cost/usd", "cost/device_hours"}
    assert callback.ledger is not None
    callback.ledger.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    callback = CostLedger()
    run, module = mocks(tmp_path, is_global_zero=False, global_step=1)
    callback.setup(run, module, "fit")
    callback.on_train_start(run, module)
    with callback.phase("checkpoint"):
        callback.on_train_batch_end(run, module, None, None, 0)
    callback.on_validation_start(run, module)
    callback.on_validation_end(run, module)
    callback.load_state_dict({"genesis": "x"})
    callback.teardown(run, module, "fit")
    assert callback.state_dict() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("NVIDIA H200", "--cost.device h200"), ("NVIDIA T1000", "--cost.device NAME --cost.usd_per_device_hour PRICE")],
)
def test_a_gpu_at_the_price_of_a_processor_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, remedy: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid of {index}"))
    asked = list[str]()
    monkeypatch.setattr(cost_ledger, "nvml_meter", asked.extend)
    on_gpu = {"accelerator": CUDAAccelerator(), "device_ids": [2, 3], "world_size": 2}
    for device in ("cpu", "h200"):
        callback = CostLedger(device)
        callback.setup(*mocks(tmp_path / device, **on_gpu), "fit")
        assert callback.ledger is not None
        callback.ledger.close()
    assert caplog.messages == [
        f"cost.device is 'cpu', but the run is on {name}, expected its name in the price list: {remedy}"
    ]
    assert asked == ["uuid of 2", "uuid of 3"] * 2, "the devices of the run, not all that there are"


def test_a_missing_price_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="no on-demand price for device 'h20'"):
        CostLedger("h20")


def test_a_fit_is_booked_to_its_wall_clock(tmp_path: Path) -> None:
    callback = CostLedger()
    run = trainer(tmp_path, [callback], enable_checkpointing=False)
    callback.setup(run, Toy(), "fit")  # opened here, so that the time of the tests before this one is in startup
    assert callback.ledger is not None
    before, began = callback.ledger.totals().seconds, time.monotonic()
    run.fit(Toy())
    elapsed = time.monotonic() - began
    callback.ledger.close()
    report = ledger_report(tmp_path)
    assert report["wall_seconds"] - sum(before.values()) == pytest.approx(elapsed, rel=0.01, abs=0.05)
    phases = report["phases"]
    assert phases["train"]["seconds"] >= 8 * 0.02
    assert phases["validate"]["seconds"] >= 4 * 0.03
    assert report["attempts"] == 1
    metrics = run.logged_metrics
    assert metrics["cost/tokens_per_usd"] == pytest.approx(8 / metrics["cost/usd"].item(), rel=1e-4)


def test_a_run_resumed_from_a_checkpoint_books_the_redone_work_as_lost(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer(tmp_path, [CostLedger(), save]).fit(Toy())
    first = ledger_report(tmp_path)
    again = CostLedger()
    run = trainer(tmp_path, [again])
    run.fit(Toy(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert again.ledger is not None
    again.ledger.close()
    report = ledger_report(tmp_path)
    assert report["attempts"] == 2
    assert "lost" not in first["phases"]
    # Two of four optimizer steps, of two batches each, were redone: they count once as lost and once as train.
    redone = sum(first["phases"][phase]["seconds"] for phase in ("data", "train", "validate"))
    assert 4 * 0.02 <= report["phases"]["lost"]["seconds"] < redone
    assert report["phases"]["train"]["seconds"] >= 8 * 0.02
    assert report["wall_seconds"] == pytest.approx(sum(report["attempt_seconds"].values()))
    assert report["attempt_seconds"]["1"] >= first["attempt_seconds"]["1"]


def test_validating_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    callback = CostLedger()
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer(tmp_path, [callback, save]).fit(Toy())
    other = CostLedger()
    trainer(tmp_path, [other]).validate(Toy(), ckpt_path=str(tmp_path / "step=2.ckpt"), verbose=False)
    assert other.ledger is not None
    other.ledger.close()
    assert "lost" not in ledger_report(tmp_path)["phases"]


def test_a_failing_run_is_booked_up_to_its_failure(tmp_path: Path) -> None:
    class Broken(Toy):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            raise RuntimeError("broken")

    callback = CostLedger()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [callback], enable_checkpointing=False).fit(Broken())
    assert callback.ledger is not None
    assert callback.ledger.current_phase == "idle"
    assert list(iter_ledger(tmp_path / "ledger.jsonl"))[-1]["event"] == "flush"
    callback.ledger.close()


def test_one_callback_goes_on_in_its_attempt_and_a_new_folder_gets_its_own_ledger(tmp_path: Path) -> None:
    callback = CostLedger()
    for stage in ("fit", "validate"):
        callback.setup(*mocks(tmp_path / "a"), stage)
    first = callback.ledger
    callback.setup(*mocks(tmp_path / "b"), "fit")
    assert first is not None
    assert first.closed
    assert callback.ledger is not None
    assert callback.ledger.totals().wall_seconds < 0.5
    callback.ledger.close()
    assert len(read_ledger(tmp_path / "a" / "ledger.jsonl").attempt_nanoseconds) == 1


def test_a_process_is_booked_from_the_start_of_its_allocation_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time()) - 1000))
    if cost_ledger._current is not None:
        cost_ledger._current.close()
    for name, begins_with, at_most in (("asked", 1000, 1010), ("not asked", 0, 10)):
        monkeypatch.setattr(cost_ledger, "_current", None)
        callback = CostLedger(from_allocation=name == "asked")
        trainer(tmp_path / name, [callback], max_steps=1).fit(Toy())
        assert callback.ledger is not None
        assert begins_with <= callback.ledger.totals().seconds["startup"] < at_most
        callback.ledger.close()
