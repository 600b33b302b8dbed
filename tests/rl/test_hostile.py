"""Oracles: files, processes, a listener and a clock outside the scoring processes, which attacks must not move.

The attacks run in a reward function that executes what the model wrote, which none of ours does: what holds there holds
for any function.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ds_lightning.rl.lockdown import LAYERS
from ds_lightning.rl.rewards import Reward, Scorer
from ds_lightning.rl.sandbox import Limits

linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock, seccomp and namespaces are Linux's")

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = Path(__file__).with_name("reward_functions.py")
LIMITS = Limits(seconds=2.0, cpu_seconds=2.0, memory_mib=512)
SECRET = "a secret of the parent's"

EVERY_DESCRIPTOR = """
import os
for fd in range(64):
    try: os.write(fd, TEXT)
    except OSError: pass
"""
RAISE_LIMITS = """
import resource
try: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
except ValueError: pass
bytearray(1 << 32)
"""
ATTACKS = {
    "write a file": "open(r'{outside}/new', 'w').write('x')",
    "write by descriptor": "import os; os.write(os.open(r'{canary}', os.O_WRONLY | os.O_TRUNC), b'x')",
    "follow a symlink": "import os; os.symlink(r'{canary}', 'link'); open('link', 'w').write('x')",
    "follow a hard link": "import os; os.link(r'{canary}', 'link'); open('link', 'a').write('x')",
    "rename out of the folder": "import os; open('f', 'w').close(); os.rename('f', r'{outside}/new')",
    "walk out of the folder": "import os; open(os.path.relpath(r'{outside}/new'), 'w')",
    "delete a file": "import os; os.remove(r'{canary}')",
    "truncate a file": "import os; os.truncate(r'{canary}', 0)",
    "change a mode": "import os; os.chmod(r'{canary}', 0o777)",
    "change a time": "import os; os.utime(r'{canary}', (0, 0))",
    "read a file": "assert 'secret' not in open(r'{canary}').read()",
    "read the parent's environment": "open('/proc/{parent}/environ').read()",
    "read the environment": "import os; assert not any('secret' in value for value in os.environ.values())",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "send a datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "fork without end": "import os\nwhile True: os.fork()",
    "start a program": "import subprocess; subprocess.run(['touch', r'{outside}/new'])",
    "start a shell": "import os\nif os.system(r'touch {outside}/new'): raise PermissionError('no shell')",
    "start threads without end": "from threading import *\nwhile True: Thread(target=Event().wait).start()",
    "signal the parent": "import os; os.kill({parent}, 10)",
    "signal everything": "import os; os.kill(-1, 10)",
    "allocate 100 GB": "bytearray(100 << 30)",
    "allocate without end": "x = [0]\nwhile True: x += x",
    "unpack a bomb": "import zlib; b = zlib.compress(bytes(1 << 26)); [zlib.decompress(b) for _ in range(99)]",
    "raise the limits": RAISE_LIMITS,
    "leave": "import os; os._exit(0)",
    "leave politely": "raise SystemExit",
    "crash": "import ctypes; ctypes.string_at(0)",
    "loop without end": "while True: pass",
    "sleep": "import time; time.sleep(3600)",
    "compute without end": "9**9**9**9",
    "recurse": "f = lambda: f()\nf()",
    "recurse in C": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "print without end": "while True: print('x' * 10**6)",
    "write to every descriptor": EVERY_DESCRIPTOR.replace("TEXT", "b'[]' * 99999"),
    "reply with nonsense": EVERY_DESCRIPTOR.replace("TEXT", "b'[' * 50000 + bytes([10])"),
    "hang up and go on": "import os; os.closerange(0, 64)\nwhile True: pass",
    "fill the disk": "open('big', 'wb').write(bytes(1 << 26))",
    "hold every descriptor": "x = []\nwhile True: x.append(open('/dev/null'))",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None): raise PermissionError",
    "null bytes and surrogates": "x = '\\x00\\ud800' * 1000",
}  # fmt: skip
HARMLESS = {"read the environment", "print without end", "null bytes and surrogates"}
"""What may go on until it is done or out of time: there is nothing to refuse."""


class Ground(NamedTuple):
    """What lies outside the scoring processes."""

    outside: Path
    canary: Path
    server: socket.socket


class Verdict(NamedTuple):
    """What became of an attack."""

    reward: float | None
    before: float | None
    after: float | None


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    outside = tmp_path_factory.mktemp("outside")
    canary = outside / "canary"
    canary.write_text(SECRET)
    os.utime(canary, (1, 1))
    canary.chmod(0o640)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield Ground(outside, canary, server)


def assert_untouched(ground: Ground) -> None:
    assert os.listdir(ground.outside) == ["canary"]
    assert ground.canary.read_text() == SECRET
    status = ground.canary.stat()
    assert (status.st_mtime, status.st_mode & 0o777, status.st_nlink) == (1, 0o640, 1)
    with pytest.raises(BlockingIOError):
        ground.server.accept()


def code(attack: str, ground: Ground) -> str:
    fields = {"outside": ground.outside, "canary": ground.canary, "port": ground.server.getsockname()[1]}
    text = ATTACKS[attack].replace("{parent}", str(os.getpid()))
    for name, value in fields.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def processes_of(scorer: Scorer) -> set[int]:
    """Return the living processes whose session one of the scoring processes leads."""
    assert scorer._pool is not None
    leaders = {worker.process.pid for worker in scorer._pool._workers}
    found = set()
    for entry in Path("/proc").iterdir() if sys.platform == "linux" else ():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) in leaders:
                found.add(int(entry.name))
    return found - leaders


@pytest.fixture(scope="module")
def verdicts(ground: Ground) -> dict[str, Verdict]:
    """Score every attack between two harmless completions, all in one batch."""
    signals: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    os.environ["TOKEN_OF_A_TEST"] = SECRET
    try:
        with Scorer([Reward(f"{FUNCTIONS}:runs", name="runs"), Reward("format")], limits=LIMITS) as scorer:
            completions = [text for attack in ATTACKS for text in ("1 + 1", code(attack, ground))] + ["1 + 1"]
            started = time.monotonic()
            batch = scorer.score([""] * len(completions), completions)
            # two processes, and starting one again takes about a second on a busy machine
            assert time.monotonic() - started < len(ATTACKS) * (LIMITS.seconds + 2)
            assert not processes_of(scorer)
            rewards = batch.per_reward["runs"]
            assert batch.per_reward["format"] == [0.0] * len(completions)
            assert sum(batch.cut_short["runs"].values()) == rewards.count(0.0)
            assert set(scorer.protections) <= set(LAYERS)
            folders = [worker.folder for worker in scorer._pool._workers] if scorer._pool else []
            assert all(os.listdir(folder) == [] for folder in folders)
        assert not [folder for folder in folders if Path(folder).exists()]
    finally:
        del os.environ["TOKEN_OF_A_TEST"]
        signal.signal(signal.SIGUSR1, previous)
    assert not signals
    return {
        attack: Verdict(rewards[2 * place + 1], rewards[2 * place], rewards[2 * place + 2])
        for place, attack in enumerate(ATTACKS)
    }


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_changes_nothing_outside_and_stops_nothing(
    attack: str, verdicts: dict[str, Verdict], ground: Ground
) -> None:
    verdict = verdicts[attack]
    assert verdict.before == verdict.after == 1.0
    assert verdict.reward == 0.0 or attack in HARMLESS
    assert_untouched(ground)


ALONE = {
    "limits": ["allocate 100 GB", "fill the disk", "hold every descriptor", "allocate without end"],
    "landlock": ["write a file", "write by descriptor", "follow a symlink", "follow a hard link", "delete a file",
                 "rename out of the folder", "truncate a file", "read a file", "read the parent's environment"],
    "network namespace": ["connect"],
    "seccomp": ["connect", "listen", "fork without end", "start a program", "start a shell", "signal the parent",
                "change a mode", "change a time", "mount"],
    "audit hook": ["write a file", "write by descriptor", "follow a symlink", "follow a hard link", "delete a file",
                   "rename out of the folder", "truncate a file", "read a file", "change a mode", "change a time",
                   "connect", "listen", "fork without end", "start a program", "start a shell", "signal the parent",
                   "mount"],
}  # fmt: skip


@linux
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_alone_refuses_what_it_is_there_for(layer: str, ground: Ground) -> None:
    signals: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    try:
        with Scorer([Reward(f"{FUNCTIONS}:runs")], workers=1, limits=LIMITS, layers=[layer]) as scorer:
            if layer not in scorer.protections:
                pytest.skip(f"this system offers no {layer}")
            assert scorer.protections == [layer]
            attacks = [code(attack, ground) for attack in ALONE[layer]]
            batch = scorer.score([""] * (len(attacks) + 1), ["1 + 1", *attacks])
            assert not processes_of(scorer)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert batch.total == [1.0] + [0.0] * len(attacks)
    assert batch.cut_short["runs"]["refused"] >= len(attacks) - 1  # "allocate without end" may run out of time
    assert not signals
    assert_untouched(ground)


PAYLOADS = [
    "__import__('os').system('touch {new}')",
    "[__import__('pathlib').Path('{new}').touch()]",
    "9**9**9**9",
    "$9^{9^{9^{9}}}$",
    "{" * 20_000,
    "\\frac{" * 5_000,
    "\x00\ud800",
    "x" * 1_000_000,
    "\\int_0^1 " * 1_000,
    "1e999999999",
    "<answer>" * 10_000,
]


def test_answers_that_are_code_are_text_to_our_rewards(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    new = tmp_path / "new"
    completions = [f"<answer>{payload.replace('{new}', str(new))}</answer>" for payload in PAYLOADS]
    rewards = [Reward(name) for name in ("accuracy", "math_accuracy", "format", "language")]
    right = "<think>x</think><answer>7</answer>"
    with Scorer(rewards, limits=Limits(seconds=2.0)) as scorer:
        for check in ("exact", "math"):
            columns = {"answer": ["7"] * (len(PAYLOADS) + 1), "check": [check] * (len(PAYLOADS) + 1)}
            batch = scorer.score([""] * (len(PAYLOADS) + 1), [right, *completions], columns)
            assert batch.total == [3.0] + [0.0] * len(PAYLOADS)
    assert not new.exists()


PARENT = """
import os, signal
from ds_lightning.rl.rewards import Reward, Scorer
scorer = Scorer([Reward("format")], workers=1).__enter__()
print(scorer._pool._workers[0].process.pid, scorer._pool._workers[0].folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@linux
def test_a_process_ends_with_the_one_that_started_it() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    pid, folder = done.stdout.split()
    deadline = time.monotonic() + 10
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path("/proc", pid).exists()
    shutil.rmtree(folder)  # which nobody was left to remove
