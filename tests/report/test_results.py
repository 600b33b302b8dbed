"""Oracle: sums by hand over runs whose seconds and curves are given; a second is a cent."""

from pathlib import Path

import pytest

from ds_lightning.report import ranked, read_run_data, run_row
from ds_lightning.report.results import (
    BETWEEN,
    EQUAL_REWARDS,
    curve_parts,
    gain_of,
    main_curve,
    planned_and_actual,
    result_of,
    without_gradient,
)
from tests.report.small_runs import book, write_plan, write_recipe, write_run


def test_a_run_is_judged_by_bits_per_byte_and_what_one_below_eight_cost(tmp_path: Path) -> None:
    result = result_of(read_run_data(write_run(tmp_path / "run")))
    assert result is not None
    assert (result.kind, result.value, result.unit) == ("bits per byte", 1.5, "bit saved per byte")
    assert result.usd_per_unit == pytest.approx(1.0 / 6.5)


def test_a_recipe_is_judged_by_its_last_pass_at_one_and_all_that_was_spent(tmp_path: Path) -> None:
    result = result_of(read_run_data(write_recipe(tmp_path / "r1")))
    assert result is not None
    assert (result.kind, result.value) == ("pass@1", 0.1)
    assert result.usd_per_unit == pytest.approx(3.10 / 10)


def test_points_are_gained_over_the_stage_that_a_stage_starts_from(tmp_path: Path) -> None:
    run = read_run_data(write_recipe(tmp_path / "r1"))
    base, zero, sft = (gain_of(run, stage) for stage in run.stages)
    assert base.points == pytest.approx(10)
    assert base.usd_per_point == pytest.approx(0.1)
    assert zero.points == pytest.approx(20)  # not over its own first validation
    assert zero.usd_per_point == pytest.approx(0.05)
    assert sft.points == pytest.approx(0)
    assert sft.usd_per_point is None


def test_a_single_run_gains_over_its_first_validation(tmp_path: Path) -> None:
    curves = {"val/pass_at_1": [[0.5, 0.2], [1.0, 0.3]]}
    run = read_run_data(write_run(tmp_path / "run", pass_at_1=0.25, curves=curves))
    gain = gain_of(run, run.stages[0])
    assert gain.points == pytest.approx(5)
    once = read_run_data(write_run(tmp_path / "once", pass_at_1=0.25, curves={"val/pass_at_1": [[0.5, 0.2]]}))
    assert gain_of(once, once.stages[0]).points is None


def test_what_is_neither_training_nor_its_data_bought_no_gradient(tmp_path: Path) -> None:
    reasons = without_gradient(read_run_data(write_run(tmp_path / "run")))
    assert reasons == pytest.approx({"start-up": 0.2, "validation": 0.15, "idle": 0.05})


def test_groups_of_equal_rewards_waste_their_share_of_the_rollouts_and_of_training(tmp_path: Path) -> None:
    reasons = without_gradient(read_run_data(write_recipe(tmp_path / "r1")))
    assert reasons[EQUAL_REWARDS] == pytest.approx(0.25 * (0.3 + 0.1 + 0.2))
    assert reasons[BETWEEN] == pytest.approx(0.1)
    assert reasons["start-up"] == pytest.approx(0.6)  # of the stages; the runner's own is between them
    assert reasons["validation"] == pytest.approx(0.15 + 0.2 + 0.15)


def test_planned_and_actual_stand_side_by_side_also_where_only_one_is_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_plan(folder, {"startup": 10, "train": 50, "export": 3})
    [stage] = read_run_data(folder).stages
    lines = {line.phase: (line.planned, line.actual) for line in planned_and_actual(stage)}
    assert lines["startup"] == pytest.approx((0.1, 0.2))
    assert lines["export"] == pytest.approx((0.03, 0.0))
    assert lines["validate"][0] is None
    assert lines["validate"][1] == pytest.approx(0.15)
    assert lines["total"] == pytest.approx((0.63, 1.0))
    assert list(lines)[-1] == "total"


def test_curves_of_later_stages_begin_where_the_money_of_earlier_ones_ends(tmp_path: Path) -> None:
    run = read_run_data(write_recipe(tmp_path / "r1"))
    parts = curve_parts(run, "val/pass_at_1")
    assert (parts[0], parts[2]) == ([], [])
    assert [value for point in parts[1] for value in point] == pytest.approx([1.5, 0.2, 2.0, 0.3])
    assert main_curve(run)[0] == "val/pass_at_1"
    assert main_curve(read_run_data(tmp_path / "r1" / "base"))[0] == "val/bits_per_byte"


def test_runs_are_sorted_by_dollars_per_result_of_their_kind(tmp_path: Path) -> None:
    worse = write_run(tmp_path / "worse", bits_per_byte={"model": 3.0})
    better = write_run(tmp_path / "better")
    recipe = write_recipe(tmp_path / "r1")
    unfinished = tmp_path / "unfinished"
    book(unfinished, {"train": 1})
    nothing = write_run(tmp_path / "nothing", pass_at_1=0.0)
    order = [run.name for run in ranked([read_run_data(path) for path in (unfinished, worse, nothing, better, recipe)])]
    assert order == ["r1", "nothing", "better", "worse", "unfinished"]
    row = run_row(read_run_data(better))
    assert row["usd_per_result"] == pytest.approx(1 / 6.5)
    assert row["share_without_gradient"] == pytest.approx(0.4)


def test_a_folder_without_ledger_or_with_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no ledger.jsonl, expected the folder of a run"):
        read_run_data(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan.json is no stored plan .*: delete it, the next run writes it anew"):
        read_run_data(folder)
