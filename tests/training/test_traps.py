"""Seven faults of Lightning's and DeepSpeed's own classes, each shown by them and not by ours.

That theirs still have them is asserted too: where one is mended upstream, a test here fails, and what we do about it
can go. The oracles: the closed form of a step of SGD on a line, in fp64; the run left alone; a fault made on purpose.
fp32 rounds a weight of at most 0.125 by some 1e-8, and the gradient of norm 4, times the rate of 0.01, by some 1e-8.
"""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ds_lightning.callbacks import Preemption
from ds_lightning.training.precision import ZeROPrecision
from tests.callbacks.toy_run import At, Run, send
from tests.training.ranks import run_ranks
from tests.training.toy_line import KINDS, MICRO_BATCHES, RATE, STAGES, STEPS, Batch, Result, step

ROUNDING: dict[str, Any] = {"rtol": 0.0, "atol": 1e-7}

kinds = pytest.mark.parametrize("kind", KINDS)
stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one rank shows, by kind."""
    [result] = run_ranks("tests.training.toy_line:one", str(tmp_path_factory.mktemp("one")), ranks=1)
    return dict(result)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Result]]]:
    """What each of two ranks shows, by kind and stage."""
    return run_ranks("tests.training.toy_line:two", str(tmp_path_factory.mktemp("two")))


def gradient(weight: Tensor, batches: list[Batch]) -> Tensor:
    """Return the gradient of the mean square over the rows of all batches."""
    x, y = (torch.cat([batch[key] for batch in batches]).double() for key in ("x", "y"))
    return 2 / len(x) * (x.T @ (x @ weight.double()[:, None] - y)).flatten()


@stages
@pytest.mark.parametrize(("kind", "share"), [("stock", 1 / MICRO_BATCHES), ("ours", 1.0)])
def test_trap_1_a_step_of_four_micro_batches_is_the_whole_step(
    one: dict[str, Any], kind: str, share: float, stage: int
) -> None:
    run = one[kind]["accumulated"][stage]
    whole = gradient(run["weights"][0], step())
    torch.testing.assert_close(run["weights"][-1].double(), run["weights"][0] - share * RATE * whole, **ROUNDING)
    assert float(run["norm"]) == pytest.approx(share * float(whole.norm()), rel=1e-5)


@stages
def test_trap_2_gradients_of_several_backward_passes_are_not_lost(one: dict[str, Any], stage: int) -> None:
    run = one["stock"]["manual"][stage]
    assert run["error"] == ""
    kept = gradient(run["weights"][0], step()[-1:]) / MICRO_BATCHES
    torch.testing.assert_close(run["weights"][-1].double(), run["weights"][0] - RATE * kept, **ROUNDING)
    assert one["ours"]["manual"][stage]["error"] == (
        "ValueError: model: automatic_optimization is False, and of several backward passes before such a step ZeRO "
        "keeps the last one's gradient alone, expected True: let training_step return the loss of a micro-batch, and "
        "set trainer.accumulate_grad_batches"
    )


@pytest.mark.parametrize(("kind", "dtype"), [("stock", torch.bfloat16), ("ours", torch.float32)])
def test_trap_3_floats_of_a_batch_keep_their_precision(one: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    assert one[kind]["bf16"]["labels"] == [dtype] * MICRO_BATCHES
    batch = {"advantages": torch.tensor([0.1234567]), "input_ids": torch.tensor([3])}
    plugin = {"stock": DeepSpeedPrecision, "ours": ZeROPrecision}[kind]
    assert torch.equal(plugin("bf16-mixed").convert_input(batch)["advantages"], batch["advantages"].to(dtype))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (
            "stock",
            "RuntimeError: The DeepSpeed strategy is only supported on CUDA GPUs but `CPUAccelerator` is used.",
        ),
        ("ours", ""),
    ],
)
def test_trap_4_a_cpu_is_a_device(one: dict[str, Any], kind: str, error: str) -> None:
    assert one[kind]["cpu"]["error"] == error
    assert len(one[kind]["cpu"]["weights"]) == (0 if error else 1 + MICRO_BATCHES)


@kinds
def test_trap_5_random_numbers_go_on_where_they_were(one: dict[str, Any], kind: str) -> None:
    straight, resumed = one[kind]["numbers"]
    assert len(set(straight["drawn"])) == STEPS
    assert resumed["error"] == ""
    assert (resumed["drawn"] == straight["drawn"][3:]) == (kind == "ours")


@pytest.mark.soak
@pytest.mark.parametrize("stage", [2, 3])
@kinds
def test_trap_5_every_rank_gets_its_own_state_back(two: list[dict[str, list[Result]]], kind: str, stage: int) -> None:
    """The module of the stock run keeps the random state of its rank in a callback's state."""
    [first, second] = [rank[f"{kind} {stage}"] for rank in two]
    assert first[0]["drawn"] != second[0]["drawn"]
    assert first[1]["drawn"] == first[0]["drawn"][3:]
    others = kind == "stock" and stage == 2
    assert second[1]["drawn"] == (first if others else second)[0]["drawn"][3:]


@kinds
def test_trap_6_a_kill_in_a_save_leaves_the_save_before(one: dict[str, Any], kind: str) -> None:
    straight, killed = (one[kind]["saving"][name] for name in ("straight", "killed"))
    if kind == "stock":
        assert killed["error"].startswith("RuntimeError: PytorchStreamReader failed"), "the only checkpoint is torn"
        return
    assert killed["error"] == ""
    assert [torch.equal(*pair) for pair in zip(killed["weights"], straight["weights"][2:], strict=True)] == [True] * 3


@kinds
def test_trap_6_flipped_bits_are_found(one: dict[str, Any], kind: str) -> None:
    straight, flipped = (one[kind]["saving"][name] for name in ("straight", "flipped"))
    assert flipped["error"] == ""
    if kind == "stock":
        assert flipped["skipped"] == []
        assert float((flipped["weights"][-1] - straight["weights"][-1]).norm()) > 0.01, (
            "it trains on, from other weights"
        )
        return
    [reason] = flipped["skipped"]
    assert reason.startswith("state.ckpt/shards/zero_pp_rank_0_mp_rank_00_optim_states.pt has sha256 ")
    assert torch.equal(flipped["weights"][-1], straight["weights"][-1])


class Saves(Callback):
    """Keeps the micro-batch of every save, and whether it is made within a handler of signals."""

    def __init__(self) -> None:
        self.made: list[tuple[int, bool]] = []

    def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
        self.made.append((trainer.fit_loop.epoch_loop.batch_idx, within("_slurm_sigusr_handler_fn", "_handle")))


def within(*functions: str) -> bool:
    """Whether one of these functions is on the stack."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name not in functions:
        frame = frame.f_back
    return frame.f_code.co_name in functions


@kinds
def test_trap_7_nothing_is_saved_within_a_signal_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """That the command gives Slurm's signals to ours is a test of ``tests/cli/test_ranks.py``."""
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(signal_connector, "call", lambda command: 0)
    saves, signalled = Saves(), At(send(signal.SIGUSR1), micro_batch=4 * 6 + 1)
    slurm = SLURMEnvironment(auto_requeue=kind == "stock")
    Run(tmp_path, saves, signalled, *([Preemption()] if kind == "ours" else []), accumulate=4, plugins=[slurm])
    assert [index for index, _ in saves.made if index % 4 != 3] == ([25] if kind == "stock" else [])
    assert [index for index, handling in saves.made if handling] == ([25] if kind == "stock" else [])
    assert (4 * 6 + 3 in [index for index, _ in saves.made]) == (kind == "ours"), "the step that the signal came in"


@kinds
def test_trap_7_sigterm_costs_no_step(tmp_path: Path, kind: str) -> None:
    signalled = At(send(signal.SIGTERM), micro_batch=4 * 6 + 1)
    if kind == "ours":
        assert Run(tmp_path, signalled, Preemption(), accumulate=4).saved_steps == [6, 7]
        return
    with pytest.raises(SIGTERMException):
        Run(tmp_path, signalled, accumulate=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@kinds
def test_trap_7_ranks_do_not_wait_for_one_another_at_every_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_of_one: None, kind: str
) -> None:
    """One process stands for the first of two; nobody gets what it sends."""
    sent: list[bool] = []
    monkeypatch.setattr(Trainer, "world_size", property(lambda trainer: 2))
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda tensor, src: sent.append(within("_sigterm_notifier_fn", "_handle"))
    )
    signalled = At(send(signal.SIGTERM), micro_batch=4 * 6 + 1)
    if kind == "ours":
        assert Run(tmp_path, signalled, Preemption(), accumulate=4).saved_steps == [6, 7]
        assert sent == []
        return
    with pytest.raises(SIGTERMException):
        Run(tmp_path, signalled, accumulate=4)
    assert sent == [False] * 26 + [True], "one at every micro-batch, and one within the handler"
