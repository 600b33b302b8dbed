"""Oracle: the rule, key by key: what may change within a run and what may not; and the files as they were."""

import copy
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.training.run_folder import check_run_folder, read_config, value_at, write_config

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "out": "runs/a",
    "model": {"class_path": "M", "init_args": {"lr": 0.1, "config": {"hidden_size": 8}}},
    "data": {"class_path": "D", "init_args": {"folder": "data", "seed": 0}},
    "trainer": {"precision": "32-true", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "devices": 1},
    "samples": {"prompts": ["a"]},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *sections, last = key.split(".")
    at = config
    for section in sections:
        at = at[section]
    at[last] = value
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a checkpoint."""
    write_config(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    return tmp_path / "run"


def test_what_was_written_is_read_and_accepted(folder: Path) -> None:
    assert read_config(folder / "config.yaml") == CONFIG
    check_run_folder(folder, CONFIG)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("seed_everything", 1, "seed_everything was 0, is now 1"),
        ("model.init_args.lr", 0.2, "model.init_args.lr was 0.1, is now 0.2"),
        ("model.init_args.config.hidden_size", 9, "model.init_args.config.hidden_size was 8, is now 9"),
        ("model.init_args.beta", 1, "model.init_args.beta was None, is now 1"),
        ("model.init_args", None, r"model.init_args was \{.*\}, is now None"),
        ("data.init_args.seed", 1, "data.init_args.seed was 0, is now 1"),
        ("trainer.precision", "bf16-mixed", "trainer.precision was '32-true', is now 'bf16-mixed'"),
        ("trainer.accumulate_grad_batches", 4, "trainer.accumulate_grad_batches was 2, is now 4"),
        ("trainer.gradient_clip_val", None, "trainer.gradient_clip_val was 1.0, is now None"),
    ],
)
def test_another_training_is_refused_by_its_first_difference(
    folder: Path, key: str, value: Any, difference: str
) -> None:
    with pytest.raises(ValueError, match=rf"run belongs to another config: {difference}; give another --out"):
        check_run_folder(folder, changed(key, value))
    assert read_config(folder / "config.yaml") == CONFIG


@pytest.mark.parametrize(
    ("key", "value"), [("out", "b"), ("trainer.devices", 8), ("samples.prompts", []), ("data.init_args.num_workers", 2)]
)
def test_where_it_runs_and_what_it_logs_may_change(folder: Path, key: str, value: Any) -> None:
    check_run_folder(folder, changed(key, value))


def test_nothing_is_bound_before_the_first_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step-00000001").rmdir()
    check_run_folder(folder, changed("model.init_args.lr", 0.2))
    check_run_folder(folder / "new", CONFIG)
    assert not (folder / "new").exists()


def test_a_file_is_no_run_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml is a file, expected a folder for the run"):
        check_run_folder(folder / "config.yaml", CONFIG)


def test_a_full_disk_leaves_the_earlier_config(folder: Path) -> None:
    (folder / "config.yaml.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_config(folder, changed("out", "b"))
    assert read_config(folder / "config.yaml") == CONFIG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is not UTF-8 at byte 0, expected YAML"),
        (b"a: [\n", "is not YAML: .* in line 2"),
        (b"a: \x01", "is not YAML: unacceptable character"),
        (b"3", "holds 3, expected sections such as model, data and trainer"),
    ],
)
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"c\.yaml {message}"):
        read_config(tmp_path / "c.yaml")


def test_values_are_found_under_dotted_keys() -> None:
    assert value_at(CONFIG, "model.init_args.config.hidden_size") == 8
    assert value_at(CONFIG, "model.nothing.at_all") is None
    assert value_at(3, "a") is None
