"""Oracle: the one line that the command owes a user for each wrong key, type or file, written out here."""

from pathlib import Path
from typing import Any

import pytest

from ds_lightning.training_cli import SECTIONS
from tests.cli.command_line import CommandLine, write_settings

MISSPELT = [
    ("trainer.max_stepz", r"trainer\.max_stepz: no such key; did you mean max_steps\?$"),
    ("model.init_args.lrr", r"model\.init_args\.lrr: no such key; did you mean lr\?$"),
    (
        "model.init_args.config.hidden_siz",
        r"model\.init_args\.config\.hidden_siz: no such key; did you mean hidden_size",
    ),
    (
        "model.init_args.config.rope_scaling.facter",
        r"config\.rope_scaling\.facter: no such key; did you mean factor\?$",
    ),
    ("data.init_args.seq_lenn", r"data\.init_args\.seq_lenn: no such key; did you mean seq_len\?$"),
    ("cost.devize", r"cost\.devize: no such key; did you mean device\?$"),
    ("checkpoints.every_n_step", r"checkpoints\.every_n_step: no such key; did you mean every_n_steps\?$"),
    ("budget.zloty", r"budget\.zloty: no such key$"),
    ("traner.max_steps", r"traner(\.max_steps)?: no such key"),
]

WRONG_TYPES = [
    ("trainer.max_steps", "many", "trainer.max_steps is 'many', expected int"),
    ("trainer.precision", "int4", "trainer.precision is 'int4', expected Literal"),
    ("model.init_args.lr", "fast", "model.init_args.lr is 'fast', expected float"),
    ("model.init_args.config.hidden_size", "1.5", "model.init_args.config.hidden_size is '1.5', expected int"),
    ("model.init_args.optimizer", "sgd", r"model.init_args.optimizer is 'sgd', expected Literal\['adamw', 'muon'\]"),
    ("model.class_path", "nope.Module", "model.class_path is 'nope.Module': No module named 'nope'"),
    (
        "model.class_path",
        "ds_lightning.training.Pretrain",
        "model.class_path is 'ds_lightning.training.Pretrain': .*mean",
    ),
    ("data.class_path", "torch.nn.Linear", "data.class_path is 'torch.nn.Linear', expected a LightningDataModule"),
    ("data.init_args.seq_len", "[1]", r"data.init_args.seq_len is '\[1\]', expected int"),
    ("cost.usd_per_device_hour", "cheap", "cost.usd_per_device_hour is 'cheap', expected float, null"),
    ("seed_everything", "x", "seed_everything is 'x', expected bool, int"),
]


def fit_with(command: CommandLine, message: str, tmp_path: Path, **overrides: Any) -> None:
    """Expect a refusal of ``run.yaml`` with overrides in the file, before anything is written."""
    path = write_settings(tmp_path / "bad.yaml", **overrides)
    command.refuses(message, "fit", "--config", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fit_option(command: CommandLine, message: str, tmp_path: Path, *options: str) -> None:
    """Expect a refusal of ``run.yaml`` with options behind it, before anything is written."""
    command.refuses(message, "fit", "--config", "run.yaml", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "message"), MISSPELT)
def test_a_misspelt_key_in_a_file_is_named_with_its_neighbour(
    key: str, message: str, command: CommandLine, tmp_path: Path
) -> None:
    fit_with(command, message, tmp_path, **{key.replace(".", "__"): 3})


@pytest.mark.parametrize(("key", "message"), MISSPELT)
def test_a_misspelt_option_is_named_and_never_completed(
    key: str, message: str, command: CommandLine, tmp_path: Path
) -> None:
    fit_option(command, message, tmp_path, f"--{key}", "3")


@pytest.mark.parametrize(("key", "value", "message"), WRONG_TYPES)
def test_a_wrong_type_in_a_file_is_named_with_value_and_type(
    key: str, value: str, message: str, command: CommandLine, tmp_path: Path
) -> None:
    found = {"[1]": [1], "1.5": 1.5}.get(value, value)
    fit_with(command, message, tmp_path, **{key.replace(".", "__"): found})


@pytest.mark.parametrize(("key", "value", "message"), WRONG_TYPES[::3])
def test_a_wrong_type_in_an_option_is_named_with_value_and_type(
    key: str, value: str, message: str, command: CommandLine, tmp_path: Path
) -> None:
    fit_option(command, message, tmp_path, f"--{key}={value}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__clas_path": "x"}, r"model is \{'clas_path'.*, expected class_path and init_args of a LightningModul"),
        ({"trainer__callbacks": ["nope"]}, r"trainer.callbacks is \['nope'\], expected class_path and init_args of a"),
        ({"trainer__callbacks": [{"class_path": "nope.X"}]}, "trainer.callbacks.class_path is 'nope.X': No module nam"),
        (
            {"model__init_args__lr_schedule": {"class_path": "ds_lightning.optim.WarmupStableDecay",
                                               "init_args": {"warmp": 1}}},
            "model.init_args.lr_schedule.init_args.warmp: no such key; did you mean warmup",
        ),
        ({"model__init_args__config__rope_scaling": {"factor": 2}}, "original_max_position_embeddings: missing, expec"),
        ({"model__init_args__config__intermediate_size": None}, "model.init_args.config.intermediate_size: missing"),
        ({"model__init_args__betas": [0.9]}, r"model.init_args.betas is '\[0.9\]', expected tuple with 2 elements"),
        ({"data__init_args__total_tokens": 7}, "data.init_args.total_tokens is 7, expected that of the model"),
    ],
)  # fmt: skip
def test_a_wrong_nested_value_in_a_file_is_named(
    overrides: dict[str, Any], message: str, command: CommandLine, tmp_path: Path
) -> None:
    fit_with(command, message, tmp_path, **overrides)


@pytest.mark.parametrize("section", ["model", "data", "trainer", *SECTIONS])
@pytest.mark.parametrize("value", [3, None])
def test_a_section_that_holds_no_settings_is_named(
    section: str, value: object, command: CommandLine, tmp_path: Path
) -> None:
    fit_with(command, rf"bad\.yaml: {section} is {value}, expected its settings by name", tmp_path, **{section: value})


def test_a_class_path_that_is_no_text_is_named(command: CommandLine, tmp_path: Path) -> None:
    message = "bad.yaml: model.class_path is None, expected the name of a class"
    fit_with(command, message, tmp_path, model__class_path=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_steps"], "argument --trainer.max_steps: expected one argument"),
        (["max_steps=3"], "argument 'max_steps': not expected, options are --KEY VALUE"),
        (["--trainer=3"], "trainer: Unable to load config '3', expected a YAML file with its keys"),
        (["--model=PretrainModul"], "model is 'PretrainModul', expected LightningModule"),
        (["--model.init_args.total_token=5"], "model.init_args.total_token: no such key; did you mean total_tokens"),
        (["--model.init_args.lr_schedule.warmp=0.3"], "lr_schedule.warmp is '0.3' of no class, expected .*class_path"),
        (["--data.init_args.total_tokens", "7"], "--data.init_args.total_tokens: not an option, set --model"),
        (["--data.total_tokens=7"], "--data.total_tokens: not an option, set --model.init_args.total_tokens"),
        (["--trainer.max_steps=${nope}"], "trainer.max_steps: Interpolation key '.*nope' not found"),
        (["--trainer.max_steps=${oc.env:HOME}"], "trainer.max_steps: Unsupported interpolation type oc.env"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, command: CommandLine, tmp_path: Path) -> None:
    fit_option(command, message, tmp_path, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "t.yaml is not YAML: .* in line 1"),
        (b"x: 1\n y: 2", "t.yaml is not YAML: mapping values are not allowed here in line 2"),
        (b"- 1", r"t.yaml holds \[1\], expected sections such as model, data and trainer"),
        (b"", "t.yaml holds None, expected sections"),
        (b"x: \xff", "t.yaml is not UTF-8 at byte 3, expected YAML"),
        (b"x: \x00", "t.yaml is not YAML: unacceptable character"),
        (b"a: !!python/object:os.system x", "t.yaml is not YAML: could not determine a constructor for the tag"),
    ],
)
@pytest.mark.parametrize("spelling", ["--config={}", "-c={}", "--config {}", "-c {}"])
def test_a_config_that_is_no_yaml_is_named_wherever_it_stands(
    content: bytes, message: str, spelling: str, command: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "t.yaml"
    path.write_bytes(content)
    command.refuses(message, "fit", "--config", "run.yaml", *spelling.format(path).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["frobnicate"],
            "no command 'frobnicate', expected one of fit, validate, test, predict, ",
        ),
        (["--fit"], "no command '--fit', expected one of fit"),
        (["fit"], "data, model: missing, expected a value in the config or on the command line"),
        (["fit", "--config"], "argument -c/--config: expected one argument"),
        (["fit", "--config", "none.yaml"], "none.yaml: No such file or directory"),
        (["fit", "--config", "corpus"], "corpus: Is a directory"),
        (["fit", "--config", "run.yaml", "-c", "none.yaml"], "none.yaml: No such file or directory"),
        (["data"], "data: no command '', expected 'prepare'"),
        (["data", "prep"], "data: no command 'prep', expected 'prepare'"),
        (["data", "prepare"], "sources, folder: missing, expected a value"),
        (["data", "prepare", "--sources", "corpus", "--folder", "x"], "sources is 'corpus', expected Sequence"),
        (["data", "prepare", "--sources", "[corpus]", "--foldr", "x"], "foldr: no such key; did you mean folder"),
        (["data", "prepare", "--vocab_size", "many"], "vocab_size is 'many', expected int"),
        (["export"], "checkpoint, out_dir: missing, expected"),
        (["export", "run"], "out_dir: missing, expected"),
        (["import", "run/weights"], "out_dir: missing, expected"),
        (["ledger"], "run_dir: missing, expected"),
        (["ledger", "run", "--jsn"], "jsn: no such key; did you mean json"),
        (["ledger", "run", "more"], "argument 'more': not expected, options are --KEY VALUE"),
    ],
)
def test_a_wrong_command_is_named(arguments: list[str], message: str, command: CommandLine) -> None:
    command.refuses(message, *arguments)


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_without_a_command_all_are_listed(arguments: list[str], status: int, command: CommandLine) -> None:
    said = command(*arguments)
    assert (said.status, said.err) == (status, [])
    assert all(f"  {name} " in said.out for name in ("fit", "validate", "test", "predict", "data", "export", "ledger"))


def test_the_version_is_that_of_the_package(command: CommandLine) -> None:
    from ds_lightning import __version__

    assert command("--version").out == f"{__version__}\n"
