"""The files that DeepSpeed's ranks make of a model and its optimizer: within a checkpoint, and back to whole weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAG = "shards"
"""Folder within a checkpoint's state that DeepSpeed writes to."""


def detach_failures(engine: Any) -> None:
    """Let a rank that cannot write go on to DeepSpeed's next barrier, where the others would wait for it in vain.

    The errors are kept for :func:`save` to raise. The scripts that DeepSpeed adds to a checkpoint are left out.
    """
    errors: list[OSError] = []
    engine.checkpoint_engine.save = _noting(errors, _write)
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


def load(engine: Any, folder: Path, *, optimizer: bool) -> dict[str, Any]:
    """Read the shards of this rank, and return the state beside them.

    Args:
        engine: A DeepSpeed engine.
        folder: What ``save`` was given.
        optimizer: Whether training goes on.
    """
    path, state = engine.load_checkpoint(
        folder, tag=TAG, load_optimizer_states=optimizer, load_lr_scheduler_states=False
    )
    assert path is not None, f"{folder} holds no {TAG}"
    client: dict[str, Any] = state
    return client


def whole_state(folder: Path) -> dict[str, Tensor]:
    """Return all weights in fp32, and all buffers, from the shards of all ranks, in the memory of this process."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _write(state: Any, path: str) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # here: on a shared file system rank 0 cannot do it for the others


def _noting(errors: list[OSError], function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except OSError as error:
            errors.append(error)

    return call
