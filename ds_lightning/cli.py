"""The ``ds-lightning`` command: what it is called with, and which exit status it returns.

0: done. 1: a run failed. 2: wrong input, in one line on stderr. 3: stopped early on purpose, with a valid checkpoint.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ds_lightning.user_errors import RunFailedError, one_line, writing

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3

PATH_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What the file system says of a wrong path; anything else, such as a full disk, is a failure of the run."""

HELP = """usage: ds-lightning COMMAND [options]

  fit        train: ds-lightning fit --config configs/pretrain/tiny.yaml --out runs/tiny
  validate   measure the held-out loss of a run: the same options as fit
  test       the same as validate
  predict    hidden states of the held-out text
  recipe     stages one after the other: ds-lightning recipe configs/recipes/r1_laptop.yaml --out runs/r1
  sample     answers that rewards keep, to fine-tune on: ds-lightning sample --config FILE
  data       prepare a corpus: ds-lightning data prepare --sources '["docs/*.md"]' --folder data/docs
  export     a run or checkpoint to Hugging Face layout: ds-lightning export RUN_DIR OUT_DIR
  import     a Hugging Face folder, checked and converted: ds-lightning import HF_DIR OUT_DIR
  generate   text from a model: ds-lightning generate --model HF_DIR --prompt 'Once upon a time', or --chat
  bench      measure against a peer: ds-lightning bench generate, grpo or train
  ledger     verify what a run has cost, and add it up: ds-lightning ledger RUN_DIR
  report     a page to show around, of a run or of many: ds-lightning report RUN_DIR [RUN_DIR ...]
  plan       what a run will need and cost: ds-lightning plan --config FILE --device h100 --num_devices 8
  calibrate  write what a run measured of its device, for plan --calibration: ds-lightning calibrate RUN_DIR FILE
  audit      recompute a published claim of a cost: ds-lightning audit deepseek-r1

ds-lightning COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments after the program's name; none: those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        **dict.fromkeys(("fit", "validate", "test", "predict"), _train),
        "recipe": _recipe,
        "sample": _sample,
        "data": _data,
        "export": _export,
        "import": _import,
        "generate": _generate,
        "bench": _bench,
        "ledger": _ledger,
        "report": _report,
        "plan": _plan,
        "calibrate": _calibrate,
        "audit": _audit,
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
    except OSError as error:
        path = error.filename2 or error.filename  # of a move: what it should have become
        where = f"{path}: {error.strerror}" if path else str(error)
        return _complain(where, status=WRONG_INPUT if isinstance(error, PATH_ERRORS) else FAILED)
    except MemoryError as error:
        return _complain(str(error) or "out of memory", status=FAILED)
    except RunFailedError as error:
        return _complain(str(error), status=FAILED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which most commands do not load
            raise
        return _complain(f"{error}; fewer or shorter texts at a time need less", status=FAILED)
    except ValueError as error:
        meant = _ours(error)
        if meant is None:
            raise
        return _complain(str(meant))


def _complain(message: str, status: int = WRONG_INPUT) -> int:
    print(f"ds-lightning: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _ours(error: BaseException) -> BaseException | None:
    """Return the error that this package raised on purpose, at the bottom of an explicit chain or by itself.

    None where a library met something unforeseen: that is a bug, and needs its traceback.
    """
    package = Path(__file__).resolve().parent
    folders = (package, package.parent / "callbacks")
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        if frames and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in folders):
            return cause
        cause = cause.__cause__
    return None


def _train(argv: list[str]) -> int:
    from ds_lightning.training_cli import run  # Lightning and torch take seconds: only where they are needed

    return run(argv)


def _recipe(argv: list[str]) -> int:
    from ds_lightning.recipes.runner import run_recipe

    parser = _parser("recipe")
    parser.add_argument("recipe", type=str, help="YAML file with the stages")
    parser.add_argument("--out", type=str, help="folder of the runs; none: runs/ and the name of the recipe")
    parser.add_argument("--seed", type=int, help="in place of the recipe's own")
    parser.add_argument("--budget.usd", type=float, help="dollars for all stages, split by the recipe's shares")
    parser.add_argument("--budget.hours", type=float, help="the same in device-hours")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = _parse(parser, argv)
    out = options.out or f"runs/{Path(options.recipe).stem}"
    limits = {name: limit for name, limit in vars(options.budget).items() if limit is not None}
    return run_recipe(options.recipe, out, seed=options.seed, limits=limits, as_json=options.json)


def _sample(argv: list[str]) -> int:
    from ds_lightning.recipes.rejection import run

    return run(argv)


def _parser(command: str) -> ArgumentParser:
    return ArgumentParser(prog=f"ds-lightning {command}", exit_on_error=False, allow_abbrev=False)


def _parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(one_line(str(error), known=[action.dest for action in parser._actions])) from None


def _data(argv: list[str]) -> int:
    from ds_lightning.data import prepare

    if not argv or argv[0] != "prepare":
        return _complain(f"data: no command {argv[0] if argv else ''!r}, expected 'prepare'")
    parser = _parser("data prepare")
    parser.add_function_arguments(prepare)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = _parse(parser, argv[1:]).as_dict()
    as_json = options.pop("json")
    with writing(options["folder"]):
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
    parser.add_argument("--tokenizer", type=str, help="a tokenizer.json; none: that of the run's token shards")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = _parse(parser, argv)
    tokenizer_file = Path(options.tokenizer) if options.tokenizer else None
    with writing(options.out_dir):
        export_checkpoint(
            Path(options.checkpoint), Path(options.out_dir), tokenizer_file=tokenizer_file, overwrite=options.overwrite
        )
    print(f"wrote {options.out_dir}")
    return DONE


def _import(argv: list[str]) -> int:
    from ds_lightning.training.export import import_weights

    parser = _parser("import")
    parser.add_argument("hf_dir", type=str, help="folder in Hugging Face layout, safetensors only")
    parser.add_argument("out_dir", type=str, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    options = _parse(parser, argv)
    with writing(options.out_dir):
        parameters = import_weights(Path(options.hf_dir), Path(options.out_dir), overwrite=options.overwrite)
    print(f"wrote {options.out_dir}: {parameters:,} parameters")
    return DONE


def _generate(argv: list[str]) -> int:
    from ds_lightning.chat_cli import chat
    from ds_lightning.generate_cli import generate

    parser = _parser("generate")
    parser.add_function_arguments(generate, skip={"stream", "prompt"})
    parser.add_argument("--prompt", type=str, help="text to continue; with chat: the first message")
    parser.add_argument("--chat", action="store_true", help="converse, until the input ends or says exit")
    parser.add_argument("--json", action="store_true", help="print text, tokens and log-probabilities as JSON")
    options = _parse(parser, argv).as_dict()
    as_json, converse = options.pop("json"), options.pop("chat")
    if converse:
        n = options.pop("n")
        if as_json or n != 1:
            found = "--json with --chat, expected one of them" if as_json else f"n is {n} with --chat, expected 1"
            return _complain(f"generate: {found}")
        chat(**options)
        return DONE
    if options["prompt"] is None:
        return _complain("generate: neither prompt nor chat, expected --prompt TEXT or --chat")
    samples = generate(**options, stream=not as_json)
    if as_json:
        print(json.dumps(samples, indent=1))
    return DONE


def _bench(argv: list[str]) -> int:
    from ds_lightning.bench.generate import bench_generate, generate_table
    from ds_lightning.bench.grpo import bench_grpo, grpo_table
    from ds_lightning.bench.train import bench_train, train_table

    measurements: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
        "generate": (bench_generate, generate_table),
        "grpo": (bench_grpo, grpo_table),
        "train": (bench_train, train_table),
    }
    if not argv or argv[0] not in measurements:
        return _complain(
            f"bench: no measurement {argv[0] if argv else ''!r}, expected one of {', '.join(measurements)}"
        )
    measure, table = measurements[argv[0]]
    parser = _parser(f"bench {argv[0]}")
    parser.add_function_arguments(measure)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = _parse(parser, argv[1:]).as_dict()
    as_json = options.pop("json")
    with redirect_stdout(sys.stderr):  # libraries of peers write what they please
        figures = measure(**options)
    return _show(figures, table, as_json=as_json)


def _show(figures: Any, table: Callable[[Any], Any], *, as_json: bool) -> int:
    """Print figures for a program or for people."""
    from rich.console import Console

    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        Console().print(table(figures))
    return DONE


def _ledger(argv: list[str]) -> int:
    from ds_lightning.cost.ledger_report import ledger_report, ledger_table

    parser = _parser("ledger")
    parser.add_argument("run_dir", type=str, help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    options = _parse(parser, argv)
    report = ledger_report(options.run_dir)
    return _show(report, ledger_table, as_json=options.json)


def _report(argv: list[str]) -> int:
    from rich.console import Console

    from ds_lightning.report import ranked, read_run_data, report_table, run_row, write_gallery, write_run_page

    parser = _parser("report")
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of runs or recipes; of several, a gallery")
    help_out = "page to write; none: report.html in the folder, gallery.html in the folder of several"
    parser.add_argument("--out", type=str, help=help_out)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = _parse(parser, argv)
    runs = ranked([read_run_data(folder) for folder in options.run_dirs])
    written = write_run_page(runs[0], options.out) if len(runs) == 1 else write_gallery(runs, options.out)
    if options.json:
        print(json.dumps({"page": str(written), "runs": [run_row(run) for run in runs]}, indent=1))
    else:
        Console().print(report_table(runs))
        print(f"wrote {written}")
    return DONE


def _plan(argv: list[str]) -> int:
    from ds_lightning.cost import plan, plan_budget
    from ds_lightning.cost.plan_table import plan_table

    parser = _parser("plan")
    parser.add_argument("--config", type=str, action="append", help="config of a run; again: over the one before")
    parser.add_argument("--budget_usd", type=float, help="instead of a config: what this money buys, with its config")
    parser.add_function_arguments(plan, skip={"config", "offload"})
    parser.add_argument("--offload", action="store_true", help="keep the optimizer's states in the host's memory")
    parser.add_argument("--json", action="store_true", help="print plain numbers as JSON")
    options = _parse(parser, argv).as_dict()
    as_json, budget = options.pop("json"), options.pop("budget_usd")
    if (budget is None) == (not options["config"]):
        return _complain("plan: expected either --config or --budget_usd")
    if budget is None:
        report = plan(**options)
    else:
        given = {key: value for key, value in options.items() if value not in (None, False)}
        for key in ("zero_stage", "offload", "calibration", "expert_parallel", "pipeline_parallel"):
            if key in given:
                return _complain(f"plan: {key} is {given[key]!r} with budget_usd, expected it with a config only")
        if "device" not in given:
            return _complain("plan: budget_usd without a device, expected --device NAME, such as h200")
        report = plan_budget(budget, **given)
    return _show(report, plan_table, as_json=as_json)


def _calibrate(argv: list[str]) -> int:
    from ds_lightning.cost.calibration import Calibration, calibration_from_run

    parser = _parser("calibrate")
    parser.add_argument("run_dir", type=str, help="folder of a run that came to its end")
    parser.add_argument("file", type=str, help="JSON file to write")
    options = _parse(parser, argv)
    with writing(options.file):
        Calibration(**calibration_from_run(options.run_dir)).write(options.file)
    print(f"wrote {options.file}")
    return DONE


def _audit(argv: list[str]) -> int:
    from ds_lightning.cost import audit, audit_tables

    parser = _parser("audit")
    parser.add_argument("claim", type=str, help="a claim that ships with the package, or a .yaml file of your own")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = _parse(parser, argv)
    report = audit(options.claim)
    return _show(report, audit_tables, as_json=options.json)
