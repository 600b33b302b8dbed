"""A pool of scoring processes that are locked down, timed, and replaced when they die."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ds_lightning.rl.lockdown import LAYERS

PACKAGE = Path(__file__).resolve().parents[1]
ABANDON_AFTER = 8
"""A function is given up when so many first calls of it, or all calls of a batch of so many, get no answer."""

_START = "import sys; sys.path.insert(0, sys.argv[1]); from ds_lightning.rl.worker import main; main()"


@dataclass(frozen=True)
class Limits:
    """What a call of a reward function may use."""

    seconds: float = 5.0
    """Wall-clock time a call."""
    cpu_seconds: float = 5.0
    """Processor time a call."""
    memory_mib: int = 2048
    """Address space of a process."""
    file_mib: int = 1
    """Size of a file in the process's own folder, which is emptied after each call."""
    open_files: int = 64
    """File descriptors of a process."""
    start_seconds: float = 60.0
    """Wall-clock time until a process has imported the reward functions."""
    reply_bytes: int = 65_536
    """Length of a reply."""

    def __post_init__(self) -> None:
        """Refuse limits that allow nothing."""
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} is {value}, expected a number above 0")


class Function(NamedTuple):
    """Where a scoring process finds a function, what it may read to import it, and keyword arguments for each call."""

    module: str
    function: str
    file: str | None = None
    path: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    readable: tuple[str, ...] = ()
    listable: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What became of a call."""

    kind: Literal["value", "timeout", "died", "refused"]
    value: float | None


class CallError(Exception):
    """A function did what no completion can excuse."""

    def __init__(self, call: int, function: int, message: str, *, answered: bool = True) -> None:
        super().__init__(message)
        self.call = call
        self.function = function
        self.answered = answered


def _unanswered(call: int, function: int, count: int) -> CallError:
    return CallError(call, function, f"answered none of {count} calls within its limits", answered=False)


class SandboxPool:
    """Processes that call functions on what nobody trusts.

    Args:
        functions: What every process imports.
        workers: Processes.
        limits: What a call may use.
        layers: Protections to put on; tests leave some out.

    Raises:
        ValueError: If a process cannot import a function.
    """

    def __init__(
        self, functions: Sequence[Function], *, workers: int, limits: Limits, layers: Sequence[str] = LAYERS
    ) -> None:
        assert functions
        self._functions = functions
        self._limits = limits
        self._layers = layers
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self.protections: list[str] = []
        """Layers that are active in the processes."""
        self.restarts = 0
        """Processes that had to be replaced."""
        self._answered = [False] * len(functions)
        self._unanswered = [0] * len(functions)
        try:
            for _ in range(workers):
                self._workers.append(_Worker(functions, limits, layers, self._selector))
            while any(not worker.ready for worker in self._workers):
                self._wait()
        except BaseException:
            self.close()
            raise
        self.protections = self._workers[0].protections

    def run(self, calls: Sequence[dict[str, Any]]) -> list[list[Outcome]]:
        """Return the outcome of every function for every call.

        Args:
            calls: Each with ``prompt``, ``completion`` and ``columns``, as JSON.

        Raises:
            CallError: If a function raises, returns anything but one finite number or None, or answers no call at all.
        """
        try:
            return self._run(calls)
        except BaseException:  # other processes are in the middle of something
            self.close()
            raise

    def _run(self, calls: Sequence[dict[str, Any]]) -> list[list[Outcome]]:
        outcomes: list[list[Outcome]] = [[] for _ in calls]
        waiting = deque(range(len(calls)))
        done = 0
        while done < len(calls):
            for worker in self._workers:
                if waiting and worker.ready and worker.call is None:
                    call = waiting.popleft()
                    worker.send(call, len(outcomes[call]), calls[call])
            for call, outcome in self._wait():
                place = len(outcomes[call])
                outcomes[call].append(outcome)
                self._answered[place] |= outcome.kind == "value"
                self._unanswered[place] += outcome.kind != "value"
                if not self._answered[place] and self._unanswered[place] >= ABANDON_AFTER:
                    raise _unanswered(call, place, self._unanswered[place])
                if len(outcomes[call]) == len(self._functions):
                    done += 1
                elif outcome.kind in ("timeout", "died"):  # the rest of this call goes to another process
                    waiting.appendleft(call)
        for place in range(len(self._functions)):
            if len(calls) >= ABANDON_AFTER and all(row[place].kind != "value" for row in outcomes):
                raise _unanswered(0, place, len(calls))
        return outcomes

    def _wait(self) -> list[tuple[int, Outcome]]:
        """Return what came in, at the latest when the first limit of time is over."""
        found: list[tuple[int, Outcome]] = []
        rest = min(worker.deadline for worker in self._workers) - time.monotonic()
        events = {key.data for key, _ in self._selector.select(None if rest == inf else max(rest, 0))}
        for place, worker in enumerate(self._workers):
            if worker in events:
                found += worker.exchange()
            if worker.dead is None and time.monotonic() > worker.deadline:
                worker.dead = "timeout"
            if worker.dead is not None:
                if not worker.ready:
                    raise ValueError(worker.failure())
                if worker.call is not None:
                    found.append((worker.call, Outcome(worker.dead, None)))
                worker.close()
                self.restarts += 1
                self._workers[place] = _Worker(self._functions, self._limits, self._layers, self._selector)
        return found

    def close(self) -> None:
        """End all processes and remove their folders."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process."""

    def __init__(
        self,
        functions: Sequence[Function],
        limits: Limits,
        layers: Sequence[str],
        selector: selectors.BaseSelector,
    ) -> None:
        self.functions = len(functions)
        self.limits = limits
        self.selector = selector
        self.folder = tempfile.mkdtemp(prefix="ds-lightning-scoring-")
        # nothing of this process's environment: it holds secrets
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        places = {"HOME": self.folder, "TMPDIR": self.folder, "PATH": "/usr/bin:/bin"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START, str(PACKAGE.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env={**threads, **places, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        selector.register(self.replies, selectors.EVENT_READ, self)
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.ready = False
        self.protections: list[str] = []
        self.call: int | None = None
        self.place = 0
        self.dead: Literal["timeout", "died"] | None = None
        self.message = ""
        self.deadline = time.monotonic() + limits.start_seconds
        self._post(_settings(self.folder, functions, limits, layers))

    def send(self, call: int, first: int, request: dict[str, Any]) -> None:
        """Ask for the outcomes of a call, from one of the functions on."""
        self.call, self.place = call, first
        self.deadline = time.monotonic() + self.limits.seconds
        self._post({"call": call, "first": first, **request})

    def exchange(self) -> list[tuple[int, Outcome]]:
        """Write and read as much as goes without waiting, and return the outcomes that arrived."""
        self._write()
        try:
            part = os.read(self.replies, 65_536)
        except BlockingIOError:
            return []
        self.incoming += part
        *lines, rest = bytes(self.incoming).split(b"\n")
        self.incoming = bytearray(rest)
        found = [outcome for line in lines if self.dead is None for outcome in self._understand(line)]
        if self.dead is None and (not part or len(rest) > self.limits.reply_bytes):
            self.dead = "timeout" if self._status() == -signal.SIGXCPU else "died"
        return found

    def _understand(self, line: bytes) -> list[tuple[int, Outcome]]:
        """Return the outcome in a reply; what is no reply that was asked for is the end of the process."""
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not self.ready:
            match reply:
                case ["ready", list(layers)]:
                    self.ready, self.protections, self.deadline = True, layers, inf
                case ["failed", str(message)]:
                    self.message = message
                case _:
                    self.dead = "died"
            return []
        if self.call is None:
            self.dead = "died"
            return []
        match reply:
            case [self.call, self.place, "value", None | float() as value] if value is None or isfinite(value):
                outcome = Outcome("value", value)
            case [self.call, self.place, "refused", str()]:
                outcome = Outcome("refused", None)
            case [self.call, self.place, "raised" | "wrong" as kind, str(message)]:
                raise CallError(self.call, self.place, f"raised {message}" if kind == "raised" else message)
            case _:
                self.dead = "died"
                return []
        call, self.place = self.call, self.place + 1
        last = self.place == self.functions
        self.call = None if last else call
        self.deadline = inf if last else time.monotonic() + self.limits.seconds
        return [(call, outcome)]

    def _post(self, message: dict[str, Any]) -> None:
        self.outgoing += json.dumps(message).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self.outgoing:
                del self.outgoing[: os.write(self.requests, self.outgoing)]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # reading tells that the process is gone
            self.outgoing.clear()
        watched = self.requests in self.selector.get_map()
        if self.outgoing and not watched:
            self.selector.register(self.requests, selectors.EVENT_WRITE, self)
        elif watched and not self.outgoing:
            self.selector.unregister(self.requests)

    def failure(self) -> str:
        """Say why the process did not get ready."""
        if self.dead == "timeout":
            return f"the reward functions were not imported within limits.start_seconds = {self.limits.start_seconds}"
        return self.message or f"a scoring process ended with status {self._status()} before it was ready"

    def _status(self) -> int | None:
        """Return how the process ended; one that closed its pipe may go on, to be killed."""
        try:
            return self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Kill the process and what it may have started, and remove its folder."""
        for end in (self.requests, self.replies):
            if end in self.selector.get_map():
                self.selector.unregister(end)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _settings(folder: str, functions: Sequence[Function], limits: Limits, layers: Sequence[str]) -> dict[str, Any]:
    packages = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", sys.prefix, sys.base_prefix]
    packages += [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    own = [place for function in functions for place in function.readable]
    return {
        "folder": folder,
        "readable": list(dict.fromkeys([*system, *packages, str(PACKAGE), *own])),
        "listable": [str(PACKAGE.parent), *(place for function in functions for place in function.listable)],
        "lock": {
            "memory_mib": limits.memory_mib,
            "file_mib": limits.file_mib,
            "open_files": limits.open_files,
            "layers": list(layers),
        },
        "cpu_seconds": limits.cpu_seconds,
        "functions": [function._asdict() for function in functions],
    }
