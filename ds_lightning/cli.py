"""The ``ds-lightning`` command: what it is called with, and which exit status it returns.

0: done. 1: a run failed. 2: wrong input, in one line on stderr. 3: stopped early on purpose, with a valid checkpoint.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3

HELP = """usage: ds-lightning COMMAND [options]

  fit        train: ds-lightning fit --config configs/pretrain/tiny.yaml --out runs/tiny
  validate   measure the held-out loss of a run: the same options as fit
  test       the same as validate
  predict    hidden states of the held-out text
  data       prepare a corpus: ds-lightning data prepare --sources '["docs/*.md"]' --folder data/docs
  export     a run or checkpoint to Hugging Face layout: ds-lightning export RUN_DIR OUT_DIR
  import     a Hugging Face folder, checked and converted: ds-lightning import HF_DIR OUT_DIR
  ledger     verify what a run has cost, and add it up: ds-lightning ledger RUN_DIR

ds-lightning COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments after the program's name; none: those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        **dict.fromkeys(("fit", "validate", "test", "predict"), _train),
        "data": _data,
        "export": _export,
        "import": _import,
        "ledger": _ledger,
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE if argv else WRONG_INPUT
    if argv[0] == "--version":
        from ds_lightning import __version__

        print(__version__)
        return DONE
    if argv[0] not in commands:
        return _complain(f"no command {argv[0]!r}, expected one of {', '.join(commands)}")
    try:
        return commands[argv[0]](argv if commands[argv[0]] is _train else argv[1:])
    except KeyboardInterrupt:
        return _complain("interrupted", status=FAILED)
    except ArgumentError as error:
        return _complain(_innermost(str(error)))
    except OSError as error:
        return _complain(str(error), status=WRONG_INPUT if isinstance(error, FileNotFoundError) else FAILED)
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _complain(str(error))


def _complain(message: str, status: int = WRONG_INPUT) -> int:
    print(f"ds-lightning: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error on purpose, and no library below it met something unforeseen."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parent
    ours = (package, package.parent / "callbacks")
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in ours)


def _innermost(message: str) -> str:
    """Return the cause at the bottom of jsonargparse's nested report, with the key that it names at the top."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _train(argv: list[str]) -> int:
    from ds_lightning.training_cli import run  # Lightning and torch take seconds: only where they are needed

    return run(argv)


def _parser(command: str) -> ArgumentParser:
    return ArgumentParser(prog=f"ds-lightning {command}", exit_on_error=False)


def _data(argv: list[str]) -> int:
    from ds_lightning.data import prepare

    if not argv or argv[0] != "prepare":
        return _complain(f"data: no command {argv[0] if argv else ''!r}, expected 'prepare'")
    parser = _parser("data prepare")
    parser.add_function_arguments(prepare)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = parser.parse_args(argv[1:]).as_dict()
    as_json = options.pop("json")
    manifest = prepare(**options)
    if as_json:
        print((Path(options["folder"]) / "manifest.json").read_text(encoding="utf-8"), end="")
        return DONE
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes")
    return DONE


def _export(argv: list[str]) -> int:
    from ds_lightning.training.export import export_checkpoint

    parser = _parser("export")
    parser.add_argument("checkpoint", type=str, help="a run folder, or one of its checkpoints")
    parser.add_argument("out_dir", type=str, help="folder to write, in Hugging Face layout")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(argv)
    export_checkpoint(Path(options.checkpoint), Path(options.out_dir), overwrite=options.overwrite)
    print(f"wrote {options.out_dir}")
    return DONE


def _import(argv: list[str]) -> int:
    from ds_lightning.training.export import import_weights

    parser = _parser("import")
    parser.add_argument("hf_dir", type=str, help="folder in Hugging Face layout, safetensors only")
    parser.add_argument("out_dir", type=str, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    options = parser.parse_args(argv)
    parameters = import_weights(Path(options.hf_dir), Path(options.out_dir), overwrite=options.overwrite)
    print(f"wrote {options.out_dir}: {parameters:,} parameters")
    return DONE


def _ledger(argv: list[str]) -> int:
    from rich.console import Console

    from ds_lightning.cost.ledger_report import ledger_report, ledger_table

    parser = _parser("ledger")
    parser.add_argument("run_dir", type=str, help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    options = parser.parse_args(argv)
    report = ledger_report(options.run_dir)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(ledger_table(report))
    return DONE
