"""The model assembled, and its exchange with Hugging Face checkpoints."""

from ds_lightning.models.deepseek import MTP, Block, DeepSeek

__all__ = ["MTP", "Block", "DeepSeek"]
