"""A scoring process: one request a line in, one reply a reward out, both JSON. It imports no torch by itself.

:mod:`ds_lightning.rl.sandbox` starts it. Its first line of input holds the settings; it locks itself down, imports the
reward functions, answers ``ready`` and then serves requests until its input ends or it is killed.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ds_lightning.rl.lockdown import limit_cpu, lock_down

MESSAGE_CHARACTERS = 300
_PR_SET_PDEATHSIG = 1
_LIMIT_ERRORS = {  # Landlock answers a link across its border with EXDEV
    errno.EMFILE,
    errno.EFBIG,
    errno.EXDEV,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENETUNREACH,
    errno.EAGAIN,
}


def main() -> None:
    """Serve until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # what a reward function prints is nobody's reply
        os.dup2(nothing, standard)

    def reply(*message: Any) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    settings = json.loads(requests.readline())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    folder = settings["folder"]
    active = lock_down(folder, settings["readable"], settings["listable"], **settings["lock"])
    functions: list[Callable[..., Any]] = []
    for function in settings["functions"]:
        try:
            functions.append(_load(**function))
        except BaseException as error:
            reply(
                "failed", f"reward {function['file'] or function['module']}:{function['function']}: {_describe(error)}"
            )
            raise
    reply("ready", active)
    for line in requests:
        request = json.loads(line)
        for place in range(request["first"], len(functions)):
            limit_cpu(settings["cpu_seconds"])
            outcome = _call(functions[place], request, reply, place)
            _empty(folder)
            reply(request["call"], place, *outcome)


def _load(
    module: str, function: str, file: str | None, path: list[str], options: dict[str, Any], **_: Any
) -> Callable[..., Any]:
    """Return a reward function from a module on the path, or from a file."""
    sys.path += [entry for entry in path if entry not in sys.path]
    if file is None:
        loaded = importlib.import_module(module)
    else:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    found = getattr(loaded, function, None)
    if not callable(found):
        raise ValueError(f"there is no function {function!r}, expected one of that name")
    return partial(found, **options) if options else found


def _call(function: Callable[..., Any], request: dict[str, Any], reply: Callable[..., None], place: int) -> list[Any]:
    """Return the kind of outcome, and its value or message."""
    columns = {name: [value] for name, value in request["columns"].items()}
    try:
        values = function(prompts=[request["prompt"]], completions=[request["completion"]], **columns)
        return _checked(values)
    except (MemoryError, RecursionError, PermissionError) as error:
        return ["refused", _describe(error)]
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in _LIMIT_ERRORS:
            return ["refused", _describe(error)]
        if isinstance(error, RuntimeError) and "start new thread" in str(error):
            return ["refused", _describe(error)]
        if isinstance(error, Exception):  # not an attempt to leave
            reply(request["call"], place, "raised", _describe(error))
        raise


def _checked(values: Any) -> list[Any]:
    """Return the one reward of a list, if it is one."""
    if not isinstance(values, list | tuple):
        return ["wrong", f"returned a {type(values).__name__}, expected a list with one number or None a completion"]
    if len(values) != 1:
        return ["wrong", f"returned {len(values)} values for 1 completion, expected one each"]
    if values[0] is None:
        return ["value", None]
    try:
        number = float(values[0])
    except (TypeError, ValueError, OverflowError):
        return ["wrong", f"returned {_cut(repr(values[0]))}, expected a number or None"]
    return ["value", number] if math.isfinite(number) else ["wrong", f"returned {number}, expected a finite number"]


def _describe(error: BaseException) -> str:
    return _cut(f"{type(error).__name__}: {error}")


def _cut(text: str) -> str:
    line = " ".join(text[: 4 * MESSAGE_CHARACTERS].split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 3] + "..."


def _empty(folder: str) -> None:
    """Go back to the folder of this process and remove what a call left in it."""
    os.chdir(folder)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            os.unlink(entry)
