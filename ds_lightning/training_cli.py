"""The commands that train and measure: LightningCLI with a run folder, a resume rule, and the callbacks of every run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from ds_lightning import callbacks
from ds_lightning.data import compression_baselines
from ds_lightning.flops import active_param_count, param_count
from ds_lightning.models.hf import save_hf
from ds_lightning.summary import summary_table, write_report
from ds_lightning.training import checkpoint
from ds_lightning.training.run_folder import claim_run_folder

SECTIONS = {
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
    """Run ``fit``, ``validate``, ``test`` or ``predict``, and return the exit status."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    cli = TrainingCLI(argv)
    return cli.exit_status


class TrainingCLI(LightningCLI):
    """LightningCLI whose runs live in one folder each and go on where they stopped."""

    def __init__(self, argv: list[str]) -> None:
        self.exit_status = 0
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
            trainer_defaults={"max_epochs": 1, "use_distributed_sampler": False, "enable_model_summary": False},
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, a section for each callback, and links between module and data."""
        parser.add_argument("--out", type=str, default="runs/default", help="folder of the run")
        for key, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments("model.init_args.total_tokens", "data.init_args.total_tokens")

    def before_instantiate_classes(self) -> None:
        """Send everything that the run writes to its folder."""
        options = self._options
        options.trainer.default_root_dir = options.out

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard in the run folder, if nothing else is asked for."""
        options = self._options
        if options.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(options.out, name="", version="tensorboard", default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Claim the run folder for this config, and find the checkpoint to go on from."""
        self._dump_config()
        claim_run_folder(Path(self._options.out), self.config_dump)
        self._find_checkpoint("fit")

    def after_fit(self) -> None:
        """Measure and export the final weights, and print what the run brought and cost."""
        if self._callback("preemption").preempted:
            print(f"stopped early; the same command goes on from {self._options.out}", file=sys.stderr)
            self.exit_status = 3
            return
        if self._callback("budget").reached:
            self.exit_status = 3
        out, cost = Path(self._options.out), self._callback("cost")
        samples = self._callback("samples").last  # a validation of its own would forget them
        self.trainer.limit_val_batches = 1.0
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        folder = self.datamodule.folder
        with cost.phase("export"):
            self._export(out / "weights")
        if self.trainer.is_global_zero:
            figures = {
                "name": "pretrain",
                "tokens": self.model.tokens_seen,
                "parameters": param_count(self.model.config, include_mtp=True),
                "active_parameters": active_param_count(self.model.config, include_embedding=False),
                "bits_per_byte": {**compression_baselines(folder), "model": self._metric("val/bits_per_byte")},
                "val_loss": self._metric("val/loss"),
                "samples": samples,
            }
            Console().print(summary_table(write_report(out, figures)))

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
            for reason in skipped:
                print(reason, file=sys.stderr)
        else:
            checkpoint.verify(Path(path))
        if path is None and subcommand != "fit":
            raise ValueError(f"{folder} has no valid checkpoint, expected one of a run: name its folder with --out")
        if path is not None:
            state = Path(path) if Path(path).name == checkpoint.STATE else Path(path) / checkpoint.STATE
            print(f"going on from {state.parent}", file=sys.stderr)
            self.config_init[subcommand]["ckpt_path"] = str(state)

    def _export(self, folder: Path) -> None:
        manifest = self.datamodule.opened.manifest
        save_hf(
            self.model.model,
            folder,
            tokenizer_file=Path(self.datamodule.folder) / "tokenizer.json",
            eos_token_id=manifest.eos_id,
            pad_token_id=manifest.pad_id,
            overwrite=True,
        )

    def _metric(self, name: str) -> float:
        return float(self.trainer.callback_metrics[name])

    @property
    def _options(self) -> Namespace:
        options: Namespace = self.config[self.subcommand]
        return options

    def _callback(self, key: str) -> Any:
        return next(c for c in self.trainer.callbacks if type(c) is SECTIONS[key])  # type: ignore[attr-defined]
