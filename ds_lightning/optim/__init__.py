"""Which parameters decay, and how rates follow the progress of a run."""

from ds_lightning.optim.muon import Muon
from ds_lightning.optim.param_groups import build_optimizer, muon_groups, weight_decay_groups
from ds_lightning.optim.schedules import Schedule, Stairs, V3Schedule, WarmupStableDecay

__all__ = [
    "Muon",
    "Schedule",
    "Stairs",
    "V3Schedule",
    "WarmupStableDecay",
    "build_optimizer",
    "muon_groups",
    "weight_decay_groups",
]
