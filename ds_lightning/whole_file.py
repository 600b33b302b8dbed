"""Files that are there whole or not at all. Standard library only."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 by way of one beside it, and return its path; one process at a time.

    Raises:
        OSError: If it cannot be written; an earlier file is then as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary.replace(path)
