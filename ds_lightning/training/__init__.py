"""LightningModules and the checkpoint store."""

from ds_lightning.training.grpo import GRPOModule
from ds_lightning.training.pretrain import PretrainModule

__all__ = ["GRPOModule", "PretrainModule"]
