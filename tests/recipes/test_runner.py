"""The runner with stages that take a moment. The oracles: a clock outside, sums by hand, and the run left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_lightning.cost import ledger_report

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from ds_lightning.recipes.runner import run_recipe
try:
    status = run_recipe("r.yaml", "out", as_json="--json" in sys.argv, command=[sys.executable, FAKE])
except ValueError as error:
    sys.exit(f"refused: {error}")
assert not {"torch", "lightning", "numpy"} & set(sys.modules), "the runner is light"
sys.exit(status)
""".replace("FAKE", repr(str(Path(__file__).with_name("fake_command.py"))))
SAMPLE = {"from": "zero", "task": {}, "rewards": [{"function": "format"}], "problems": 4}
STAGES: list[dict[str, Any]] = [
    {"name": "base", "fit": ["fit.yaml"], "what": "the start"},
    {"name": "zero", "fit": ["fit.yaml"], "from": "base"},
    {"name": "sft", "fit": ["fit.yaml"], "from": "base", "sample": SAMPLE},
    {"name": "last", "fit": ["fit.yaml"], "from": "sft"},
]
CALLS = ["base fit", "zero fit", "sft sample", "sft fit", "last fit"]


def write(folder: Path, stages: Any = STAGES, **top: Any) -> None:
    (folder / "fit.yaml").write_text(yaml.safe_dump({"data": {"class_path": "a.Tokens"}, "trainer": {"devices": 1}}))
    (folder / "r.yaml").write_text(yaml.safe_dump({"stages": stages, **top}))


def start(folder: Path, *arguments: str, fake: str | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **({"FAKE": fake} if fake else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, *arguments: str, fake: str | None = None, status: int = 0) -> tuple[str, str]:
    process = start(folder, *arguments, fake=fake)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def calls(folder: Path) -> list[str]:
    return (folder / "out" / "calls.txt").read_text().splitlines()


def test_stages_run_in_order_once_and_every_second_is_booked(tmp_path: Path) -> None:
    write(tmp_path)
    began = time.monotonic()
    out, _ = finish(tmp_path, "--json")
    seconds = time.monotonic() - began
    report = json.loads(out)
    assert calls(tmp_path) == CALLS
    assert [(row["name"], row["pass_at_1"]) for row in report["stages"]] == [
        ("base", 0.001),
        ("zero", 0.011),
        ("sft", 0.011),
        ("last", 0.111),
    ]
    ledger = ledger_report(tmp_path / "out")
    parts = [*ledger["stages"].values(), ledger["between"]]
    for key in ("usd", "device_hours", "wall_seconds"):
        assert ledger[key] == pytest.approx(sum(part[key] for part in parts), rel=1e-12)
        assert report["ledger"][key] == ledger[key]
    assert ledger["usd"] == pytest.approx(sum(row["usd"] for row in ledger["phases"].values()))
    assert ledger["wall_seconds"] == pytest.approx(seconds, abs=0.2 + 0.02 * seconds)
    assert ledger["wall_seconds"] < seconds, "no second is booked twice"
    assert report["stages"][2]["phases"]["rollout"]["seconds"] >= 0.1

    out, _ = finish(tmp_path)
    assert calls(tmp_path) == CALLS, "nothing runs again"
    assert "the start" in out
    assert "total" in out


def test_a_stage_is_told_where_to_start_and_what_to_read(tmp_path: Path) -> None:
    write(tmp_path, cost={"device": "cpu"}, seed=2)
    finish(tmp_path)
    made = yaml.safe_load((tmp_path / "out" / "sft.yaml").read_text())
    assert made == {
        "seed_everything": 202,
        "data": {
            "init_args": {
                "seed": 202,
                "folder": "out/sft/data",
                "sources": ["out/sft/samples/samples.jsonl"],
                "tokenizer": "out/base/weights/tokenizer.json",
            }
        },
        "cost": {"device": "cpu"},
        "model": {"init_args": {"weights": "out/base/weights"}},
    }
    sampled = yaml.safe_load((tmp_path / "out" / "sft.sample.yaml").read_text())
    assert sampled["weights"] == "out/zero/weights"
    assert (sampled["seed"], sampled["problems"], sampled["device"]) == (202, 4, "cpu")


@pytest.mark.parametrize("fake", ["zero kill", "sft kill", "last kill"])
def test_a_recipe_that_was_killed_goes_on(tmp_path: Path, fake: str) -> None:
    write(tmp_path)
    finish(tmp_path, fake=fake, status=-signal.SIGKILL)
    finish(tmp_path)
    assert (tmp_path / "out" / "last" / "weights" / "number").read_text() == "111"
    made = calls(tmp_path)
    stage = fake.split()[0]
    assert [call for call in made if call.endswith("fit")].count(f"{stage} fit") == 2
    assert ledger_report(tmp_path / "out")["chain"] == "ok"


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_what_a_stage_took_before_its_ledger_was_open_is_booked_after_a_kill(tmp_path: Path, stage: str) -> None:
    write(tmp_path)
    seconds = []
    for fake, status in ((f"{stage} early", -signal.SIGKILL), (f"{stage} early", -signal.SIGKILL), (None, 0)):
        began = time.monotonic()
        finish(tmp_path, fake=fake, status=status)
        seconds.append(time.monotonic() - began)
    ledger = ledger_report(tmp_path / "out")
    assert ledger["chain"] == "ok"
    assert ledger["wall_seconds"] == pytest.approx(sum(seconds), abs=0.3 + 0.02 * sum(seconds))
    assert ledger["wall_seconds"] < sum(seconds), "no second is booked twice"


def test_a_budget_is_split_over_the_stages_and_what_is_left_goes_on(tmp_path: Path) -> None:
    names = [stage["name"] for stage in STAGES]
    write(tmp_path, budget={"usd": 1.0, "shares": dict.fromkeys(names, 1)})
    finish(tmp_path)
    given = [yaml.safe_load((tmp_path / "out" / f"{name}.yaml").read_text())["budget"]["usd"] for name in names]
    ledger = ledger_report(tmp_path / "out")
    spent = [ledger["stages"][name]["usd"] for name in names]
    for number, usd in enumerate(given):
        assert 0 <= (1 - sum(spent[:number])) / (4 - number) - usd <= ledger["between"]["usd"]
    assert given[3] == pytest.approx(1.0, abs=0.01), "these stages leave nearly all of it"


def test_a_stage_that_fails_is_named_and_ends_the_recipe(tmp_path: Path) -> None:
    write(tmp_path)
    _, err = finish(tmp_path, fake="zero fail", status=1)
    assert "stage zero: fit failed with status 1; the same command goes on" in err
    assert calls(tmp_path) == CALLS[:2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_and_then_the_recipe(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path)
    process = start(tmp_path, fake="zero hang")
    assert process.stderr is not None
    while "hanging" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "stopped early; the same command goes on in out" in err
    assert calls(tmp_path) == CALLS[:2]


def test_a_recipe_that_was_changed_after_stages_ran(tmp_path: Path) -> None:
    write(tmp_path)
    finish(tmp_path, fake="sft fail", status=1)
    write(tmp_path, [*STAGES[:3], {**STAGES[3], "set": {"model.init_args.lr": 2.0}, "what": "more"}])
    finish(tmp_path, fake="last fail", status=1)
    write(tmp_path, [STAGES[0], {**STAGES[1], "set": {"model.init_args.lr": 2.0}}, *STAGES[2:]])
    _, err = finish(tmp_path, status=1)
    assert err.startswith("refused: r.yaml was changed after its stage zero ran in out: stages.zero.model was None")
    write(tmp_path, [STAGES[0], {**STAGES[3], "from": "base"}])
    _, err = finish(tmp_path, status=1)
    assert err.startswith("refused: r.yaml has no stage zero, which out has run: give another --out")


def test_a_folder_has_one_runner(tmp_path: Path) -> None:
    write(tmp_path)
    process = start(tmp_path, fake="base hang")
    assert process.stderr is not None
    while "hanging" not in process.stderr.readline():
        pass
    _, err = finish(tmp_path, status=1)
    assert err.startswith("refused: out is in use by another recipe: end that, or give another --out")
    process.kill()
    process.wait()
    _, err = finish(tmp_path)
    assert (tmp_path / "out" / "last" / "weights" / "number").read_text() == "111"
