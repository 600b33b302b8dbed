"""Which parameters decay, and how rates follow the progress of a run."""

from ds_lightning.optim.param_groups import adamw, weight_decay_groups
from ds_lightning.optim.schedules import Schedule, Stairs, V3Schedule, WarmupStableDecay

__all__ = ["Schedule", "Stairs", "V3Schedule", "WarmupStableDecay", "adamw", "weight_decay_groups"]
