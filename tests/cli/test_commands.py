"""Oracle: what ``data``, ``export``, ``import`` and ``ledger`` owe a user: files that agree, or one line."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_lightning.data import Manifest
from ds_lightning.models.hf import load_hf
from ds_lightning.training import checkpoint
from tests.cli.command_line import CommandLine


def test_an_export_holds_the_weights_of_the_run_and_imports_again(command: CommandLine, tmp_path: Path) -> None:
    said = command("export", "run", tmp_path / "hf")
    assert (said.status, said.err, said.out) == (0, [], f"wrote {tmp_path / 'hf'}\n")
    trained = load_file("run/weights/model.safetensors")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    said = command("import", tmp_path / "hf", tmp_path / "again")
    size = sum(part.numel() for part in load_hf(tmp_path / "hf").state_dict().values())
    assert (said.status, said.out) == (0, f"wrote {tmp_path / 'again'}: {size:,} parameters\n")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == Path("prepared/tokenizer.json").read_bytes()
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "none"], "none does not exist, expected the folder of a run or one of its checkpoints"),
        (["export", "corpus"], "checkpoint corpus: manifest.json is missing"),
        (["export", "run.yaml"], "checkpoint run.yaml: found a file, expected a folder"),
        (["export", "run", "--tokenizer", "none.json"], "none.json is missing, expected the run's tokenizer"),
        (["export", "run", "--tokenizer", "run.yaml"], "run.yaml is not JSON"),
        (["import", "none"], "none/config.json: No such file or directory"),
        (["import", "corpus"], "corpus/config.json: No such file or directory"),
        (["import", "run.yaml"], "run.yaml/config.json: Not a directory"),
    ],
)
def test_what_cannot_be_read_is_named(arguments: list[str], message: str, command: CommandLine, tmp_path: Path) -> None:
    name, source, *options = arguments
    command.refuses(message, name, source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "run/weights",
            r"run/weights is not empty \(config.json\), expected a new folder; overwrite replaces an export",
        ),
        ("run.yaml", "run.yaml is a file, expected a folder to export to"),
        ("corpus", "corpus is not empty"),
        ("/proc/x", "/proc/.*: No such file or directory"),
    ],
)
@pytest.mark.parametrize("source", [["export", "run"], ["import", "run/weights"]])
def test_nothing_is_written_over(source: list[str], target: str, message: str, command: CommandLine) -> None:
    command.refuses(message, *source, target)
    if target == "corpus":
        command.refuses("corpus holds 00.txt, which no export writes", *source, target, "--overwrite")


def test_a_pickle_is_not_imported(own: CommandLine) -> None:
    Path("run/weights/model.safetensors").rename("run/weights/pytorch_model.bin")
    message = (
        "run/weights holds pytorch_model.bin, a pickle, which can run code when it is read, expected model.safetens"
    )
    own.refuses(message, "import", "run/weights", "../out")


def test_a_damaged_import_is_named(own: CommandLine) -> None:
    os.truncate("run/weights/model.safetensors", 3000)
    own.refuses("run/weights/model.safetensors is damaged .* expected a complete", "import", "run/weights", "../out")


def test_the_ledger_is_printed_as_a_table_and_as_json(command: CommandLine) -> None:
    report = json.loads(command("ledger", "run", "--json").out)
    assert report["chain"] == "ok"
    assert sum(phase["seconds"] for phase in report["phases"].values()) == pytest.approx(report["wall_seconds"])
    table = command("ledger", "run").out
    assert all(phase in table for phase in report["phases"])
    assert f"{report['records']} records: ok" in " ".join(table.split())


def test_a_ledger_that_is_none_or_was_edited_is_named(own: CommandLine) -> None:
    own.refuses("none has no ledger.jsonl, expected the folder of a run", "ledger", "none")
    own.refuses("corpus has no ledger.jsonl, expected the folder of a run", "ledger", "corpus")
    lines = Path("run/ledger.jsonl").read_text().splitlines(keepends=True)
    Path("run/ledger.jsonl").write_text("".join([*lines[:-1], lines[-1].replace('"close"', '"flush"')]))
    message = (
        rf"run/ledger.jsonl line {len(lines)} was changed: its hash is .*, expected .*; restore the file from a copy"
    )
    own.refuses(message, "ledger", "run")
    Path("run/ledger.jsonl").write_text("".join(lines[1:]))
    own.refuses("run/ledger.jsonl line 1 follows a record with hash .*: lines were removed", "ledger", "run", "--json")


def test_data_are_prepared_once_and_listed(command: CommandLine, tmp_path: Path) -> None:
    arguments = ("data", "prepare", "--sources", "[corpus]", "--folder", tmp_path / "shards", "--vocab_size", "320")
    said = command(*arguments)
    manifest = Manifest.read(tmp_path / "shards")
    assert (said.status, said.err) == (0, [])
    assert said.out.splitlines() == [
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes"
        for name, split in manifest.splits.items()
    ]
    before = (tmp_path / "shards" / "manifest.json").stat().st_mtime_ns
    assert json.loads(command(*arguments, "--json").out)["settings"] == manifest.settings
    assert (tmp_path / "shards" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["[none]", "x"], "the source none does not exist, expected a file, a directory or a glob"),
        (["[none*]", "x"], r"the pattern none\* matches no file, expected at least one: check sources"),
        (["[]", "x"], r"the corpus \[\] holds no text .* expected at least one document"),
        (["[corpus]", "x", "--vocab_size", "20"], "vocab_size is 20, expected at least 267: 256 bytes and 11 special"),
        (["[corpus]", "x", "--fim_rate", "2"], "fim_rate is 2.0, expected 0 to 1"),
        (["[corpus]", "x", "--tokenizer", "none.json"], "none.json: No such file or directory"),
        (["[corpus]", "x", "--tokenizer", "run/report.json"], "run/report.json is not a tokenizer"),
        (["[corpus]", "run.yaml"], "run.yaml holds no manifest.json, expected a prepared corpus or nothing"),
        (
            ["[corpus]", "run"],
            "run holds no manifest.json, expected a prepared corpus or nothing: choose another folder",
        ),
        (["[corpus]", "prepared", "--seed", "1"], r"prepared was prepared with .*seed 0 \(this run: 1\)"),
        (["[corpus]", "/proc/x"], "/proc/.*: No such file or directory"),
    ],
)
def test_data_that_cannot_be_prepared_are_named(arguments: list[str], message: str, command: CommandLine) -> None:
    sources, folder, *options = arguments
    command.refuses(message, "data", "prepare", "--sources", sources, "--folder", folder, *options)


def test_a_checkpoint_is_exported_by_its_name(command: CommandLine, tmp_path: Path) -> None:
    newest, _ = checkpoint.newest_valid(Path("run/checkpoints"))
    assert newest is not None
    assert command("export", newest, tmp_path / "hf", "--tokenizer", "prepared/tokenizer.json").status == 0
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == load_file("run/weights/model.safetensors").keys()
