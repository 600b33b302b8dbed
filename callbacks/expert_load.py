"""How evenly the routers spread tokens over experts: MaxVio, dead experts, a heatmap."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw
from torch import Tensor

from ds_lightning.callbacks.tensorboard_layout import tensorboard_loggers
from ds_lightning.losses.load_balance import max_violation

# Colours of load / mean at these ratios, linear in between: blue is idle, white is a fair share, red is overloaded.
_RATIOS = (0.0, 0.5, 1.0, 1.5, 2.0)
_COLOURS = ((16, 24, 84), (112, 152, 212), (244, 244, 240), (236, 140, 84), (132, 12, 20))
_CELL_HEIGHT = 12
_MIN_CELL_WIDTH, _MAX_CELL_WIDTH = 3, 24
_TARGET_WIDTH = 768
_LEGEND_HEIGHT, _LEGEND_WIDTH, _BAR_WIDTH, _BAR_HEIGHT = 36, 280, 160, 12


class ExpertLoad(Callback):
    """Logs the load of the experts over each optimizer step.

    Reads ``pl_module.last_expert_load`` [layers experts], the tokens of the whole step (all ranks and micro-batches)
    routed to each expert, or None for a dense model. The routing bias's callback sets it, so this one stands after
    it in the list of callbacks.

    Logged are ``moe/max_violation`` (mean over layers), ``moe/dead_experts`` (experts of all layers without a token in
    the last ``window`` steps) and the image ``moe/load``. A step that was skipped counts for nothing.

    Args:
        every_n_steps: Optimizer steps between two heatmaps.
        window: Optimizer steps without a token after which an expert counts as dead.

    Raises:
        ValueError: If a number of steps is below 1.
    """

    def __init__(self, every_n_steps: int = 100, window: int = 50) -> None:
        for name, steps in (("every_n_steps", every_n_steps), ("window", window)):
            if steps < 1:
                raise ValueError(f"ExpertLoad: {name} is {steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self.window = window
        self._idle_steps: Tensor | None = None  # [layers experts]: steps since the last token
        self._steps_counted: Tensor | int = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting optimizer steps from where the run stands."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log after an optimizer step; other micro-batches are skipped."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        load: Tensor | None = pl_module.last_expert_load
        if load is None:
            return
        pl_module.log("moe/max_violation", max_violation(load).mean())
        pl_module.log("moe/dead_experts", self._count_dead(load, pl_module.step_skipped).float())
        if trainer.global_step % self.every_n_steps == 0:
            image = load_heatmap(load_ratio(load).numpy())
            for logger in tensorboard_loggers(trainer):
                logger.experiment.add_image("moe/load", image, trainer.global_step, dataformats="HWC")

    def _count_dead(self, load: Tensor, skipped: Tensor | bool) -> Tensor:
        """Count on; whether the step was skipped only the device knows, and the host does not wait for it."""
        skipped = torch.as_tensor(skipped, device=load.device)
        idle = torch.zeros_like(load, dtype=torch.int64) if self._idle_steps is None else self._idle_steps
        idle = idle.to(load.device)
        self._idle_steps = torch.where(skipped, idle, torch.where(load > 0, 0, idle + 1))
        self._steps_counted = self._steps_counted + ~skipped
        return (self._idle_steps >= self._steps_counted.clamp(max=self.window)).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return how long each expert has been idle, so that a resumed run counts on."""
        idle = None if self._idle_steps is None else self._idle_steps.cpu()
        return {"idle_steps": idle, "steps_counted": int(self._steps_counted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._idle_steps = state_dict["idle_steps"]
        self._steps_counted = state_dict["steps_counted"]


def load_ratio(load: Float[Tensor, "layers experts"]) -> Float[Tensor, "layers experts"]:
    """Return the load of each expert over the mean of its layer, in fp32 on the CPU."""
    return (load / load.mean(dim=1, keepdim=True).clamp_min(torch.finfo(load.dtype).tiny)).float().cpu()


def load_heatmap(ratio: Float[np.ndarray, "layers experts"]) -> UInt8[np.ndarray, "height width 3"]:
    """Draw load / mean load as an image: one row a layer, one column an expert, a legend below.

    Args:
        ratio: Load of each expert divided by the mean load of its layer; 2 and above share one colour.
    """
    cell_width = min(max(_TARGET_WIDTH // ratio.shape[1], _MIN_CELL_WIDTH), _MAX_CELL_WIDTH)
    cells = _colour(ratio).repeat(_CELL_HEIGHT, axis=0).repeat(cell_width, axis=1)
    height, width = cells.shape[:2]
    canvas = np.full((height + _LEGEND_HEIGHT, max(width, _LEGEND_WIDTH), 3), 255, dtype=np.uint8)
    canvas[:height, :width] = cells

    top = height + 4
    canvas[top : top + _BAR_HEIGHT, 4 : 4 + _BAR_WIDTH] = _colour(np.linspace(0.0, _RATIOS[-1], _BAR_WIDTH)[None])
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for x, label in ((4, "0"), (2 + _BAR_WIDTH // 2, "1"), (_BAR_WIDTH - 8, "2+")):
        draw.text((x, top + _BAR_HEIGHT + 2), label, fill=(0, 0, 0))
    draw.text((_BAR_WIDTH + 12, top - 2), f"load / mean\nmin {ratio.min():.2f} max {ratio.max():.2f}", fill=(0, 0, 0))
    return np.asarray(image)


def _colour(ratio: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 3"]:
    channels = [np.interp(ratio, _RATIOS, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
