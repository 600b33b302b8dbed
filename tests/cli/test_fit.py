"""Oracle: for each shape, setting, file or folder that cannot be, one line with the thing, the value and the remedy.

Every file is hashed before and after.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.cost import Ledger, find_price
from tests.cli.command_line import CommandLine, hashes, write_settings
from tests.cli.conftest import close_ledger
from tests.e2e.command import write_corpus

SHAPES = [
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected at least 1"),
    ({"q_lora_rank": 0}, "q_lora_rank is 0, expected at least 1 or null"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, expected an even number"),
    ({"n_group": 3}, r"n_routed_experts \(8\) is not divisible by n_group \(3\)"),
    ({"topk_group": 2}, r"topk_group \(2\) is larger than n_group \(1\)"),
    (
        {"n_group": 4, "num_experts_per_tok": 3},
        r"num_experts_per_tok \(3\) is larger than the 2 experts that topk_group",
    ),
]

SETTINGS = [
    ("model__init_args__total_tokens", 0, "total_tokens is 0, expected more than 0"),
    ("data__init_args__batch_size", 0, "batch_size is 0, expected at least 1"),
    ("data__init_args__ramp_tokens", 5, "ramp_tokens is 5 and start_batch_size None, expected both or none"),
    ("data__init_args__val_fraction", 1.5, "val_fraction is 1.5, expected at least 0 and less than 1"),
    ("data__init_args__tokenizer", "none.json", "none.json: No such file or directory"),
    ("data__init_args__folder", "corpus", "corpus holds no manifest.json, expected a prepared corpus or nothing"),
    ("data__init_args__vocab_size", 300, r"prepared with vocab_size 320 \(this run: 300\): choose another folder"),
    (
        "data__init_args__seq_len",
        10**6,
        r"the train split in prepared has \d+ tokens in \d+ documents, expected at least",
    ),
    ("trainer__accumulate_grad_batches", 0, "trainer.accumulate_grad_batches is 0, expected at least 1"),
    (
        "trainer__accumulate_grad_batches",
        3,
        "batch_size is 8 rows, expected a multiple of 1 ranks times accumulate_grad",
    ),
    ("trainer__devices", 0, "trainer: .*devices=0.* is not a valid input"),
    ("trainer__accelerator", "gpuu", "trainer: You selected an invalid accelerator name: .*gpuu"),
    ("trainer__max_time", "soon", "trainer: .*soon.* is not a valid duration"),
    ("trainer__val_check_interval", 1000, r"val_check_interval.* \(1000\) must be less than or equal to"),
    ("cost__device", "h20", "no on-demand price for device 'h20' in .*; did you mean h200.*set usd_per_device_hour"),
    ("cost__usd_per_device_hour", -1, "usd_per_device_hour of cpu is -1.0, expected a finite number of at least 0"),
    ("cost__prices_file", "none.yaml", "none.yaml: No such file or directory"),
    ("ckpt_path", "none", "checkpoint none: there is no such folder; resume from another one"),
]


@pytest.mark.parametrize(("shape", "message"), SHAPES)
def test_an_impossible_shape_is_refused(
    shape: dict[str, int], message: str, command: CommandLine, tmp_path: Path
) -> None:
    path = write_settings(tmp_path / "bad.yaml", **{f"model__init_args__config__{key}": n for key, n in shape.items()})
    command.refuses(message, "fit", "--config", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value", "message"), SETTINGS)
def test_an_impossible_setting_is_refused(
    key: str, value: Any, message: str, command: CommandLine, tmp_path: Path
) -> None:
    path = write_settings(tmp_path / "bad.yaml", **{key: value})
    command.refuses(message, "fit", "--config", path, "--out", tmp_path / "out")


def test_a_refused_config_does_not_bind_the_folder(own: CommandLine) -> None:
    own.refuses("the tokenizer in prepared has 320 ids, the model's vocab_size is 300, expected at least as many",
                "fit", "--config", write_settings(Path("../bad.yaml"), model__init_args__config__vocab_size=300),
                "--out", "../out")  # fmt: skip
    assert own("fit", "--config", "run.yaml", "--out", "../out").status == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the source ../text does not exist, expected a file, a directory or a glob"),
        (
            {},
            r"the corpus \['../text'\] holds no text \(0 empty documents, 0 not UTF-8\), expected at least one documen",
        ),
        ({"a.txt": b""}, r"holds no text \(1 empty documents, 0 not UTF-8\)"),
        (
            {"a.txt": b"caf\xe9"},
            r"a.txt is not UTF-8: byte 0xe9 at offset 3, expected UTF-8 text: convert the file or set",
        ),
        (
            {"a.txt": b"one line"},
            r"the (train|val) split in ../shards has \d+ tokens in [01] documents, expected at least",
        ),
    ],
)
def test_a_corpus_without_use_is_refused(content: dict[str, bytes] | None, message: str, own: CommandLine) -> None:
    if content is not None:
        Path("../text").mkdir()
    for name, data in (content or {}).items():
        Path("../text", name).write_bytes(data)
    settings = {"data__init_args__sources": ["../text"], "data__init_args__folder": "../shards"}
    own.refuses(message, "fit", "--config", write_settings(Path("../bad.yaml"), **settings), "--out", "../out")
    assert not list(Path("..").glob(".shards*"))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.bin", _truncate, r"prepared/train-00000.bin has \d+ bytes, expected \d+: delete the folder"),
        (
            "train-00000.bin",
            _flip,
            "prepared/train-00000.bin was altered: its SHA-256 is .*, expected .*: delete the fol",
        ),
        (
            "tokenizer.json",
            _flip,
            "prepared/tokenizer.json has SHA-256 .*, but the shards were made with the tokenizer",
        ),
        ("train-00000.bin", Path.unlink, "prepared/train-00000.bin: No such file or directory"),
        ("manifest.json", _truncate, "prepared/manifest.json is damaged"),
        ("manifest.json", Path.unlink, "prepared holds no manifest.json, expected a prepared corpus or nothing"),
    ],
)
def test_shards_that_are_not_what_was_prepared_are_refused(
    name: str, damage: Any, message: str, own: CommandLine
) -> None:
    damage(Path("prepared", name))
    if name == "manifest.json" and damage is _truncate:
        os.truncate("prepared/manifest.json", 100)
    own.refuses(message, "fit", "--config", "run.yaml", "--out", "../out")


def test_a_folder_of_another_config_is_refused_with_the_first_difference(command: CommandLine, tmp_path: Path) -> None:
    path = write_settings(tmp_path / "bad.yaml", model__init_args__lr=0.1)
    message = "run belongs to another config: model.init_args.lr was 0.004, is now 0.1; give another --out"
    command.refuses(message, "fit", "--config", path, "--out", "run")
    command.refuses("run belongs to another config: seed_everything was 0, is now 1", "fit", "--config", "run.yaml",
                    "--out", "run", "--seed_everything", "1")  # fmt: skip


def test_an_output_that_cannot_be_a_folder_is_refused(command: CommandLine) -> None:
    command.refuses(
        "run.yaml is a file, expected a folder for the run", "fit", "--config", "run.yaml", "--out", "run.yaml"
    )
    command.refuses("run.yaml/x: Not a directory", "fit", "--config", "run.yaml", "--out", "run.yaml/x")
    command.refuses("/proc/x: No such file or directory", "fit", "--config", "run.yaml", "--out", "/proc/x")


def test_a_second_run_in_a_folder_in_use_is_refused(own: CommandLine) -> None:
    shutil.rmtree("run/checkpoints")
    ledger = Ledger.open("run/ledger.jsonl", find_price("cpu"), background=False)
    options = ("--checkpoints.every_n_steps", "7")  # may change, but not under a run that goes on
    message = "run/ledger.jsonl is in use by process [0-9]+ on .*, expected one run at a time in a folder"
    own.refuses(message, "fit", "--config", "run.yaml", "--out", "run", *options)
    ledger.close()
    assert own("fit", "--config", "run.yaml", "--out", "run", *options).status == 0


def test_a_budget_that_pays_for_no_end_is_refused_and_then_books_nothing(own: CommandLine) -> None:
    command = ("fit", "--config", "run.yaml", "--out", "poor", "--budget.hours", "0.0001")
    message = r"budget.hours is 0.0001, of which \S+ are spent, and to go on takes \S+, expected more than \S+$"
    said = own(*command)
    assert (said.status, said.out) == (2, "")
    assert re.fullmatch(f"ds-lightning: {message}", said.err[-1]), said.err
    close_ledger()
    own.refuses(message, *command)


def test_a_run_whose_budget_is_spent_books_nothing_and_says_how_to_export(own: CommandLine) -> None:
    Path("run/report.json").unlink()  # as if it had been killed before its end
    before = hashes(Path("run"))
    said = own("fit", "--config", "run.yaml", "--out", "run", "--budget.usd", "1e-9")
    assert said.status == 3
    assert re.search(r"^budget.usd is 1e-09, of which .*; ds-lightning export run exports what was", said.err[-1])
    assert hashes(Path("run")) == before


def test_a_ledger_edited_by_hand_stops_the_run(own: CommandLine) -> None:
    lines = Path("run/ledger.jsonl").read_text().splitlines(keepends=True)
    Path("run/ledger.jsonl").write_text("".join([lines[0].replace("cpu", "gpu"), *lines[1:]]))
    shutil.rmtree("run/checkpoints")
    own.refuses("run/ledger.jsonl line 1 was changed: its hash is .*, expected .*; restore the file from a copy",
                "fit", "--config", "run.yaml", "--out", "run")  # fmt: skip


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_what_needs_a_checkpoint_asks_for_one(name: str, command: CommandLine, tmp_path: Path) -> None:
    message = "out/checkpoints has no valid checkpoint, expected one of a run: name its folder with --out"
    command.refuses(message, name, "--config", "run.yaml", "--out", tmp_path / "out")


def test_a_damaged_checkpoint_is_named_and_not_used(own: CommandLine) -> None:
    state = next(Path("run/checkpoints").glob("*/state.ckpt"))
    _flip(state)
    own.refuses("run/checkpoints has no valid checkpoint", "validate", "--config", "run.yaml", "--out", "run")
    own.refuses("checkpoint run/checkpoints/step-00000002: state.ckpt has sha256 .*, expected .*; resume from another",
                "fit", "--config", "run.yaml", "--out", "run", "--ckpt_path", state.parent)  # fmt: skip


def test_a_damaged_report_is_named(own: CommandLine) -> None:
    _truncate(Path("run/report.json"))
    os.truncate("run/report.json", 50)
    own.refuses("run/report.json is not JSON .*: delete it", "fit", "--config", "run.yaml", "--out", "run")


def test_a_finished_run_shows_its_report_and_changes_nothing_but_its_ledger(own: CommandLine) -> None:
    report = Path("run/report.json").read_bytes()
    said = own("fit", "--config", "run.yaml", "--out", "run")
    assert (said.status, said.err) == (0, ["going on from run/checkpoints/step-00000002"])
    assert "held-out text" in said.out
    assert Path("run/report.json").read_bytes() == report


def test_other_text_in_the_sources_leaves_the_prepared_shards(own: CommandLine, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", documents=2)
    message = r"prepared was prepared with sources \['corpus'\] \(this run: \['../other'\]\): choose another folder"
    path = write_settings(tmp_path / "bad.yaml", data__init_args__sources=["../other"])
    own.refuses(message, "fit", "--config", path, "--out", tmp_path / "out")
