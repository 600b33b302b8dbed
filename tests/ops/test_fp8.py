"""Oracles: all 256 values of E4M3 decoded from their bits in plain Python, and loops over elements in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_lightning.ops.fp8 import dequantize_blocks, quantize_blocks, scale_shape


def e4m3(bits: int) -> float:
    """Decode one byte: sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity, NaN where all are set."""
    sign, exponent, mantissa = -1.0 if bits >> 7 else 1.0, bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa / 8 * 2.0**-6)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = np.array([e4m3(bits) for bits in range(256)])


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 7), (1, 1), (9, 2), (8, 6)])
def test_dequantized_blocks_equal_a_loop_over_elements(rows: int, columns: int) -> None:
    draw = np.random.default_rng(rows * 10 + columns)
    block = (4, 3)
    bits = draw.integers(0, 127, (rows, columns), dtype=np.uint8) | draw.integers(0, 2, (rows, columns)) * 128
    scales = draw.uniform(0.1, 2.0, scale_shape(rows, columns, block)).astype(np.float32)
    expected = np.empty((rows, columns), dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            expected[row, column] = np.float32(VALUES[bits[row, column]]) * scales[row // 4, column // 3]
    weight = torch.from_numpy(bits.astype(np.uint8)).view(torch.float8_e4m3fn)
    found = dequantize_blocks(weight, torch.from_numpy(scales), block)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(expected))


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 7), (9, 2)])
def test_quantized_weights_are_the_nearest_values_under_the_scale_of_their_block(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 3
    quantized, scale_inv = quantize_blocks(weight, (4, 3))
    assert quantized.dtype == torch.float8_e4m3fn
    finite = VALUES[np.isfinite(VALUES)]
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            here = weight[4 * i : 4 * i + 4, 3 * j : 3 * j + 3]
            assert scale_inv[i, j] == here.abs().max() / 448
            for value, chosen in zip(
                here.flatten().tolist(),
                quantized[4 * i : 4 * i + 4, 3 * j : 3 * j + 3].float().flatten().tolist(),
                strict=True,
            ):
                scaled = value / scale_inv[i, j].item()
                assert abs(chosen - scaled) <= np.abs(finite - scaled).min() * (1 + 1e-5)


def test_what_was_quantized_comes_back_within_half_a_step() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    quantized, scale_inv = quantize_blocks(weight)
    assert scale_inv.shape == (3, 2)
    error = (dequantize_blocks(quantized, scale_inv) - weight).abs()
    step = scale_inv.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200] * 2.0**-9
    assert (error <= weight.abs() / 16 * 1.0001 + step / 2).all()
    assert error.max() > 0


def test_a_block_of_zeros_stays_zero() -> None:
    quantized, scale_inv = quantize_blocks(torch.zeros(3, 3), (2, 2))
    assert torch.equal(dequantize_blocks(quantized, scale_inv, (2, 2)), torch.zeros(3, 3))


def test_scales_of_another_block_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"scales have the shape \[2, 2\], expected \[3, 2\]: one for each 2 x 2 block"
    ):
        dequantize_blocks(torch.zeros(5, 4), torch.ones(2, 2), (2, 2))
