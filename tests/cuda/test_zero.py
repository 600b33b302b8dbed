"""DeepSpeed's ZeRO and torch's DDP on one GPU with NCCL, under the trainer files that ship.

The oracles: the run left alone, bitwise, for one that was killed; the same run without ZeRO on the CPU in fp32 for the
curve.
"""

from pathlib import Path

import pytest

from ds_lightning.models.hf import load_hf
from tests.callbacks.toy_run import differences
from tests.cuda.runs import run, worst
from tests.e2e.command import NUM_STEPS, Run, start


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> Run:
    return run(folder, "cpu", "cpu").attempt()


@pytest.mark.parametrize("trainer", ["ddp8", "zero1", "zero2", "zero3", "zero3_offload"])
def test_a_strategy_trains_and_goes_on_where_it_was_killed(folder: Path, on_cpu: Run, trainer: str) -> None:
    straight = run(folder, trainer, trainer, trainer__devices=1).attempt()
    logged, expected = straight.logged(), on_cpu.logged()
    assert sorted(logged["train/loss"]) == list(range(NUM_STEPS))
    for tag in ("train/loss", "val/loss"):
        gap = worst(logged[tag], expected[tag])
        print(f"{trainer} {tag}: {gap:.1e}")
        assert 1e-6 < gap < 1e-2, "weights of eight bits in the forward pass, fp32 masters"
    killed = run(folder, f"{trainer}-killed", trainer, trainer__devices=1)
    killed.attempt("SIGKILL micro_batch 15", status=-9).attempt()
    assert [attempt.started_from for attempt in killed.attempts] == [0, 6]
    assert killed.logged() == logged
    assert differences(killed.exported(), straight.exported()) == []
    assert killed.ledger()["chain"] == "ok"
    assert load_hf(killed.out / "weights").config.num_hidden_layers == 2
    if trainer == "zero3":
        validated = start(folder, "validate", *killed.command()[1:])
        _, said = validated.communicate(timeout=120)
        assert validated.returncode == 0, said
