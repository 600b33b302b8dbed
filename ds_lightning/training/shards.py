"""The files that DeepSpeed's ranks make of a run: within a checkpoint, and back to whole weights."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lightning.optim.sharded_matrices import Cut
from ds_lightning.training.tensor_file import write_tensors

TAG = "shards"
"""Folder within a checkpoint's state that DeepSpeed writes to."""


def import_deepspeed() -> None:
    """Import DeepSpeed without what it says of a missing GPU and of torch's plans; the rest goes to stderr."""
    log = logging.getLogger("DeepSpeed")
    log.addFilter(_is_of_use)
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    import deepspeed  # noqa: F401

    for handler in log.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def flat_tensors(engine: Any) -> list[Tensor]:
    """Return what DeepSpeed's optimizer steps on in this rank, in fp32: one a parameter group, at stage 3 or more."""
    names = "fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"
    found: list[Tensor] = next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))
    return found


def cuts(shapes: Sequence[Mapping[str, torch.Size]], stage: int, ranks: int) -> list[dict[str, Cut]]:
    """Return how DeepSpeed cuts parameters, one mapping a flat tensor, in its order.

    Stages 1 and 2 lay the parameters of a group in a row and cut that into equal shards; stage 3 cuts each parameter.

    Args:
        shapes: Of the parameters by name, one mapping a flat tensor: ``engine._get_zero_param_shapes()``.
        stage: Of ZeRO.
        ranks: Of the run.
    """
    return [(_cut_each if stage == 3 else _cut_in_a_row)(group, ranks) for group in shapes]


def _cut_in_a_row(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, Cut]:
    total = sum(shape.numel() for shape in shapes.values())
    shard, origin, found = -(-total // (2 * ranks)) * 2, 0, {}  # aligned to 4 bytes of bfloat16
    for name, shape in shapes.items():
        found[name] = Cut(shape.numel(), origin, shard, base=0)
        origin += shape.numel()
    return found


def _cut_each(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, Cut]:
    base, found = 0, {}
    for name, shape in shapes.items():
        shard = -(-shape.numel() // ranks)
        found[name] = Cut(shape.numel(), origin=0, shard=shard, base=base)
        base += shard
    return found


def detach_failures(engine: Any) -> None:
    """Let a rank that cannot write go on to DeepSpeed's next barrier, where the others would wait for it in vain.

    The errors are kept for :func:`save` to raise. The scripts that DeepSpeed adds to a checkpoint are left out.
    """
    errors: list[OSError] = []
    stage = engine.zero_optimization_stage()
    engine.checkpoint_engine.save = _noting(
        errors, lambda state_dict, path: write_tensors(_with_stage(state_dict, stage), path)
    )
    engine.checkpoint_engine.makedirs = _noting(errors, os.makedirs)
    engine._copy_recovery_script = lambda save_path: None
    engine.write_errors = errors


def save(engine: Any, state: dict[str, Any], folder: Path) -> None:
    """Write the shards of this rank, with rank 0 the state beside them; all ranks must call it.

    Raises:
        OSError: If a file of this rank could not be written.
    """
    engine.write_errors.clear()
    engine.save_checkpoint(folder, tag=TAG, client_state=state, save_latest=False)
    if engine.write_errors:
        raise engine.write_errors[0]


def load(engine: Any, folder: Path) -> dict[str, Any]:
    """Read the shards of this rank for training to go on, and return the state beside them.

    Args:
        engine: A DeepSpeed engine with an optimizer.
        folder: What ``save`` was given.
    """
    path, state = engine.load_checkpoint(folder, tag=TAG, load_lr_scheduler_states=False)
    assert path is not None, f"{folder} holds no {TAG}"
    client: dict[str, Any] = state
    return client


def model_state(folder: Path, rank: int = 0) -> dict[str, Any]:
    """Return what a rank wrote beside its shards: the run's state, buffers, and below stage 3 rounded weights.

    Args:
        folder: What ``save`` was given.
        rank: 0, or at stage 3 any.
    """
    names = "mp_rank_00_model_states.pt", f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"  # below stage 3, and at it
    path = next(folder / TAG / name for name in names if (folder / TAG / name).is_file())
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)  # verified before, and our own
    return state


def optimizer_state(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank wrote of its optimizer; tensors are read from the file as they are used."""
    [path] = (folder / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    return state


def load_client_state(folder: Path) -> dict[str, Any]:
    """Return the state that rank 0 wrote beside its shards."""
    return {name: value for name, value in model_state(folder).items() if name != "module"}


def whole_state(folder: Path) -> dict[str, Tensor]:
    """Return all weights in fp32, and all buffers, from the shards of all ranks, in the memory of this process."""
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it tells how it gets on
        state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _with_stage(state_dict: dict[str, Any], stage: int) -> dict[str, Any]:
    """Name the stage in a rank's shard: DeepSpeed leaves it out at stage 1 with bfloat16 weights, and asks for it."""
    shard = state_dict.get("optimizer_state_dict")
    if shard is not None:
        shard.setdefault("zero_stage", stage)
    return state_dict


def _noting(errors: list[OSError], function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except OSError as error:
            errors.append(error)

    return call
