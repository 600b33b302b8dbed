"""Rotary position embedding (arXiv:2104.09864) with YaRN context extension."""

from ds_lightning.ops.rope.reference import apply_rope, rope_frequencies, rope_tables, yarn_temperature

__all__ = ["apply_rope", "rope_frequencies", "rope_tables", "yarn_temperature"]
