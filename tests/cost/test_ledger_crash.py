"""Oracles: wall-clock of real processes that are killed, files damaged by hand, and a disk that refuses."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.cost import Ledger, Price, iter_ledger, ledger_report, read_ledger
from ds_lightning.cost.records import encode_record, record_hash

DOLLAR = Price(device="toy", usd_per_device_hour=3600.0, date="2026-01-01", source="test")

CHILD = """
    import sys, time
    from ds_lightning.cost import Ledger, Price
    price = Price(device="toy", usd_per_device_hour=3600.0, date="2026-01-01", source="test")
    ledger = Ledger.open(sys.argv[1], price)
    ledger.enter("train")
"""


def child(path: Path, code: str) -> subprocess.Popen[str]:
    script = textwrap.dedent(CHILD) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)


def three_records(path: Path) -> list[bytes]:
    ledger = Ledger.open(path, DOLLAR, background=False)
    ledger.enter("train")
    ledger.flush()
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def test_killed_attempts_sum_to_their_wall_clock_within_one_percent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    wall = 0.0
    for _ in range(3):
        began = time.monotonic()
        process = child(path, "while True:\n  ledger.enter('data'); time.sleep(0.01)\n  ledger.enter('train')")
        time.sleep(1.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wall += time.monotonic() - began
        assert ledger_report(tmp_path)["wall_seconds"] == pytest.approx(wall, abs=0.25)
    began = time.monotonic()
    process = child(path, "time.sleep(1.5)")
    assert process.wait() == 0
    wall += time.monotonic() - began
    report = ledger_report(tmp_path)
    # A beat is 50 ms, which is 2% of attempts as short as these and 0.2% of one of 30 s.
    assert report["wall_seconds"] == pytest.approx(wall, abs=4 * 0.06 + 0.01 * wall)
    assert report["wall_seconds"] <= wall
    assert report["attempts"] == 4
    assert report["unwritten_seconds"] == 0
    assert set(report["phases"]) == {"startup", "data", "train"}
    recovered = [record["attempt"] for record in iter_ledger(path) if record["event"] == "recovered"]
    assert recovered == [1, 2, 3]


def test_what_the_process_did_before_the_ledger_was_imported_is_startup(tmp_path: Path) -> None:
    code = "import time; time.sleep(0.4)" + textwrap.dedent(CHILD) + "print(ledger.totals().seconds['startup'])"
    began = time.monotonic()
    run = [sys.executable, "-c", code, str(tmp_path / "ledger.jsonl")]
    startup = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 0.4 < startup < time.monotonic() - began


def test_an_attempt_ends_with_its_process_without_being_closed(tmp_path: Path) -> None:
    process = child(tmp_path / "ledger.jsonl", "raise SystemExit(3)")
    assert process.wait() == 3
    assert [record["event"] for record in iter_ledger(tmp_path / "ledger.jsonl")][-1] == "close"
    assert not (tmp_path / "ledger.heartbeat").exists()


def test_records_are_flushed_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_lightning.cost.ledger.FLUSH_SECONDS", 0.1)
    ledger = Ledger.open(tmp_path / "ledger.jsonl", DOLLAR)
    time.sleep(0.5)
    assert read_ledger(tmp_path / "ledger.jsonl").records >= 3
    ledger.close()


def test_a_stale_heartbeat_is_not_booked_twice(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    process = child(path, "time.sleep(0.2); import os; os.kill(os.getpid(), 9)")
    process.wait()
    stale = path.with_suffix(".heartbeat").read_bytes()
    Ledger.open(path, DOLLAR, background=False).close()
    total = read_ledger(path).attempt_nanoseconds[1]
    path.with_suffix(".heartbeat").write_bytes(stale)
    Ledger.open(path, DOLLAR, background=False).close()
    assert read_ledger(path).attempt_nanoseconds[1] == total
    path.with_suffix(".heartbeat").write_bytes(b"\0" * 2048)
    Ledger.open(path, DOLLAR, background=False).close()


def test_a_torn_last_line_is_removed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = three_records(path)
    for tear in (lines[2][:1], lines[2][:-3], b"\0" * 100):
        path.write_bytes(lines[0] + lines[1] + tear)
        assert read_ledger(path).torn_bytes == len(tear)
        assert ledger_report(tmp_path)["torn_bytes"] == len(tear)
        assert path.read_bytes() == lines[0] + lines[1] + tear
        with caplog.at_level(logging.WARNING):
            Ledger.open(path, DOLLAR, background=False).close()
        assert f"removed an unfinished last line of {len(tear)} bytes" in caplog.text
        records = list(iter_ledger(path))
        assert [record["event"] for record in records] == ["open", "flush", "repaired", "open", "close"]
        assert records[2]["torn_bytes"] == len(tear)


def test_a_last_line_that_lacks_its_newline_only_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = three_records(path)
    path.write_bytes(b"".join(lines)[:-1])
    Ledger.open(path, DOLLAR, background=False).close()
    assert path.read_bytes().startswith(b"".join(lines))
    assert read_ledger(path).records == 5


def edited(line: bytes, **values: Any) -> bytes:
    return json.dumps({**json.loads(line), **values}).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c: [a, edited(b, usd_per_device_hour=1.0), c], "line 2 was changed: its hash is"),
        (lambda a, b, c: [a, b, edited(c, num_devices=9)], "line 3 was changed: its hash is"),
        (lambda a, b, c: [a, b, edited(c, num_devices=9)[:-1]], "line 3 was changed: its hash is"),
        (lambda a, b, c: [a, c], "line 2 follows a record with hash .* lines were removed"),
        (lambda a, b, c: [b, c], "line 1 follows a record with hash"),
        (lambda a, b, c: [a, b, b, c], "line 3 follows a record with hash"),
        (lambda a, b, c: [a, b[:40] + b"\n", c], "line 2 is .* expected a JSON object"),
        (lambda a, b, c: [a, b, b"\n"], "line 3 is .* expected a JSON object"),
        (lambda a, b, c: [a, b"\xff\xfe\n", c], "line 2 is .* expected a JSON object"),
        (lambda a, b, c: [b"[]\n", b, c], "line 1 lacks attempt, device"),
        (lambda a, b, c: [a, b"{}\n", c], "line 2 lacks attempt, device"),
    ],
)
def test_a_changed_line_is_refused_and_left_alone(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "ledger.jsonl"
    damaged = b"".join(change(*three_records(path)))
    path.write_bytes(damaged)
    for action in (lambda: read_ledger(path), lambda: ledger_report(tmp_path), lambda: Ledger.open(path, DOLLAR)):
        with pytest.raises(ValueError, match=f"ledger.jsonl {message}.*restore the file from a copy"):
            action()
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq": 7}, "has seq 7, expected 0"),
        ({"event": "gift"}, "has event 'gift', expected one of open"),
        ({"seconds": {"lunch": 1}}, "has seconds .* expected numbers by phase"),
        ({"seconds": {"train": -1.0}}, "has seconds .* expected none below 0"),
        ({"num_devices": 0}, "has num_devices 0"),
        ({"usd_per_device_hour": -1}, "has price -1 'on-demand'"),
        ({"market": "barter"}, "has price 3600.0 'barter'"),
    ],
)
def test_impossible_values_are_refused_even_with_a_right_hash(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    record = {**json.loads(three_records(path)[0]), **values}
    path.write_bytes(encode_record({**record, "hash": record_hash(record)}))
    with pytest.raises(ValueError, match=f"line 1 {message}"):
        read_ledger(path)


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    process = child(path, "print('open', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    before = path.read_bytes()
    holder = f"process {process.pid} on {re.escape(socket.gethostname())}"
    with pytest.raises(ValueError, match=f"ledger.jsonl is in use by {holder}, expected one run at a time in a folder"):
        Ledger.open(path, DOLLAR)
    assert path.read_bytes() == before
    process.kill()
    process.wait()
    Ledger.open(path, DOLLAR, background=False).close()


def test_a_forked_worker_does_not_hold_the_lock_of_a_dead_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = """
        import os
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(1)
            os.write(writer, b"forked")
            time.sleep(2)
            os._exit(0)
        os.read(reader, 1)
        os.kill(os.getpid(), 9)
    """
    process = child(path, code)
    process.wait()
    Ledger.open(path, DOLLAR, background=False).close()


class FullDisk:
    """The os module with a write that stores half of what it is given and then fails."""

    full = True

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        if not self.full:
            return os.write(fd, data)
        if len(data) < 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data[: len(data) // 2])


def test_a_full_disk_loses_no_second_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, DOLLAR, background=False)
    ledger.enter("train")
    disk = FullDisk()
    monkeypatch.setattr("ds_lightning.cost.journal.os", disk)
    time.sleep(0.05)
    with caplog.at_level(logging.WARNING):
        assert not ledger.flush()
        assert not ledger.flush()
        time.sleep(0.05)
        disk.full = False
        assert ledger.flush()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "cannot write ([Errno 28] No space left on device); the run goes on" in messages[0]
    assert "can be written again" in messages[1]
    assert read_ledger(path).totals.seconds["train"] >= 0.1
    assert read_ledger(path).torn_bytes == 0
    ledger.close()


def test_a_disk_still_full_at_the_end_leaves_the_rest_to_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, DOLLAR, background=False)
    ledger.enter("train")
    time.sleep(0.1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("ds_lightning.cost.journal.os", FullDisk())
        ledger.close()
    assert "the last 0.1 s are only in ledger.heartbeat" in caplog.text
    assert ledger_report(tmp_path)["phases"]["train"]["seconds"] >= 0.1
    Ledger.open(path, DOLLAR, background=False).close()
    assert read_ledger(path).totals.seconds["train"] >= 0.1


def test_a_real_limit_on_the_file_is_survived_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = """
        import os, resource
        while os.path.getsize(sys.argv[1]) < 2048: ledger.flush()
        limit = os.path.getsize(sys.argv[1]) + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        assert not ledger.flush()
        time.sleep(0.2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert ledger.flush()
    """
    assert child(path, code).wait() == 0
    assert read_ledger(path).totals.seconds["train"] >= 0.2


def test_a_disk_that_is_full_at_the_start_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_lightning.cost.journal.os", FullDisk())
    with pytest.raises(OSError, match="No space left"):
        Ledger.open(tmp_path / "ledger.jsonl", DOLLAR)
    monkeypatch.undo()
    Ledger.open(tmp_path / "ledger.jsonl", DOLLAR, background=False).close()
