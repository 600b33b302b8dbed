"""A line fitted under ZeRO on a CPU, by Lightning's own classes and by ours, in ranks of ``ranks.py``.

Plain SGD without clipping, so that nothing hides a factor in the gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from ds_lightning.callbacks import Checkpoints
from ds_lightning.training import ZeRO, checkpoint
from tests.training.toy_zero import From

KINDS = ("stock", "ours")
STAGES = (1, 2, 3)
WIDTH, ROWS, RATE = 64, 4, 0.01
MICRO_BATCHES = 4
STEPS = 4  # of a run that saves after each

Batch = dict[str, Tensor]
Result = dict[str, Any]


def draw(index: int) -> Batch:
    """Return a micro-batch."""
    rng = torch.Generator().manual_seed(index)
    return {"x": torch.randn(ROWS, WIDTH, generator=rng), "y": torch.randn(ROWS, 1, generator=rng)}


def step() -> list[Batch]:
    """Return the micro-batches of an optimizer step."""
    return [draw(index) for index in range(MICRO_BATCHES)]


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy with nothing changed but that it does not ask for CUDA."""

    setup_environment = ZeRO.setup_environment
    setup_distributed = ZeRO.setup_distributed
    _setup_model_and_optimizer = ZeRO._setup_model_and_optimizer
    _device_rank = ZeRO._device_rank


class Line(LightningModule):
    """Keeps what it was given, and its weights after every micro-batch.

    Args:
        manual: Make the optimizer step itself, of a batch that is a list of micro-batches.
    """

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.net: nn.Linear | None = None
        self.labels: list[torch.dtype] = []
        self.drawn: list[float] = []
        self.weights: list[Tensor] = []

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.net = nn.Linear(WIDTH, 1, bias=False)

    def loss(self, batch: Batch) -> Tensor:
        assert self.net is not None
        result: Tensor = (self.net(batch["x"].to(self.net.weight.dtype)) - batch["y"]).square().mean()
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            for micro in batch:
                self.manual_backward(self.loss(micro) / len(batch))
            optimizer.step()
            return None
        self.labels.append(batch["y"].dtype)
        self.drawn.append(float(torch.rand(())))
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def on_train_start(self) -> None:
        self.weights.append(self.weight())

    def on_train_batch_end(self, *args: Any) -> None:
        self.weights.append(self.weight())

    def weight(self) -> Tensor:
        """Return the weight in full."""
        import deepspeed

        assert self.net is not None
        sharded = hasattr(self.net.weight, "ds_id")
        with deepspeed.zero.GatheredParameters([self.net.weight]) if sharded else nullcontext():
            return self.net.weight.detach().float().flatten().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Killed(BaseException):
    """Ends a run in this process as SIGKILL would end the process."""


class Cut(Callback):
    """Kills the run in the save of a step, when half of the optimizer's shard is on the disk."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine: Any = trainer.strategy.model
        save = engine.checkpoint_engine.save

        def cut(state_dict: Any, path: Any) -> None:
            save(state_dict, path)
            if trainer.global_step == self.step and "optim_states" in str(path):
                data = Path(path).read_bytes()
                Path(path).write_bytes(data[: len(data) // 2])
                raise Killed

        engine.checkpoint_engine.save = cut


class KillBefore(Callback):
    """Kills the run before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class OwnNumbers(Callback):
    """Keeps the random state of its rank in the checkpoint, as a user of Lightning would."""

    state: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"random": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["random"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state is not None:
            torch.set_rng_state(self.state)


def strategy_of(kind: str, stage: int) -> DeepSpeedStrategy:
    """Return ours, or Lightning's with buckets that fit the model."""
    if kind == "ours":
        return ZeRO(stage)  # type: ignore[arg-type]
    return OnCPU(stage=stage, allgather_bucket_size=10_000, reduce_bucket_size=10_000)


def fit(
    strategy: DeepSpeedStrategy,
    batches: list[Any],
    *callbacks: Callback,
    manual: bool = False,
    ranks: int = 1,
    seed: int = 0,
    ckpt_path: Any = None,
    val: list[Any] | None = None,
    **options: Any,
) -> Result:
    """Train an epoch on batches, and return what can be seen of it."""
    defaults: dict[str, Any] = {"precision": "32-true", "num_sanity_val_steps": 0}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False)
    module = Line(manual=manual)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=1,
        callbacks=list(callbacks),
        **{**defaults, "enable_checkpointing": bool(callbacks), **quiet, **options},
    )
    error = ""
    torch.manual_seed(seed + trainer.global_rank)
    try:
        trainer.fit(module, From(batches, 0), val and From(val, 0), ckpt_path=ckpt_path)
    except (Killed, MisconfigurationException, RuntimeError, ValueError, OSError) as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    engine: Any = trainer.strategy.model
    return {
        "error": error,
        "labels": module.labels,
        "drawn": module.drawn,
        "weights": module.weights,
        "norm": None if error else engine.get_global_grad_norm(),
    }


def saves_of(kind: str, folder: Path) -> Callback:
    """Return the callback that saves."""
    if kind == "ours":
        return Checkpoints(every_n_steps=1, keep_last=9)
    return ModelCheckpoint(folder / "checkpoints", save_top_k=0, save_last=True, every_n_train_steps=1)


def newest_of(kind: str, folder: Path) -> tuple[Path | None, list[str]]:
    """Return what a run would be told to go on from, and what was found to be no checkpoint."""
    if kind == "stock":
        return folder / "checkpoints" / "last.ckpt", []
    newest, skipped = checkpoint.newest_valid(folder / "checkpoints")
    return newest and newest / checkpoint.STATE, [skip.reason for skip in skipped]


def attempt(
    kind: str, folder: Path, *callbacks: Callback, stage: int = 2, resume: bool = False, **options: Any
) -> Result:
    """Train for four steps on one batch with a save after each, from the newest checkpoint or from the start."""
    newest, skipped = newest_of(kind, folder) if resume else (None, [])
    saves, batches = saves_of(kind, folder), [draw(0)] * (STEPS * options.get("accumulate_grad_batches", 1))
    options |= {"default_root_dir": folder, "ckpt_path": newest}
    return {**fit(strategy_of(kind, stage), batches, *callbacks, saves, **options), "skipped": skipped}


def flip(folder: Path, weight: Tensor) -> None:
    """Flip a bit in each of 64 bytes of a weight where the optimizer's shard of the newest checkpoint holds it."""
    whole, part = weight.numpy().tobytes(), slice(96, 160)
    [*_, file] = sorted(folder.rglob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    at = data.find(whole)
    assert at > 0, f"{file} does not hold the weight"
    data[at + part.start : at + part.stop] = bytes(byte ^ 1 for byte in whole[part])
    file.write_bytes(data)


def saving(kind: str, folder: Path) -> dict[str, Result]:
    """Return a run left alone, and what goes on where its twins were killed: one in a save, one before damage."""
    straight = attempt(kind, folder / "straight")
    attempt(kind, folder / "flipped", KillBefore(3))
    flip(folder / "flipped", straight["weights"][3])
    attempt(kind, folder / "killed", Cut(3))
    after = {name: attempt(kind, folder / name, resume=True) for name in ("flipped", "killed")}
    return {"straight": straight, **after}


def numbers(kind: str, folder: Path, stage: int, *callbacks: Callback, **options: Any) -> list[Result]:
    """Return a run left alone, and what goes on, from another seed, where its twin was killed."""
    straight = attempt(kind, folder / "straight", *callbacks, stage=stage, seed=10, **options)
    attempt(kind, folder / "parts", *callbacks, KillBefore(3), stage=stage, seed=10, **options)
    return [straight, attempt(kind, folder / "parts", *callbacks, stage=stage, resume=True, seed=20, **options)]


def one(folder: str) -> dict[str, dict[str, Any]]:
    """Return all that one rank can show, by kind."""
    return {kind: _one(kind, Path(folder) / kind) for kind in KINDS}


def _one(kind: str, folder: Path) -> dict[str, Any]:
    as_it_comes = DeepSpeedStrategy(stage=2) if kind == "stock" else ZeRO(2)
    accumulate: dict[str, Any] = {"accumulate_grad_batches": MICRO_BATCHES}
    return {
        "cpu": fit(as_it_comes, step()),
        "accumulated": {stage: fit(strategy_of(kind, stage), step(), **accumulate) for stage in STAGES},
        "manual": {stage: fit(strategy_of(kind, stage), [step()], manual=True) for stage in STAGES},
        "bf16": fit(strategy_of(kind, 2), step(), precision="bf16-mixed"),
        "saving": saving(kind, folder),
        "numbers": numbers(kind, folder / "numbers", 2),
    }


def two(folder: str) -> dict[str, list[Result]]:
    """Return what becomes of each rank's random numbers, by kind and stage."""
    at = Path(folder)
    runs = {"stock 2": OwnNumbers, "stock 3": OwnNumbers, "ours 2": None, "ours 3": None}
    return {
        name: numbers(name[:-2], at / name, int(name[-1]), *([own()] if own else []), ranks=2)
        for name, own in runs.items()
    }
