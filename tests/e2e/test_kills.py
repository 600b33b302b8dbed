"""Runs that are killed again and again at random moments of training, validating, saving and exporting.

The oracles: the run of the same layout that nobody killed, bitwise; a clock outside of the processes; and the steps at
which the checkpoints were due, for what a kill may cost. A dozen kills in every run of the tests, fifty in the soak.
"""

import functools
import itertools
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.training import checkpoint
from tests.callbacks.toy_run import differences
from tests.e2e.command import ACCUMULATE, Run, config
from tests.e2e.moments import PHASES, Moment, file_of, read_moments
from tests.e2e.warm import Ranks

SEED = 0
SAVE_EVERY = 2  # optimizer steps
VALIDATE_EVERY = 4
PAUSE = 6.0
"""Seconds. What a kill leaves unbooked is a beat of the ledger, 0.05 s: an attempt must last for that to be 1%."""
PATIENCE = 120.0
"""Seconds within which the ranks that are left have to notice, and end."""

ZERO = "ds_lightning.training.ZeRO"
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"devices": 1},
    "DDP, 2 ranks": {"devices": 2, "strategy": "ddp"},
    "ZeRO 1, 2 ranks": {"devices": 2, "strategy": {"class_path": ZERO, "init_args": {"stage": 1}}},
    "ZeRO 2, 2 ranks": {"devices": 2, "strategy": {"class_path": ZERO, "init_args": {"stage": 2}}},
    "ZeRO 3, 2 ranks": {"devices": 2, "strategy": {"class_path": ZERO, "init_args": {"stage": 3}}},
}
KILLS = {"dozen": {"one process": 8, "ZeRO 2, 2 ranks": 4}, "soak": {**dict.fromkeys(LAYOUTS, 9), "one process": 14}}
"""How many for each layout."""


@dataclass(frozen=True)
class Kill:
    """One attempt that was killed, as seen from outside."""

    phase: str
    """What was going on at that moment."""
    step: int
    """Optimizer steps made."""
    victims: tuple[int, ...]
    """Ranks that were killed."""
    statuses: tuple[int, ...]
    alive: float
    """Seconds from before the start until rank 0, which keeps the ledger, was killed or made its exit."""
    left: float
    """Seconds for which ranks that were not killed lived on; after the death of rank 0 nobody can book them."""
    at_stake: float
    """Seconds from the newest checkpoint, or from where this attempt began to work, until rank 0 was gone."""


@dataclass
class Killed:
    """A run that was killed many times and then left alone, and its twin that was never killed."""

    run: Run
    straight: Run
    ranks: int
    kills: list[Kill] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    """Steps of the checkpoint that was found after each kill."""

    @property
    def alive(self) -> list[float]:
        """Return the seconds of every attempt, the last one included, which nobody killed."""
        return [*(kill.alive for kill in self.kills), self.run.attempts[-1].seconds]

    def accounts(self) -> Iterator[str]:
        """Tell what was booked of each attempt, and how it ended."""
        booked = self.run.ledger()["attempt_seconds"].values()
        for seconds, alive, kill in itertools.zip_longest(booked, self.alive, self.kills):
            yield f"booked {seconds:.3f} of {alive:.3f} s: {kill or 'left alone'}"

    def row(self, layout: str) -> str:
        """Return the line of the table."""
        phases = Counter(kill.phase for kill in self.kills)
        single = sum(len(kill.victims) < self.ranks for kill in self.kills)
        steps = sum(kill.step - step for kill, step in zip(self.kills, self.resumed_at, strict=True))
        ledger = self.run.ledger()
        booked, whole = 3600 * ledger["device_hours"], sum(self.alive) * self.ranks
        cells = [layout, len(self.kills), *(phases[phase] for phase in PHASES), single, steps]
        left = max(kill.left for kill in self.kills)
        cells += [f"{ledger['phases']['lost']['seconds']:.1f}", f"{booked:.1f} of {whole:.1f} ({booked / whole:.2%})"]
        cells += [f"{left:.1f}" if self.ranks > 1 else ""]
        return "| " + " | ".join(map(str, cells)) + " |"


HEAD = (
    "| layout | kills | training | validating | saving | exporting | of one rank | steps repeated | seconds lost "
    "| device-seconds booked | seconds another rank lived on, at most |\n" + "| --- " * 11 + "|"
)


def _moment_to_kill(draw: random.Random, phase: str, newest: int, num_steps: int) -> tuple[str, int]:
    """Draw a moment that a run comes to that goes on from a checkpoint; it is at most two checkpoints on."""
    step = {
        "training": newest + draw.randrange(2 * SAVE_EVERY),
        "validating": (newest // VALIDATE_EVERY + 1) * VALIDATE_EVERY,
        "saving": newest + SAVE_EVERY * draw.choice((1, 2)),
        "exporting": num_steps,
    }
    return phase, step[phase]


def _wait_for(ranks: Ranks, moments: Path, rank: int, phase: str, step: int) -> Moment:
    """Return the moment at which a rank begins something."""
    while True:
        ended = ranks.statuses()
        for moment in read_moments(moments, rank):
            if (moment.phase, moment.step) == (phase, step):
                return moment
        assert ended is None, f"ended with {ended} before {phase} after step {step}:\n{ranks.said('err')[-3000:]}"
        time.sleep(0.002)


def _newest(run: Run) -> int:
    newest, skipped = checkpoint.newest_valid(run.out / "checkpoints")
    assert skipped == []
    return int(newest.name.partition("-")[2]) if newest else 0


def _kill(killed: Killed, draw: random.Random, phase: str, num_steps: int, lasts: dict[str, float]) -> None:
    """Start the run again and kill it while it does something: all of its ranks, or one of several."""
    run, ranks = killed.run, killed.ranks
    phase, step = _moment_to_kill(draw, phase, _newest(run), num_steps)
    delay = draw.random() * lasts[phase]
    victims = (draw.randrange(ranks),) if ranks > 1 and draw.random() < 0.5 else tuple(range(ranks))
    moments = _forget(run, ranks)
    processes = Ranks(run.folder, run.command(), ranks, MOMENTS=str(moments))
    time.sleep(max(0.0, _wait_for(processes, moments, victims[0], phase, step).seconds + delay - time.monotonic()))
    told = [read_moments(moments, rank) for rank in range(ranks)]
    for rank in victims:
        os.kill(told[rank][0].pid, signal.SIGKILL)
    at = time.monotonic()
    statuses = processes.wait(PATIENCE)
    end = at if 0 in victims else processes.ended[0]
    left = max((processes.ended[rank] - at for rank in range(ranks) if rank not in victims), default=0.0)
    working_from = next(moment.seconds for moment in told[0] if moment.phase in PHASES)
    written = [path.stat().st_mtime for path in (run.out / "checkpoints").glob(f"step-*/{checkpoint.MANIFEST}")]
    ago = time.time() - max(written, default=0.0) - (time.monotonic() - end)
    now = told[victims[0]][-1]
    at_stake = min(end - working_from, ago)
    killed.kills.append(Kill(now.phase, now.step, victims, tuple(statuses), end - processes.began, left, at_stake))
    killed.resumed_at.append(_newest(run))


def _forget(run: Run, ranks: int) -> Path:
    """Delete what the attempt before told, and return where the next one shall tell it."""
    moments = run.folder / f"{run.name}.moments"
    for rank in range(ranks):
        file_of(moments, rank).unlink(missing_ok=True)
    return moments


def _durations(moments: list[Moment]) -> dict[str, float]:
    """Return how long each phase lasts, in seconds: the median."""
    lasted: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for moment, following in itertools.pairwise(moments):
        if moment.phase in lasted:
            lasted[moment.phase].append(following.seconds - moment.seconds)
    return {phase: statistics.median(seconds) for phase, seconds in lasted.items()}


def _soak(folder: Path, layout: str, num_kills: int) -> Killed:
    """Kill a run of a layout so many times, then let it come to its end."""
    draw = random.Random(f"{SEED} {layout}")
    num_steps = -(-3 * num_kills // VALIDATE_EVERY) * VALIDATE_EVERY
    name = layout.replace(", ", "-").replace(" ", "-")
    callback = {"class_path": "tests.e2e.moments.Moments", "init_args": {"pause": PAUSE}}
    settings = config(
        model__init_args__total_tokens=num_steps * 8 * 64,
        data__init_args__folder=f"prepared-{name}",
        checkpoints__every_n_steps=SAVE_EVERY,
        trainer__val_check_interval=VALIDATE_EVERY * ACCUMULATE,
        trainer__callbacks=[callback],
    )
    settings["trainer"] |= LAYOUTS[layout]
    ranks = settings["trainer"]["devices"]
    straight, run = (Run(folder, settings, f"{name}-{kind}", warm=True) for kind in ("straight", "killed"))
    killed = Killed(run, straight, ranks)
    moments = _forget(straight, ranks)
    straight.attempt(MOMENTS=str(moments))
    lasts = _durations(read_moments(moments, 0))
    phases = [PHASES[number % len(PHASES)] for number in range(num_kills)]
    draw.shuffle(phases)
    for phase in sorted(phases, key="exporting".__eq__):
        _kill(killed, draw, phase, num_steps, lasts)
    run.attempt()
    print(killed.row(layout), *killed.accounts(), sep="\n", file=sys.stderr, flush=True)
    return killed


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("dozen", marks=pytest.mark.slow),
        pytest.param("soak", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def layouts(request: pytest.FixtureRequest, folder: Path) -> dict[str, Killed]:
    """Runs that were killed, by layout; three at a time, since they sleep for half of it."""
    kills = KILLS[request.param]
    with ThreadPoolExecutor(3) as pool:
        runs = pool.map(functools.partial(_soak, folder), kills, kills.values())
        killed = dict(zip(kills, runs, strict=True))
    print(f"seed {SEED}", HEAD, *(each.row(layout) for layout, each in killed.items()), sep="\n")
    return killed


def test_every_phase_is_hit_and_a_kill_ends_all_ranks(layouts: dict[str, Killed]) -> None:
    kills = [kill for killed in layouts.values() for kill in killed.kills]
    hit = Counter(kill.phase for kill in kills)
    # On a busy machine some come late: of a dozen it may be all of those that were meant for a phase of 0.05 s.
    assert all(hit[phase] >= len(kills) // 20 for phase in PHASES), hit
    for kill in kills:
        killed = [kill.statuses[rank] for rank in kill.victims]
        assert killed == [-signal.SIGKILL] * len(killed)
        assert all(kill.statuses), "a rank that is left cannot end well"


def test_a_killed_run_ends_with_the_bits_of_the_run_left_alone(layouts: dict[str, Killed]) -> None:
    for killed in layouts.values():
        assert differences(killed.run.exported(), killed.straight.exported()) == []
        assert killed.run.logged() == killed.straight.logged()
        assert killed.run.checkpoints() == killed.straight.checkpoints()


def test_all_of_the_time_is_booked(layouts: dict[str, Killed]) -> None:
    for layout, killed in layouts.items():
        ledger = killed.run.ledger()
        assert ledger["chain"] == "ok"
        assert ledger["attempts"] == len(killed.kills) + 1
        booked = sum(phase["device_hours"] for phase in ledger["phases"].values()) * 3600
        assert booked == pytest.approx(sum(killed.alive) * killed.ranks, rel=0.01), layout


def test_a_kill_costs_no_more_than_the_work_since_the_checkpoint(layouts: dict[str, Killed]) -> None:
    for killed in layouts.values():
        for kill, step in zip(killed.kills, killed.resumed_at, strict=True):
            assert 0 <= kill.step - step <= SAVE_EVERY, kill
        at_stake = sum(kill.at_stake for kill in killed.kills)
        # The clock of a file's time is that of the scheduler: 0.01 s.
        assert 0 < killed.run.ledger()["phases"]["lost"]["seconds"] <= at_stake + 0.01 * len(killed.kills)
