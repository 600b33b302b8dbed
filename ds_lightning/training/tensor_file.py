"""Files of tensors, on the disk when they are written."""

import os
from pathlib import Path
from typing import Any

import torch


def write_tensors(state: Any, path: str | Path) -> None:
    """Write what ``torch.save`` takes, and synchronise it to the disk.

    On a shared file system only the host that wrote a file can do that.

    Raises:
        OSError: If it cannot be written: torch turns it into an error about positions in an archive.
    """
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
