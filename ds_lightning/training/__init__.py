"""LightningModules, ZeRO, and the checkpoint store."""

from ds_lightning.training.grpo import GRPOModule
from ds_lightning.training.pretrain import PretrainModule
from ds_lightning.training.strategy import ZeRO

__all__ = ["GRPOModule", "PretrainModule", "ZeRO"]
