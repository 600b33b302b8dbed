"""Root-mean-square normalisation (arXiv:1910.07467)."""

from ds_lightning.ops.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
