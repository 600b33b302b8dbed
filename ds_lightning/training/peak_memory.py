"""The most memory that a process has held."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory of this process so far, in GB (1e9 bytes).

    On a GPU what tensors took there, without the driver's context and the allocator's reserve. On a CPU the resident
    set: interpreter, libraries, everything.
    """
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()) / 1e9


def peak_resident_bytes() -> int:
    """Return the high-water mark of this process's resident set.

    Linux keeps it by address space. What ``getrusage`` tells survives ``exec``, so that a small process started by a
    large one would report the size of its parent; it is asked elsewhere only, where it counts bytes on macOS.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
