"""Block-scaled FP8: weights in E4M3 with one scale a block."""

from ds_lightning.ops.fp8.reference import dequantize_blocks, quantize_blocks, scale_shape

__all__ = ["dequantize_blocks", "quantize_blocks", "scale_shape"]
