"""The commands that train and measure: LightningCLI with a run folder, a resume rule, and the callbacks of every run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from ds_lightning import callbacks
from ds_lightning.training import checkpoint
from ds_lightning.training.export import export_model
from ds_lightning.training.run_folder import claim_run_folder

SECTIONS = {
    "routing_bias": callbacks.RoutingBias,
    "cost": callbacks.CostLedger,
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
        out = Path(self._options.out)
        self._dump_config()
        claim_run_folder(out, self.config_dump)
        path = self._options.ckpt_path
        if path is None:
            newest, skipped = checkpoint.newest_valid(out / "checkpoints")
            for reason in skipped:
                print(reason, file=sys.stderr)
            path = newest
        else:
            checkpoint.verify(Path(path))
        if path is not None:
            state = Path(path) if Path(path).name == checkpoint.STATE else Path(path) / checkpoint.STATE
            print(f"going on from {state.parent}", file=sys.stderr)
            self.config_init["fit"]["ckpt_path"] = str(state)

    def after_fit(self) -> None:
        """Measure and export the final weights, print what the run brought and cost."""
        if self._callback("preemption").preempted:
            self.exit_status = 3
            return
        metrics = dict(self.trainer.callback_metrics)
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        metrics.update(self.trainer.callback_metrics)
        with self._callback("cost").phase("export"):
            export_model(self.model.model, Path(self._options.out) / "weights", self.datamodule)

    @property
    def _options(self) -> Namespace:
        options: Namespace = self.config[self.subcommand]
        return options

    def _callback(self, key: str) -> Any:
        return next(c for c in self.trainer.callbacks if type(c) is SECTIONS[key])  # type: ignore[attr-defined]
