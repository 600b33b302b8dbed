"""The state of all random generators of a process, in a file and back."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_lightning.training.tensor_file import write_tensors


def write_random_state(path: Path) -> None:
    """Write the state of every generator, in types that load without unpickling code.

    Raises:
        OSError: If the file cannot be written.
    """
    state = {
        "python": random.getstate(),
        "numpy": [value.tolist() if isinstance(value, np.ndarray) else value for value in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # of this rank's device
    }
    write_tensors(state, path)


def restore_random_state(path: Path) -> list[str]:
    """Set every generator to the state in a file.

    Returns:
        What could not be restored, a line each: what follows is then not bitwise what would have been.
    """
    if not path.is_file():
        return [f"{path} is missing: the random state of this rank is not restored, the run goes on from a fresh one"]
    state: dict[str, Any] = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if (state["cuda"] is not None) != torch.cuda.is_initialized():
        there, here = ("a CUDA device", "none") if state["cuda"] is not None else ("no CUDA device", "one")
        return [f"random state of {there} in {path}, {here} here: what follows is not bitwise what would have been"]
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    return []
