"""The routed experts: sorted by expert for training, all at once for the few tokens of a decoding step."""

from ds_lightning.ops.experts import reference
from ds_lightning.ops.experts.few import few_tokens
from ds_lightning.ops.experts.grouped import routed_experts

__all__ = ["few_tokens", "reference", "routed_experts"]
