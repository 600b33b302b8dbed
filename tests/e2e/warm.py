"""The command in processes whose imports are behind them: forks of one process that has made them once.

Importing torch, Lightning and DeepSpeed is most of what an attempt at a tiny run costs. A fork runs the same function
as ``python -m ds_lightning``, its time counts from the fork, and its end is that of any process. Several ranks are
started as torchrun starts them.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
_EXITING = 0x4  # PF_EXITING, Linux's include/linux/sched.h


class Ranks:
    """The processes of one attempt, one for each rank.

    Args:
        folder: Where they run.
        arguments: Of the command.
        ranks: How many; of several, rank 0 is started first.
        environment: More of the environment.
    """

    def __init__(self, folder: Path, arguments: list[str], ranks: int = 1, **environment: str) -> None:
        self.began, self.ended = 0.0, list[float]()
        """When the first was about to start and when each of them made its exit, on the clock of the machine."""
        self._files = folder / f"attempt-{time.monotonic_ns()}"
        self._files.mkdir()
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = str(server.getsockname()[1])
        alike = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "MASTER_PORT": port}
        alike |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
        each = [{**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        order = {
            "folder": str(folder),
            "arguments": arguments,
            "environments": [{**environment, **rank} for rank in each],
            "files": str(self._files),
        }
        _order(json.dumps(order))

    def statuses(self) -> list[int] | None:
        """Return how each rank ended, a signal as a negative number; none: some still run."""
        try:
            statuses: list[int]
            statuses, self.began, self.ended = json.loads((self._files / "statuses").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        return statuses

    def wait(self, timeout: float) -> list[int]:
        """Return how each rank ended, once all have.

        Raises:
            subprocess.TimeoutExpired: If they take longer than so many seconds.
        """
        deadline = time.monotonic() + timeout
        while (statuses := self.statuses()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self._files), timeout)
            time.sleep(0.002)
        return statuses

    def said(self, stream: str) -> str:
        """Return what all ranks wrote to ``out`` or ``err``."""
        return (self._files / stream).read_text(encoding="utf-8")


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """Start the process that the others are forked from; it ends with this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.e2e.warm"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True, start_new_session=True)


_one_at_a_time = threading.Lock()


def _order(line: str) -> None:
    with _one_at_a_time:
        stdin = _server().stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()


def _serve() -> None:
    """Fork, for each line of stdin, a process that starts ranks and waits for them."""
    import ds_lightning.__main__
    import ds_lightning.training_cli  # noqa: F401
    from ds_lightning.training.shards import import_deepspeed

    import_deepspeed()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # by way of torch._dynamo, with every engine

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those end
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attempt(**json.loads(line))
            os._exit(0)


def _attempt(folder: str, arguments: list[str], environments: list[dict[str, str]], files: str) -> None:
    """Run the command once for each environment, and leave the statuses when all have ended."""
    os.setsid()
    os.chdir(folder)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    began, started = time.monotonic(), []
    for environment in environments:
        started.append(os.fork())
        if started[-1] == 0:
            os.environ.update(environment)
            _command(arguments)
    ended = dict.fromkeys(started, 0.0)
    while not all(ended.values()):
        time.sleep(0.005)
        ended |= {pid: time.monotonic() for pid in started if not ended[pid] and not _runs(pid)}
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    Path(files, "written").write_text(json.dumps([statuses, began, list(ended.values())]), encoding="ascii")
    os.rename(f"{files}/written", f"{files}/statuses")


def _runs(pid: int) -> bool:
    """Tell whether a process still runs code of its own: the kernel takes 0.1 s and more to take it down after that."""
    flags = int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[6])
    return not flags & _EXITING


def _command(arguments: list[str]) -> None:
    """Do what ``python -m ds_lightning`` does, to the end of the process."""
    from ds_lightning.__main__ import run

    sys.argv = ["ds-lightning", *arguments]
    try:
        with contextlib.suppress(SystemExit):
            run()
    finally:
        if sys.exception() is not None:
            traceback.print_exc()
        atexit._run_exitfuncs()  # the last of them ends the process with the command's status, if it came to one
        os._exit(1)


if __name__ == "__main__":
    _serve()
