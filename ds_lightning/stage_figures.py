"""What a finished run brought, as its report.json keeps it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor

from ds_lightning.callbacks import PassAtOne
from ds_lightning.callbacks.expert_load import load_ratio
from ds_lightning.flops import active_param_count, param_count
from ds_lightning.training.peak_memory import peak_memory_gb


def stage_figures(
    trainer: Trainer,
    model: Any,
    data: Any,
    metrics: dict[str, float],
    load: Float[Tensor, "layers experts"] | None,
) -> dict[str, Any]:
    """Return the figures of one stage that the model, its data and its last validation tell.

    Args:
        trainer: Its callbacks may have measured answers.
        model: The trained module.
        data: The data module.
        metrics: Of the last validation of all held-out data; empty: there was none.
        load: Tokens routed to each expert in the last optimizer step; none: a dense model.
    """
    figures: dict[str, Any] = {
        "name": data.stage,
        "tokens": model.tokens_seen,
        "progress": model.planned_progress,
        "skipped_steps": int(model.skipped_steps),
        "parameters": param_count(model.config, include_mtp=True),
        "active_parameters": active_param_count(model.config, include_embedding=False),
        "peak_memory_gb": peak_memory_gb(model.device),
        "bits_per_byte": {},
    }
    if load is not None:
        figures["expert_load"] = load_ratio(load).round(decimals=3).tolist()
    if "val/loss" in metrics:
        baselines: dict[str, float] = getattr(data, "compression_baselines", dict)()
        figures["bits_per_byte"] = {**baselines, "model": metrics["val/bits_per_byte"]}
        figures["val_loss"] = metrics["val/loss"]
    for name in ("pass_at_1", "pass_at_1_greedy", "completion_length"):
        if f"val/{name}" in metrics:
            figures[name] = metrics[f"val/{name}"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set where mypy does not look
        if isinstance(callback, PassAtOne):
            figures |= {"first_answers": callback.first, "answers": callback.last}
    return figures
