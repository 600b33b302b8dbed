"""The toy of ``toy_zero`` stopped after three of six steps by some ranks, and gone on with by others."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ds_lightning.callbacks import Checkpoints, RoutingBias
from ds_lightning.optim import muon_groups
from ds_lightning.training import checkpoint
from ds_lightning.training.strategy import zero_stage
from tests.training.toy_zero import Curves, Toy, rows_of, settings, trainer_of

STOP = 3
MODULE = {"lr": 1e-2, "eps": 1e-3, "optimizer": "muon"}

WRITERS = {
    "2 ranks": [(1, "32-true"), (2, "32-true"), (3, "32-true"), (1, "bf16-mixed")],
    "1 rank": [(2, "32-true")],
}
"""Who writes: stage and precision."""

READERS = {
    "1 rank": [("2 ranks", 2, 2), ("2 ranks", 3, 3), ("2 ranks", 1, 2)],
    "2 ranks": [("1 rank", 2, 2), ("2 ranks", 1, 3)],
    "4 ranks": [("2 ranks", 2, 2), ("2 ranks", 3, 3), ("2 ranks", 3, 1)],
}
"""Who goes on: from what was written by whom, under which stage, and under which."""


class Frozen(Toy):
    """Has a parameter that is not trained, and that begins with another value in every run."""

    def configure_model(self) -> None:
        super().configure_model()
        value = 10.0 * self.trainer.world_size + zero_stage(self.trainer.strategy)
        if not hasattr(self, "frozen"):
            self.frozen = torch.nn.Parameter(torch.full((3, 6), value), requires_grad=False)


class State(Callback):
    """Keeps at both ends of training the fp32 weights and the optimizer's states, as DeepSpeed brings them together."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step:
            self.start = whole_state(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.end = whole_state(trainer, pl_module)


def whole_state(trainer: Trainer, module: Any) -> dict[str, Tensor]:
    """Return weights, buffers and the optimizer's states in full, and the steps that AdamW has counted."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero: Any = trainer.strategy.model.optimizer  # type: ignore[union-attr]
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False  # its first step links them when it has made those of one group
        zero._lazy_init_hp_params_optimizer_state()
    hidden = {id(p) for group in muon_groups(module.model, 0.0) if group["muon"] for p in group["params"]}
    state = {f"{name} (buffer)": buffer.clone() for name, buffer in module.named_buffers()}
    with trainer.strategy.whole([module.frozen]):  # type: ignore[attr-defined]
        state["frozen"] = module.frozen.detach().clone()
    for name, parameter in module.model.named_parameters(prefix="model"):
        state[name] = safe_get_full_fp32_param(parameter).clone()
        for key in ("momentum",) if id(parameter) in hidden else ("exp_avg", "exp_avg_sq"):
            state[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    steps = {float(each["step"]) for each in zero.optimizer.state.values() if "step" in each}
    return {**state, "steps": torch.tensor(sorted(steps))}


def attempt(folder: Path, stage: int, precision: str = "32-true", *, stop: bool = False) -> dict[str, Any]:
    """Fit, from the newest valid checkpoint in the folder if there is one."""
    run = settings(stage=stage, module=MODULE, precision=precision)
    torch.manual_seed(0)
    module, curves, saves, state = Frozen(None, **MODULE), Curves(), Checkpoints(every_n_steps=99), State()

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if stop and batch_idx == STOP - 1:
                saves.save_and_stop()

    options = {"default_root_dir": folder, "enable_checkpointing": True}
    trainer = trainer_of(run, RoutingBias(), curves, state, Stop(), saves, **options)
    newest, _ = checkpoint.newest_valid(folder / "checkpoints")
    rows = rows_of(run, trainer, 0 if newest is None else STOP)
    trainer.fit(module, rows, ckpt_path=None if newest is None else newest / checkpoint.STATE)
    groups: Any = trainer.optimizers[0].param_groups
    return {
        "points": curves.points,
        "start": state.start,
        "end": state.end,
        "tokens": module.tokens_seen,
        "rates": [group["lr"] for group in groups],
    }


def write(folder: str, writer: str) -> list[dict[str, Any]]:
    """Write all that these ranks are to write."""
    return [
        attempt(Path(folder) / f"{writer} {stage} {precision}", stage, precision, stop=True)
        for stage, precision in WRITERS[writer]
    ]


def read(folder: str, reader: str) -> list[dict[str, Any]]:
    """Go on from copies of what others wrote; bfloat16 weights under stage 1 from what their own stage wrote."""
    results = [
        attempt(Path(folder) / f"{writer} {before} 32-true to {reader} {after}", after)
        for writer, before, after in READERS[reader]
    ]
    if reader == "1 rank":
        results.append(attempt(Path(folder) / "2 ranks 1 bf16-mixed to 1 rank 1", 1, "bf16-mixed"))
    return results
