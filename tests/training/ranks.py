"""Ranks of a run in processes of their own, started as torchrun would, and what each of them reports."""

import faulthandler
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).parents[2]


def run_ranks(function: str, *arguments: str, ranks: int = 2, seconds: float = 560.0, **more: str) -> list[Any]:
    """Call a function in every rank, and return what they return.

    Args:
        function: Its module and name, as ``tests.training.toy_zero:main``; called with the arguments.
        arguments: Strings.
        ranks: Number of processes.
        seconds: After which all of them are killed and the test fails.
        more: Of the environment.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks)},
                **{"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more},
            }
            command = [sys.executable, "-m", "tests.training.ranks", str(seconds), f"{folder}/{rank}.pt", function]
            command += arguments
            log = open(f"{folder}/{rank}.log", "w+")  # noqa: SIM115
            processes.append((subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), log))
        try:
            deadline = time.monotonic() + seconds
            while any(process.poll() is None for process, _ in processes) and time.monotonic() < deadline:
                if any(process.poll() for process, _ in processes):
                    break
                time.sleep(0.05)
            statuses = [process.poll() for process, _ in processes]
            assert statuses == [0] * ranks, f"{statuses}\n" + "\n".join(_tail(log) for _, log in processes)
        finally:
            for process, log in processes:
                process.kill()
                process.wait()
                log.close()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


def _tail(log: IO[str]) -> str:
    log.flush()
    log.seek(0)
    return log.read()[-4000:]


def _main(seconds: float, out: str, function: str, *arguments: str) -> None:
    from importlib import import_module

    # Where a rank waits, in the log of a test that fails.
    faulthandler.dump_traceback_later(seconds - 15, file=sys.stdout)
    module, _, name = function.partition(":")
    torch.save(getattr(import_module(module), name)(*arguments), out)


if __name__ == "__main__":
    _main(float(sys.argv[1]), *sys.argv[2:])
