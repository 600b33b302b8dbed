"""The commands that train and measure: LightningCLI with a run folder, a resume rule, and a set of callbacks."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import asdict
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ds_lightning import callbacks
from ds_lightning.callbacks.tensorboard_layout import tensorboard_loggers
from ds_lightning.cost.calibration import Calibration, write_calibration
from ds_lightning.cost.stored_plan import store_plan
from ds_lightning.models.hf import save_hf
from ds_lightning.report import PAGE, check_ours, write_run_page
from ds_lightning.report.curves import read_curves
from ds_lightning.stage_figures import stage_figures
from ds_lightning.summary import REPORT, read_report, summary_table, write_report
from ds_lightning.training import checkpoint
from ds_lightning.training.export import build_model, load_weights
from ds_lightning.training.failure import refused_once, started_by_lightning
from ds_lightning.training.run_folder import check_run_folder, read_config, value_at, write_config
from ds_lightning.training.strategy import zero_stage
from ds_lightning.user_errors import one_line, writing

USAGE = "ds-lightning {} --config FILE [--config FILE ...] [--out RUN_DIR] [--KEY VALUE ...]"

SECTIONS = {
    "watchdog": callbacks.Watchdog,
    "replica_check": callbacks.ReplicaCheck,
    "skip_steps": callbacks.SkipSteps,
    "routing_bias": callbacks.RoutingBias,
    "cost": callbacks.CostLedger,
    "budget": callbacks.Budget,
    "throughput": callbacks.Throughput,
    "expert_load": callbacks.ExpertLoad,
    "samples": callbacks.Samples,
    "tensorboard_layout": callbacks.TensorBoardLayout,
    "progress_bar": callbacks.ProgressBar,
    "preemption": callbacks.Preemption,
    "checkpoints": callbacks.Checkpoints,
}
"""Callbacks of every run by the key of their settings, in the order in which they act."""


def run(argv: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``, and return the exit status.

    Raises:
        ValueError: If a config, a setting or a file is wrong; one line.
        MemoryError: If a device has not enough memory.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.clear_resolver("oc.env")  # what the environment holds, secrets too, would be written to config.yaml
    _quieten()
    configs = _config_files(argv)
    for path in configs:
        _check_config(path)
    for option in ("--data.init_args.total_tokens", "--data.total_tokens"):
        if any(argument.partition("=")[0] == option for argument in argv):
            raise ValueError(f"{option}: not an option, set --model.init_args.total_tokens: the data follow the model")
    try:
        return TrainingCLI(argv, default_out=_default_out(configs)).exit_status
    except MisconfigurationException as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        if "val_check_interval" in str(error):  # known to Lightning once it has seen the length of the training data
            raise ValueError(str(error).strip()) from None
        raise
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{error}; a smaller micro-batch (a larger trainer.accumulate_grad_batches) needs less, while answers are "
            "sampled a smaller data.init_args.max_batch"
        ) from None


def _quieten() -> None:
    """Leave out what libraries say on every start and no user can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=r".*`self.log\(.val/.*sync_dist")  # our metrics are of all ranks


def _config_files(argv: list[str]) -> list[Path]:
    """Return the values of ``--config``, in any of the spellings that the parser takes."""
    files = [argument.partition("=")[2] for argument in argv if argument.startswith(("--config=", "-c="))]
    files += [value for option, value in pairwise(argv) if option in ("--config", "-c")]
    return [Path(file) for file in files]


def _check_config(path: Path) -> None:
    """Refuse what the parser would not name the file for, or would silently override."""
    content = read_config(path)
    for key in ("model", "data", "trainer", *SECTIONS):
        section = content.get(key, {})
        if not isinstance(section, dict | str):
            raise ValueError(f"{path}: {key} is {section!r}, expected its settings by name")
        if isinstance(section, dict) and not isinstance(section.get("class_path", ""), str):
            raise ValueError(f"{path}: {key}.class_path is {section['class_path']!r}, expected the name of a class")
    planned, read = (value_at(content, f"{section}.init_args.total_tokens") for section in ("model", "data"))
    if read is not None and read != planned:
        raise ValueError(
            f"{path}: data.init_args.total_tokens is {read}, expected that of the model ({planned}): leave it out"
        )


def _default_out(configs: list[Path]) -> str:
    """Name the run after the last config that says what is run and not where."""
    experiments = [path for path in configs if path.resolve().parent.name != "trainer"]
    return f"runs/{experiments[-1].stem if experiments else 'default'}"


class ExactParser(LightningArgumentParser):
    """A parser that completes no abbreviated option, nor do those that it makes for the arguments of classes."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)


class WriteConfig(Callback):
    """Writes the config and the plan into the run folder; last of all, when the ledger has locked the folder.

    Args:
        folder: The run's folder.
        config: The resolved config.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, from one process."""
        if stage == "fit" and trainer.is_global_zero:
            calibration = self.config.get("calibration")
            store_plan(self.folder, self.config, num_devices=trainer.world_size, calibration=calibration)
            write_config(self.folder, self.config)


class TrainingCLI(LightningCLI):
    """LightningCLI whose runs live in one folder each and go on where they stopped.

    Args:
        argv: Command and options.
        default_out: Folder of the run, if none is given.
    """

    def __init__(self, argv: list[str], default_out: str = "runs/default") -> None:
        self.exit_status = 0
        self.default_out = default_out
        sys.argv[1:] = argv  # Lightning warns where arguments are given beside those of the process
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=ExactParser,
            trainer_defaults={"max_epochs": 1, "use_distributed_sampler": False, "enable_model_summary": False},
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                **{name: {"prog": f"ds-lightning {name}", "usage": USAGE.format(name)} for name in self.subcommands()},
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one line what is wrong.

        Raises:
            ValueError: If the arguments or files do not make a complete config.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            known = [action.dest for action in self._subcommand_parsers[sys.argv[1]]._actions]
            raise ValueError(one_line(str(error), known)) from None
        except OmegaConfBaseException as error:
            raise ValueError(f"{str(error.full_key).partition('.')[2]}: {str(error).splitlines()[0]}") from None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, a section for each callback, and links between module and data."""
        parser.add_argument("--out", type=str, default=self.default_out, help="folder of the run")
        help_text = "calibration.json of an earlier run on the device, for the plan that the report is held against"
        parser.add_argument("--calibration", type=str | None, default=None, help=help_text)
        for key, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments("model.init_args.total_tokens", "data.init_args.total_tokens")

    def before_instantiate_classes(self) -> None:
        """Send everything that the run writes to its folder.

        Raises:
            ValueError: If a setting that Lightning takes unchecked is out of range, or nothing says how long to train.
        """
        options = self._options
        planned = "model.init_args.total_tokens"
        if planned in options and options[planned] is None and "data.init_args.epochs" not in options:
            raise ValueError(f"{planned}: missing, expected a value in the config or on the command line")
        options.trainer.default_root_dir = options.out
        if options.trainer.accumulate_grad_batches < 1:
            found = options.trainer.accumulate_grad_batches
            raise ValueError(f"trainer.accumulate_grad_batches is {found}, expected at least 1")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard in the run folder, if nothing else is asked for.

        Raises:
            ValueError: If Lightning refuses a setting of the trainer.
        """
        options = self._options
        if options.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(options.out, name="", version="tensorboard", default_hp_metric=False)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ValueError(f"trainer: {error}") from None
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # its handler saves wherever the signal comes; Preemption is for that
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], extra: list[Any]) -> Trainer:
        """Leave our progress bar out where none is wanted; Lightning refuses the two together."""
        if config["enable_progress_bar"] is False:
            extra = [callback for callback in extra if not isinstance(callback, callbacks.ProgressBar)]
        return super()._instantiate_trainer(config, extra)

    def _run_subcommand(self, subcommand: str) -> None:
        with writing(self._options.out), refused_once(self.trainer):
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Check that the run folder is of this config, and find the checkpoint to go on from."""
        self._dump_config()
        out = Path(self._options.out)
        check_run_folder(out, self.config_dump)
        check_ours(out / PAGE)
        if self._options.calibration is not None:
            Calibration.read(self._options.calibration)
        self.trainer.callbacks.append(WriteConfig(out, self.config_dump))  # type: ignore[attr-defined]
        self._find_checkpoint("fit")

    def fit(self, **kwargs: Any) -> None:
        """Train; of a finished run, show what it brought."""
        report = self._report_of_finished_run(kwargs.get("ckpt_path"))
        if report is not None:
            if self.trainer.is_global_zero:
                Console().print(summary_table(report))
        elif self._is_paid_for(started=kwargs.get("ckpt_path") is not None):
            if kwargs.get("ckpt_path") is not None:
                self.model.weights = None  # the checkpoint has them, and Lightning tells the module of it too late
            self.trainer.fit(**kwargs)
            self._conclude()

    def _is_paid_for(self, *, started: bool) -> bool:
        """Tell whether earlier attempts have left enough of the budget to start another; if not, nothing is booked.

        Raises:
            ValueError: If they have not, and there is no checkpoint either.
        """
        out, price = Path(self._options.out), self._callback("cost").price
        missing: str | None = self._callback("budget").missing_for_start(out, price, self.trainer.world_size)
        if missing is None:
            return True
        if not started:
            raise ValueError(missing)
        self._stop_early(f"{missing}; ds-lightning export {out} exports what was reached")
        return False

    def _report_of_finished_run(self, state: str | None) -> dict[str, Any] | None:
        """Return the report of the checkpoint, if it is the end of the run: of its tokens or of its budget."""
        out, budget = Path(self._options.out), self._callback("budget")
        if state is None or not (out / REPORT).is_file():
            return None
        report = read_report(out)
        stage = report["stages"][0]
        planned = stage["progress"] >= 1 and stage["planned"] == self._planned()
        spent = any((getattr(budget, name) or inf) <= limit for name, limit in (stage.get("budget") or {}).items())
        finished = (planned or spent) and checkpoint.verify(Path(state)).tokens == stage["tokens"]
        return report if finished else None

    def _conclude(self) -> None:
        """Measure and export the final weights, and print what the run brought and cost."""
        if self._callback("preemption").preempted:
            self._stop_early(f"stopped early; the same command goes on from {self._options.out}")
            return
        budget = self._callback("budget")
        if budget.reached:
            self._stop_early("")
        out, cost = Path(self._options.out), self._callback("cost")
        samples = self._callback("samples")
        # A validation of its own resets what the callbacks and the module hold of training.
        figures: dict[str, Any] = {"samples": samples.last, "first_samples": samples.first}
        load: torch.Tensor | None = self.model.last_expert_load
        with cost.phase("export"):
            self._export(out / "weights")
        metrics: dict[str, float] = {}
        if budget.pays_validation:
            self.trainer.limit_val_batches = 1.0
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        elif self.trainer.is_global_zero:
            print("the budget leaves nothing for the last validation", file=sys.stderr)
        if self.trainer.is_global_zero:
            for logger in tensorboard_loggers(self.trainer):
                logger.experiment.flush()
            figures |= {"planned": self._planned(), "budget": budget.reached, "curves": read_curves(out)}
            figures |= stage_figures(self.trainer, self.model, self.datamodule, metrics, load)
            Console().print(summary_table(write_report(out, figures)))
            write_calibration(out)
            print(f"report: {write_run_page(out)}")

    def _stop_early(self, why: str) -> None:
        """Say why, and end with status 3; a process that Lightning started has to end with 0."""
        if not started_by_lightning(self.trainer):
            self.exit_status = 3
        if why and self.trainer.is_global_zero:
            print(why, file=sys.stderr)

    def before_validate(self) -> None:
        """Measure the newest valid checkpoint of the run folder, if no other is named."""
        self._find_checkpoint("validate")

    def before_test(self) -> None:
        """The same for ``test``."""
        self._find_checkpoint("test")

    def before_predict(self) -> None:
        """The same for ``predict``."""
        self._find_checkpoint("predict")

    def _find_checkpoint(self, subcommand: str) -> None:
        """Resolve the checkpoint to start from; only ``fit`` may do without one."""
        folder, path = Path(self._options.out) / "checkpoints", self._options.ckpt_path
        if path is None:
            path, skipped = checkpoint.newest_valid(folder)
            for reason in skipped if self.trainer.is_global_zero else ():
                print(reason, file=sys.stderr)
        else:
            checkpoint.verify(Path(path))
        if path is None and subcommand != "fit":
            raise ValueError(f"{folder} has no valid checkpoint, expected one of a run: name its folder with --out")
        if path is not None:
            state = Path(path) if Path(path).name == checkpoint.STATE else Path(path) / checkpoint.STATE
            ranks, stage = self.trainer.world_size, zero_stage(self.trainer.strategy)
            change = checkpoint.check_layout(state.parent, ranks=ranks, zero_stage=stage)
            if self.trainer.is_global_zero:
                print(*filter(None, [f"going on from {state.parent}", change]), sep="\n", file=sys.stderr)
            self.config_init[subcommand]["ckpt_path"] = str(state)

    def _export(self, folder: Path) -> None:
        """Write the weights from one process; those that are sharded come from the last checkpoint, in fp32."""
        data, model = self.datamodule, self.model.model
        if self.trainer.is_global_zero:
            if zero_stage(self.trainer.strategy):
                newest, _ = checkpoint.newest_valid(Path(self._options.out) / "checkpoints")
                assert newest is not None, "a run that came to its end has saved it"
                model = build_model(asdict(self.model.config), load_weights(newest))
            save_hf(
                model,
                folder,
                tokenizer_file=data.tokenizer_file,
                eos_token_id=data.eos_id,
                pad_token_id=data.pad_id,
                overwrite=True,
            )
        self.trainer.strategy.barrier("export")

    def _planned(self) -> dict[str, Any]:
        """Return the settings that say how long the run is: with others, a finished run goes on."""
        settings = {**self._options.model.init_args, **self._options.data.init_args}
        return {name: settings.get(name) for name in ("total_tokens", "epochs", "rollouts", "steps_per_rollout")}

    @property
    def _options(self) -> Namespace:
        options: Namespace = self.config[self.subcommand]
        return options

    def _callback(self, key: str) -> Any:
        return next(c for c in self.trainer.callbacks if type(c) is SECTIONS[key])  # type: ignore[attr-defined]
