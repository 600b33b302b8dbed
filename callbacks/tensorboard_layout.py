"""The custom-scalars page of TensorBoard: Cost, Loss, MoE, Speed."""

from itertools import islice
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

CHARTS = {
    "Cost": {
        "dollars": ["cost/usd"],
        "device hours": ["cost/device_hours"],
        "tokens per dollar": ["cost/tokens_per_usd"],
        "model FLOPs utilisation": ["cost/mfu"],
    },
    "Loss": {
        "loss": ["train/loss", "val/loss"],
        "validation bits per byte": ["val/bits_per_byte"],
        "validation perplexity": ["val/ppl"],
        "gradient norm": ["train/grad_norm"],
        "learning rate": ["train/lr"],
    },
    "MoE": {
        "max violation of balanced load": ["moe/max_violation"],
        "dead experts": ["moe/dead_experts"],
    },
    "Speed": {
        "tokens per second": ["speed/tokens_per_second"],
        "seconds per step": ["speed/step_seconds"],
    },
}
"""Category -> chart -> metric names, in the order of the page."""

# TensorBoard keeps the layout under this tag. Only hyperparameters are written before it, so it is found at once.
_LAYOUT_TAG = "custom_scalars__config__"
_EVENTS_SEARCHED = 64


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers of a trainer; their ``experiment`` does nothing on ranks above 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def custom_scalars_layout() -> dict[str, dict[str, list[str | list[str]]]]:
    """Return ``CHARTS`` in the form that ``SummaryWriter.add_custom_scalars`` takes.

    TensorBoard reads each name as a regular expression that has to match at the start of a tag, so that
    ``cost/usd`` alone would also draw ``cost/usd_per_useful_sample``: the names are anchored.
    """
    return {
        category: {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in charts.items()}
        for category, charts in CHARTS.items()
    }


class TensorBoardLayout(Callback):
    """Writes the layout of the custom-scalars page, once per log folder, also over several attempts of a run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout to every TensorBoard log folder that has none yet."""
        if not trainer.is_global_zero:
            return
        for logger in tensorboard_loggers(trainer):
            writer: SummaryWriter = logger.experiment
            if not _has_layout(Path(logger.log_dir)):
                writer.add_custom_scalars(custom_scalars_layout())
                writer.flush()


def _has_layout(log_dir: Path) -> bool:
    return any(
        value.tag == _LAYOUT_TAG
        for path in sorted(log_dir.glob("events.out.tfevents.*"))
        for event in islice(EventFileLoader(str(path)).Load(), _EVENTS_SEARCHED)
        for value in event.summary.value
    )
