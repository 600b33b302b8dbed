"""Oracles: the ledger of a real run, and the files that it leaves in its folder."""

import json
import shutil
from pathlib import Path

import pytest

from ds_lightning.cost import ledger_report, plan
from ds_lightning.cost.calibration import Calibration, calibration_from_run
from ds_lightning.report.curves import MOST_POINTS, dollars_at, thinned
from tests.cli.command_line import STEPS, CommandLine


def test_a_run_leaves_its_plan_its_calibration_and_its_page(command: CommandLine) -> None:
    run = Path("run")
    stored = json.loads((run / "plan.json").read_text())
    assert stored["plan"] == json.loads(json.dumps(plan(run / "config.yaml")))
    calibration = Calibration.read(run / "calibration.json")
    assert calibration.train_seconds_per_flop == calibration_from_run(run)["train_seconds_per_flop"]
    [stage] = json.loads((run / "report.json").read_text())["stages"]
    assert 0.1 < stage["peak_memory_gb"] < 32
    assert calibration.base_memory_gb == pytest.approx(
        stage["peak_memory_gb"] - stored["plan"]["memory_gb"]["total"], rel=1e-6
    )
    page = (run / "report.html").read_text()
    assert "bits per byte of held-out text" in page
    assert "Planned and actual" in page


def test_curves_hold_dollars_and_values_and_the_load_is_that_of_each_layer(command: CommandLine) -> None:
    [stage] = json.loads(Path("run/report.json").read_text())["stages"]
    for name in ("train/loss", "val/bits_per_byte"):
        points = stage["curves"][name]
        spent = [dollars for dollars, _ in points]
        assert spent == sorted(spent)
        assert 0 < spent[0] <= spent[-1] <= stage["usd"]
    assert len(stage["curves"]["train/loss"]) == STEPS
    assert stage["curves"]["val/bits_per_byte"][-1][1] == pytest.approx(stage["bits_per_byte"]["model"], rel=1e-6)
    for layer in stage["expert_load"]:
        assert sum(layer) / len(layer) == pytest.approx(1, abs=2e-3)


def test_report_prints_the_figures_of_the_ledger_and_writes_the_page(own: CommandLine) -> None:
    Path("run/report.html").unlink()
    said = own("report", "run", "--json")
    assert said.status == 0
    printed = json.loads(said.out)
    ledger = ledger_report("run")
    assert printed["page"] == "run/report.html"
    [row] = printed["runs"]
    assert (row["usd"], row["device_hours"]) == (ledger["usd"], ledger["device_hours"])
    phases = ledger["phases"]
    idle = ledger["usd"] - phases["train"]["usd"] - phases["data"]["usd"]
    assert row["share_without_gradient"] == pytest.approx(idle / ledger["usd"])
    assert Path("run/report.html").is_file()
    text = own("report", "run", "--out", "elsewhere.html").out
    assert "wrote elsewhere.html" in text
    assert " bits/byte " in text
    assert max(map(len, text.splitlines())) <= 80


def test_report_of_several_runs_writes_a_gallery(own: CommandLine) -> None:
    shutil.copytree("run", "runs/one")
    shutil.copytree("run", "runs/two")
    said = own("report", "runs/one", "runs/two")
    assert said.status == 0
    assert "wrote runs/gallery.html" in said.out
    assert "one/report.html" in Path("runs/gallery.html").read_text()


def test_a_run_that_was_interrupted_draws_what_it_has_logged(own: CommandLine) -> None:
    Path("run/report.json").unlink()
    assert "not finished" in own("report", "run").out
    assert "Loss against dollars" in Path("run/report.html").read_text()


def test_fit_plans_by_the_calibration_that_it_is_given(own: CommandLine) -> None:
    said = own("fit", "--config", "run.yaml", "--out", "again", "--calibration", "run/calibration.json")
    assert said.status == 0
    assert "report: again/report.html" in said.out
    stored = json.loads(Path("again/plan.json").read_text())
    assert stored["calibration"] == "run/calibration.json"
    assert stored["plan"]["phases"]["startup"]["usd"] > 0


def test_fit_refuses_a_calibration_that_cannot_serve(own: CommandLine) -> None:
    Path("bad.json").write_text("{}")
    arguments = ("fit", "--config", "run.yaml", "--out", "../other", "--calibration")
    own.refuses("bad.json lacks device, num_devices", *arguments, "bad.json")
    own.refuses("none.json: No such file", *arguments, "none.json")


def test_a_page_of_others_is_never_written_over(own: CommandLine) -> None:
    Path("run/report.html").write_text("mine")
    message = "run/report.html was not written by ds-lightning report, expected no file there: move it away"
    own.refuses(message, "report", "run")
    own.refuses(message, "fit", "--config", "run.yaml", "--out", "run")  # before it trains, not after
    own.refuses("corpus has no ledger.jsonl, expected the folder of a run", "report", "corpus")
    own.refuses("run_dirs: missing, expected a value", "report")


def test_dollars_between_two_records_are_in_proportion_to_steps() -> None:
    spent = [(10, 1.0), (20, 3.0)]
    assert [dollars_at(spent, step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_long_curves_are_thinned_with_both_ends() -> None:
    curve = [(float(index), float(index)) for index in range(1001)]
    assert len(thinned(curve)) == MOST_POINTS
    assert (thinned(curve)[0], thinned(curve)[-1]) == (curve[0], curve[-1])
    assert thinned(curve[:5]) == curve[:5]
