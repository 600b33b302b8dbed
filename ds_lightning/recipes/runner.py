"""Runs a recipe: every stage in processes of its own, going on where it stopped. Needs no torch."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ds_lightning.cost import Ledger, find_price
from ds_lightning.cost.heartbeat import Heartbeat, process_start_ns, read_heartbeat
from ds_lightning.cost.ledger_report import LEDGER_NAME, ledger_report
from ds_lightning.cost.run_config import first_difference, merged, read_yaml
from ds_lightning.recipes.recipe import RECIPE, Recipe, Stage, read_recipe
from ds_lightning.recipes.table import recipe_table, write_recipe_report
from ds_lightning.report import PAGE, check_ours, write_run_page
from ds_lightning.summary import REPORT
from ds_lightning.user_errors import writing
from ds_lightning.whole_file import write_whole

DONE, FAILED, STOPPED = 0, 1, 3

COMMAND = (sys.executable, "-m", "ds_lightning")

STARTING = ".starting.heartbeat"
"""Name of the note that a runner keeps of a stage's process that has not begun to book."""

_NOTE_SECONDS = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def run_recipe(
    path: str | Path,
    out: str | Path,
    *,
    seed: int | None = None,
    limits: dict[str, float] | None = None,
    as_json: bool = False,
    command: Sequence[str] = COMMAND,
    started_ns: int | None = None,
) -> int:
    """Run the stages of a recipe that are not finished, and show the table after each.

    The folder holds a folder a stage, ``recipe.yaml`` (the resolved recipe), ``<stage>.yaml`` (what the runner adds to
    the stage's configs), ``<stage>.log`` (what its processes printed), ``ledger.jsonl`` (the time between stages),
    ``report.json`` and its page ``report.html``. All ledgers together book every second from the start of this process
    on.

    Args:
        path: The recipe; see :func:`~ds_lightning.recipes.recipe.read_recipe`.
        out: Folder of its runs.
        seed: In place of the recipe's own.
        limits: ``usd`` and ``hours`` of the budget, over the recipe's own.
        as_json: Print the report as JSON at the end, and no table.
        command: What runs ``fit`` and ``sample``.
        started_ns: Start of the booking on ``time.monotonic_ns``; none: that of this process.

    Returns:
        0: done. 3: stopped on purpose; the same call goes on. Anything else is the status of a stage that failed.

    Raises:
        ValueError: If the recipe is wrong, was changed after stages had run, or the folder is in use.
        OSError: If a file cannot be read or written.
    """
    recipe, folder = read_recipe(path, seed, limits), Path(out)
    find_price(**{"device": "cpu", **recipe.cost})
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), _alone(folder) as lock:
        _claim(recipe, folder)
        check_ours(folder / PAGE)
        runner = _Runner(recipe, folder, command, lock, process_start_ns() if started_ns is None else started_ns)
        with runner.listening():
            return runner.run(as_json)


class _Runner:
    """One pass over the stages.

    The runner's own time is booked in attempts between the processes of stages. Each attempt begins where the bookings
    before it end, those of the stage included, so that together they are the wall-clock: what a process could not
    book of its own end is the runner's. The start of a process, imports above all, is the process's own as soon as its
    ledger is open; where it is killed with the runner before that, the next runner books it from the note on it.
    """

    def __init__(self, recipe: Recipe, folder: Path, command: Sequence[str], lock: int, started_ns: int) -> None:
        self.recipe = recipe
        self.folder = folder
        self.command = list(command)
        self.lock = lock
        self.booked_ns = started_ns - _unbooked(folder)
        self.ledger: Ledger | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.asked: int | None = None
        self.price = find_price(**{"device": "cpu", **recipe.cost})

    def run(self, as_json: bool) -> int:
        """Run what is not finished and return the exit status."""
        status = DONE
        for stage in self.recipe.stages:
            self._open(stage)
            if (self.folder / stage.name / REPORT).is_file():
                continue
            status = self._stage(stage)
            self._open(stage)
            if status == DONE and not as_json and stage is not self.recipe.stages[-1]:
                Console().print(recipe_table(write_recipe_report(self.recipe, self.folder)))
                write_run_page(self.folder)
            if status != DONE:
                break
        self._close()  # so that the last table shows the sums that stay
        report = write_recipe_report(self.recipe, self.folder)
        if as_json:
            print(json.dumps(report, indent=1))
        else:
            Console().print(recipe_table(report))
        if status == DONE:  # of a stage that was interrupted, curves take a second to read: ds-lightning report does
            page = write_run_page(self.folder)
            print(f"report: {page}", file=sys.stderr, flush=True)
        return status

    def _stage(self, stage: Stage) -> int:
        """Run the processes of a stage and return the exit status of the recipe: 0 if it is finished."""
        overlay, log = self.folder / f"{stage.name}.yaml", self.folder / f"{stage.name}.log"
        jobs: list[list[str]] = []
        if stage.sample is not None:
            settings = self.folder / f"{stage.name}.sample.yaml"
            write_whole(settings, yaml.safe_dump(self._sampling(stage), sort_keys=False))
            jobs.append(["sample", "--config", str(settings)])
        write_whole(overlay, yaml.safe_dump(self._overlay(stage), sort_keys=False))
        configs = [part for file in (*stage.files, overlay) for part in ("--config", str(file))]
        jobs.append(["fit", *configs, "--out", str(self.folder / stage.name)])
        for job in jobs:
            if self.asked is not None:
                break
            print(f"{stage.name}: {job[0]}", file=sys.stderr, flush=True)
            status = self._process(stage, job, log)
            if (self.folder / stage.name / REPORT).is_file() and status in (DONE, STOPPED):  # 3: its budget is spent
                return DONE if self.asked is None else STOPPED
            if status == STOPPED or (self.asked is not None and status in (FAILED, -self.asked)):
                break  # a signal before the handlers of a stage are there ends it at once
            if status != DONE:
                said = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
                print(f"stage {stage.name}: {job[0]} {said}; the same command goes on", file=sys.stderr, flush=True)
                return status if status > 0 else FAILED
        print(f"stopped early; the same command goes on in {self.folder}", file=sys.stderr, flush=True)
        return STOPPED

    def _process(self, stage: Stage, arguments: list[str], log: Path) -> int:
        """Run one command to its end, and return its exit status."""
        ledger = self.folder / stage.name
        before = _booked(ledger)
        self._close()
        with log.open("ab") as output:
            self.child = subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                pass_fds=[self.lock],
                process_group=0,  # Ctrl-C reaches the runner alone, which passes it on once
                preexec_fn=_end_with_parent(),  # the runner has one thread
            )
        if self.asked is not None:
            self.child.send_signal(self.asked)
        status = self._wait(self.child, ledger)
        self.child = None
        self.booked_ns += _booked(ledger) - before
        return status

    def _wait(self, child: subprocess.Popen[bytes], stage: Path) -> int:
        """Return the exit status of a process; until it books its own time, keep a note of how long it has run."""
        size = _size(stage)
        note = Heartbeat(self.folder / STARTING)
        try:
            while _size(stage) == size:
                unbooked = time.monotonic_ns() - self.booked_ns
                note.write({"stage": stage.name, "size": size, "nanoseconds": unbooked})
                try:
                    return child.wait(_NOTE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            note.close(remove=True)
        return child.wait()

    def _overlay(self, stage: Stage) -> dict[str, Any]:
        """Return what the runner adds to a stage's configs."""
        data: dict[str, Any] = {"seed": stage.seed}
        if not stage.rolls_out:
            data["folder"] = str(self.folder / stage.name / "data")
        if stage.sample is not None:
            data["sources"] = [str(self.folder / stage.name / "samples" / "samples.jsonl")]
        added: dict[str, Any] = {"seed_everything": stage.seed, "data": {"init_args": data}}
        if self.recipe.cost:
            added["cost"] = self.recipe.cost
        if self.recipe.budget is not None:
            added["budget"] = self.recipe.budget.of(stage.name, self._spent_elsewhere(stage))
        source = stage.start or (stage.sample or {}).get("from")
        if source is not None:  # the tokenizer is one for all; the weights are only those of ``from``
            data["tokenizer"] = str(self.folder / source / "weights" / "tokenizer.json")
        if stage.start is not None:
            added["model"] = {"init_args": {"weights": str(self.folder / stage.start / "weights")}}
        return merged(stage.options, added)

    def _spent_elsewhere(self, stage: Stage) -> dict[str, float]:
        """Return what all ledgers but a stage's own hold; its sampling is in its own."""
        report = ledger_report(self.folder)
        own = report.get("stages", {}).get(stage.name, {"usd": 0.0, "device_hours": 0.0})
        return {"usd": report["usd"] - own["usd"], "hours": report["device_hours"] - own["device_hours"]}

    def _sampling(self, stage: Stage) -> dict[str, Any]:
        """Return the options of ``ds-lightning sample`` for a stage."""
        assert stage.sample is not None
        options = {key: value for key, value in stage.sample.items() if key != "from"}
        accelerator = (stage.sections.get("trainer") or {}).get("accelerator", "auto")
        return {
            **options,
            "weights": str(self.folder / stage.sample["from"] / "weights"),
            "folder": str(self.folder / stage.name / "samples"),
            "ledger": str(self.folder / stage.name / LEDGER_NAME),
            "cost": self.recipe.cost,
            "num_devices": stage.devices,
            "seed": stage.seed,
            "device": "cuda" if accelerator in ("gpu", "cuda") else "cpu",
        }

    def _open(self, stage: Stage) -> None:
        """Book the runner's own time from where the bookings end, with the devices of a stage."""
        if self.ledger is None:
            self._before = _booked_alone(self.folder)
            self.ledger = Ledger.open(
                self.folder / LEDGER_NAME, self.price, num_devices=stage.devices, started_ns=self.booked_ns
            )
            (self.folder / STARTING).unlink(missing_ok=True)  # what it said is booked now

    def _close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
            self.booked_ns += _booked_alone(self.folder) - self._before
            self.ledger = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass signals on to the stage that runs; without one, stop before the next."""

        def handle(number: int, frame: Any) -> None:
            self.asked = number
            if self.child is not None:
                self.child.send_signal(number)

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _claim(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe, or refuse it where it differs in a stage that has run."""
    path, settings = folder / RECIPE, json.loads(json.dumps(recipe.settings()))
    if path.is_file():
        earlier = read_yaml(path)["stages"]
        for name, stage in earlier.items():
            if not (folder / name / REPORT).is_file():
                continue
            now = settings["stages"].get(name)
            if now is None:
                raise ValueError(f"{recipe.path} has no stage {name}, which {folder} has run: give another --out")
            drop = {"what": None}
            difference = first_difference(f"stages.{name}", {**stage, **drop}, {**now, **drop})
            if difference:
                raise ValueError(
                    f"{recipe.path} was changed after its stage {name} ran in {folder}: {difference}; "
                    "take that back or give another --out"
                )
    write_whole(path, yaml.safe_dump(settings, sort_keys=False))


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the folder, and yield the lock that processes of stages hold with the runner.

    A runner that is killed leaves a process that may need a moment to save and end: the next runner waits for it.
    """
    with (folder / ".runner.lock").open("w") as mine, (folder / ".stage.lock").open("w") as shared:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another recipe: end that, or give another --out") from None
        try:
            fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the stage in {folder} that an earlier runner left", file=sys.stderr, flush=True)
            fcntl.flock(shared, fcntl.LOCK_EX)
        yield shared.fileno()


def _end_with_parent() -> Callable[[], None] | None:
    """Return what tells a child to stop when the runner dies, on Linux; elsewhere it goes on to its end."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _unbooked(folder: Path) -> int:
    """Return the nanoseconds of a stage's process that was killed, and its runner with it, before it booked any."""
    note = read_heartbeat(folder / STARTING)
    if note is None or _size(folder / note["stage"]) != note["size"]:
        return 0
    nanoseconds: int = note["nanoseconds"]
    return nanoseconds


def _size(stage: Path) -> int:
    """Return the bytes of a stage's ledger, which grow when a process opens it."""
    path = stage / LEDGER_NAME
    return path.stat().st_size if path.is_file() else 0


def _booked(folder: Path) -> int:
    """Return the nanoseconds that a stage's ledger holds; 0 without one."""
    return round(ledger_report(folder)["wall_seconds"] * 1e9) if (folder / LEDGER_NAME).is_file() else 0


def _booked_alone(folder: Path) -> int:
    """Return the nanoseconds that a recipe's own ledger holds, without those of its stages."""
    if not (folder / LEDGER_NAME).is_file():
        return 0
    report = ledger_report(folder)
    seconds: float = report.get("between", report)["wall_seconds"]
    return round(seconds * 1e9)
