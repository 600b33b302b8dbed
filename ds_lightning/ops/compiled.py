"""C++ files of ours as libraries: compiled for this processor once, kept in the user's cache."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEADER = Path(__file__).with_name("products.h")
"""What all of them include."""

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
"""Not ``-ffast-math``: a sum keeps its order, and an infinity is one. OpenMP is torch's own, loaded before."""

GRAIN = 2**18
"""Multiplications for which it is worth to wake a thread."""

_log = logging.getLogger(__name__)


@cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """Return the library, or None where it cannot be made, which one line says.

    Args:
        source: A file that needs nothing but the standard library and :data:`HEADER`.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        target = _macros(compiler)  # of the compiler, and of the processor that it finds
        parts = [source.read_bytes(), HEADER.read_bytes(), " ".join(FLAGS).encode(), target]
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()
        library = _cache_folder() / f"{source.parent.name}-{key[:32]}.so"
        if not library.is_file():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.decode().splitlines() if "error" in line), str(error))
    except OSError as error:
        reason = str(error)
    name = f"{source.parent.name}/{source.name}"
    _log.warning("%s cannot compile %s: the CPU takes longer: %s", compiler, name, reason)
    return None


@cache
def _compiler() -> str | None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        _log.warning("no C++ compiler on PATH (%s): the CPU takes up to twice as long", ", ".join(COMPILERS))
    return compiler


def compile_all() -> None:
    """Compile every kernel of the package before its first use, where there is a compiler."""
    for source in sorted(HEADER.parent.parent.rglob("*.cpp")):
        compiled(source)


def threads_for(work: int) -> ctypes.c_int64:
    """Return on how many of torch's threads to do so many multiplications: microseconds' worth on each, at least."""
    return ctypes.c_int64(max(1, min(torch.get_num_threads(), work // GRAIN)))


def takes(source: Path, *inputs: Tensor) -> bool:
    """Tell whether a kernel takes these tensors, in the precision around them: fp32 on a CPU, and compiled."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs) and compiled(source) is not None


def call(source: Path, function: str, arguments: ctypes.Structure, work: int) -> None:
    """Call a kernel that takes one structure, and the number of threads for so many multiplications."""
    library = compiled(source)
    assert library is not None, "who asks takes() first"
    getattr(library, function)(ctypes.byref(arguments), threads_for(work))


def _cache_folder() -> Path:
    """Return a folder that nobody else can write to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_lightning"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _macros(compiler: str) -> bytes:
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", "-"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Publish the library whole, however many processes make it at once."""
    handle, name = tempfile.mkstemp(dir=library.parent, prefix=f"{library.stem}-", suffix=".tmp")
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *FLAGS, "-I", str(HEADER.parent), str(source), "-o", name], capture_output=True, check=True
        )
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
