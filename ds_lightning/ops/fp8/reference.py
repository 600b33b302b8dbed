"""Definition of block-scaled FP8 weights, in the layout of DeepSeek-V3's released checkpoint."""

import torch
from jaxtyping import Float
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite value of E4M3 (4 exponent bits, 3 mantissa bits, no infinity)."""


def scale_shape(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks cover a matrix; those at the lower and right edge may be cut."""
    return -(-rows // block[0]), -(-columns // block[1])


def quantize_blocks(
    weight: Float[Tensor, "rows columns"], block: tuple[int, int] = (128, 128)
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "row_blocks column_blocks"]]:
    """Round a matrix to E4M3 with one scale a block.

    DeepSeek-V3 (arXiv:2412.19437, section 3.3.2, "Fine-Grained Quantization"): the largest magnitude of each block is
    mapped to the largest E4M3 value.

    Args:
        weight: Matrix of any floating-point type.
        block: Rows and columns that share a scale.

    Returns:
        The values in ``torch.float8_e4m3fn``, and what to multiply each block by to get the weights back, in fp32.

    Numerics: fp32.
    """
    rows, columns = weight.shape
    row_blocks, column_blocks = scale_shape(rows, columns, block)
    padded = weight.new_zeros(row_blocks * block[0], column_blocks * block[1], dtype=torch.float32)
    padded[:rows, :columns] = weight
    largest = padded.view(row_blocks, block[0], column_blocks, block[1]).abs().amax((1, 3))
    scale_inv = (largest / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)  # a block of zeros divides by it too
    scaled = weight.float() / _spread(scale_inv, rows, columns, block)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_inv


def dequantize_blocks(
    weight: Float[Tensor, "rows columns"],
    scale_inv: Float[Tensor, "row_blocks column_blocks"],
    block: tuple[int, int] = (128, 128),
) -> Float[Tensor, "rows columns"]:
    """Return the fp32 matrix that block-scaled FP8 values stand for.

    Args:
        weight: Values, usually in ``torch.float8_e4m3fn``.
        scale_inv: Factor of each block.
        block: Rows and columns that share a scale.

    Raises:
        ValueError: If there is not one scale a block.
    """
    rows, columns = weight.shape
    expected = scale_shape(rows, columns, block)
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scales have the shape {list(scale_inv.shape)}, expected {list(expected)}: one for each "
            f"{block[0]} x {block[1]} block of a [{rows}, {columns}] weight"
        )
    return weight.float() * _spread(scale_inv.float(), rows, columns, block)


def _spread(
    scales: Float[Tensor, "row_blocks column_blocks"], rows: int, columns: int, block: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """Repeat each block's scale over the elements of the block."""
    return scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
