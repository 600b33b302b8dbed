"""Affinities, selection bias, group limit, top-k and gate values of the DeepSeek routers."""

from ds_lightning.ops.topk_gate.reference import Gate, topk_gate

__all__ = ["Gate", "topk_gate"]
