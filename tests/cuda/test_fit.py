"""``ds-lightning fit`` on one GPU.

The oracles: the same run on the CPU in fp32, whose rounding is another; for a run that was killed, the run left alone,
bitwise; for the export, the last checkpoint.
"""

from pathlib import Path

import pytest
import torch

from ds_lightning.models.hf import load_hf
from tests.callbacks.toy_run import differences
from tests.cuda.runs import run, worst
from tests.e2e.command import Run


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> Run:
    return run(folder, "cpu", "cpu").attempt()


@pytest.fixture(scope="module")
def straight(folder: Path, on_cpu: Run) -> Run:
    return run(folder, "straight", "gpu1").attempt()


def test_in_fp32_the_curve_is_that_of_the_cpu(folder: Path, on_cpu: Run) -> None:
    found = run(folder, "fp32", "gpu1", trainer__precision="32-true").attempt().logged()
    for tag in ("train/loss", "val/loss"):
        gap = worst(found[tag], on_cpu.logged()[tag])
        print(f"{tag}: {gap:.1e}")
        # Products in fp32, not TF32: another order of sums, over twelve steps of AdamW, as between ranks on a CPU.
        assert gap < 1e-4


def test_in_bf16_the_curve_is_close_to_that_of_fp32_on_the_cpu(straight: Run, on_cpu: Run) -> None:
    for tag in ("train/loss", "val/loss"):
        gap = worst(straight.logged()[tag], on_cpu.logged()[tag])
        print(f"{tag}: {gap:.1e}")
        assert 1e-6 < gap < 5e-3, "eight bits of mantissa in products, averaged over 512 tokens a step"


def test_the_export_loads_and_holds_the_weights_of_the_last_checkpoint(straight: Run) -> None:
    model = load_hf(straight.out / "weights")
    state = straight.state()["state_dict"]
    assert differences({f"model.{name}": value for name, value in model.state_dict().items()}, _on_cpu(state)) == []
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def _on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in state.items() if name.startswith("model.")}


def test_a_killed_run_is_bitwise_the_run_left_alone(folder: Path, straight: Run) -> None:
    killed = run(folder, "killed", "gpu1")
    killed.attempt("SIGKILL micro_batch 9", status=-9).attempt("SIGKILL save 9", status=-9).attempt()
    assert [attempt.started_from for attempt in killed.attempts] == [0, 3, 6]
    assert killed.logged() == straight.logged()
    assert differences(killed.state(), straight.state()) == []
    assert differences(killed.exported(), straight.exported()) == []
    assert killed.ledger()["chain"] == "ok"


def test_lightnings_deterministic_mode_runs_with_samples_and_repeats_itself(folder: Path, on_cpu: Run) -> None:
    once, again = (run(folder, name, "gpu1", trainer__deterministic=True).attempt() for name in ("once", "again"))
    assert once.logged() == again.logged()
    assert differences(once.exported(), again.exported()) == []
