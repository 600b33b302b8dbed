"""Oracles: YaRN's published formula as a Python loop, DeepSeek-V3's own numbers, and complex multiplication."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_lightning.config import RopeScaling
from ds_lightning.ops.rope import apply_rope, reference, rope_frequencies, rope_tables, yarn_temperature

V3 = RopeScaling(factor=40.0, original_max_position_embeddings=4096)


def published_frequencies(dim: int, theta: float, s: RopeScaling) -> list[float]:
    """Frequency of each pair, by the number of turns that it makes over the original context."""

    def correction(rotations: float) -> float:
        return dim * math.log(s.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(correction(s.beta_fast)), 0), min(math.ceil(correction(s.beta_slow)), dim - 1)
    assume(low < high)  # YaRN's ramp runs upwards; other contexts are too short for any pair to turn once
    out = []
    for pair in range(dim // 2):
        plain = 1.0 / theta ** (2 * pair / dim)
        kept = 1.0 - min(max((pair - low) / (high - low), 0.0), 1.0)
        out.append(plain / s.factor * (1 - kept) + plain * kept)
    return out


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_plain_frequencies_are_a_geometric_sequence(dim: int) -> None:
    expected = [10000.0 ** (-2 * pair / dim) for pair in range(dim // 2)]
    actual = rope_frequencies(dim, 10000.0, None)
    assert actual.dtype == torch.float64
    assert actual.tolist() == pytest.approx(expected, rel=1e-14)


@settings(max_examples=100, deadline=None)
@given(
    half=st.integers(1, 64),
    theta=st.floats(100, 1e6),
    factor=st.floats(1, 100),
    context=st.integers(16, 100_000),
    beta_slow=st.floats(0.1, 4),
    beta_gap=st.floats(0.1, 60),
)
def test_yarn_frequencies_are_those_of_the_published_formula(
    half: int, theta: float, factor: float, context: int, beta_slow: float, beta_gap: float
) -> None:
    scaling = RopeScaling(
        factor=factor, original_max_position_embeddings=context, beta_slow=beta_slow, beta_fast=beta_slow + beta_gap
    )
    expected = published_frequencies(2 * half, theta, scaling)
    assert rope_frequencies(2 * half, theta, scaling).tolist() == pytest.approx(expected, rel=1e-12)


def test_deepseek_v3_keeps_its_fast_pairs_and_slows_its_slow_ones_by_forty() -> None:
    ratio = rope_frequencies(64, 10000.0, V3) / rope_frequencies(64, 10000.0, None)
    # 64 ln(4096 / 64 pi) / (2 ln 1e4) = 10.5 and 64 ln(4096 / 2 pi) / (2 ln 1e4) = 22.5
    assert ratio[:11].tolist() == [1.0] * 11
    assert ratio[23:].tolist() == pytest.approx([1 / 40] * 9, rel=1e-14)
    assert (ratio[10:23].diff() < 0).all()
    assert float(ratio[16]) == pytest.approx(1 - (6 / 13) * (1 - 1 / 40), rel=1e-12)


def test_bounds_that_meet_divide_by_no_zero() -> None:
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=8, beta_fast=32.0, beta_slow=1.5)
    frequencies = rope_frequencies(8, 10000.0, scaling)  # both bounds are pair 0
    plain = rope_frequencies(8, 10000.0, None)
    assert frequencies.tolist() == pytest.approx([float(plain[0]), *(float(f) / 4 for f in plain[1:])], rel=1e-14)


def test_a_factor_of_one_extends_nothing() -> None:
    scaling = RopeScaling(factor=1.0, original_max_position_embeddings=4096)
    torch.testing.assert_close(
        rope_frequencies(64, 10000.0, scaling), rope_frequencies(64, 10000.0, None), rtol=1e-15, atol=0
    )
    assert yarn_temperature(1.0, 1.0) == 1.0


def test_the_temperature_of_v3_is_0_1_ln_40_plus_1() -> None:
    assert yarn_temperature(40.0, 1.0) == pytest.approx(1.3688879454113936, rel=1e-15)
    assert yarn_temperature(40.0, 0.5) == pytest.approx(1 + 0.05 * math.log(40), rel=1e-15)
    assert yarn_temperature(40.0, 0.0) == 1.0


@pytest.mark.parametrize("scaling", [None, V3], ids=["plain", "yarn"])
def test_tables_are_the_fp64_angles_rounded_once(scaling: RopeScaling | None) -> None:
    cos, sin = rope_tables(8, 5000, 10000.0, scaling)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (5000, 4)
    frequencies = rope_frequencies(8, 10000.0, scaling).tolist()
    for position in (0, 1, 2, 777, 4999):
        for pair, frequency in enumerate(frequencies):
            rotation = cmath.exp(1j * position * frequency)
            expected = torch.tensor([rotation.real, rotation.imag], dtype=torch.float64)
            actual = torch.stack((cos[position, pair], sin[position, pair]))
            # half a unit in the last place of fp32 at 1: angles formed in fp32 would be off by 1e-4 at position 4999
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2**-24)


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 0.0), (0.707, 1.0), (1.0, 1.0)])
def test_tables_carry_the_quotient_of_both_temperatures(mscale: float, all_dim: float) -> None:
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=64, mscale=mscale, mscale_all_dim=all_dim)
    cos, sin = rope_tables(4, 10, 10000.0, scaling)
    amplitude = (0.1 * mscale * math.log(8) + 1) / (0.1 * all_dim * math.log(8) + 1)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, amplitude**2), rtol=1e-6, atol=0)
    assert cos[0].tolist() == pytest.approx([amplitude] * 2, rel=1e-6)


def test_neighbouring_channels_turn_as_one_complex_number() -> None:
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(6, 5, 10000.0, None)
    out = apply_rope(x, cos, sin)
    assert out.shape == x.shape
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.complex(cos.double(), sin.double())[:, None, :]
    torch.testing.assert_close(out, torch.view_as_real(turned).flatten(-2), rtol=1e-14, atol=1e-14)
    assert not torch.allclose(out[:, 1:], x[:, 1:])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 2),
        (2, 7, 3, 6),
    ],
)
def test_rotation_and_its_gradient_are_those_of_the_reference(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(shape[-1], shape[1], 10000.0, None)
    results = []
    for function in (apply_rope, reference.apply_rope):
        leaf = x.clone().requires_grad_()
        # a slice of a wider tensor, as attention passes it, with an odd offset
        out = function(torch.cat((leaf[..., :1], leaf), -1)[..., 1:], cos, sin)
        results.append((out.detach(), *torch.autograd.grad(out.pow(3).sum(), leaf)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_products_of_queries_and_keys_depend_on_distance_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=rng).expand(1, 30, 1, 8) for _ in range(2))
    cos, sin = rope_tables(8, 30, 100.0, None)
    scores = (apply_rope(query, cos, sin) * apply_rope(key, cos, sin).roll(3, dims=1)).sum(-1)[0, 3:, 0]
    # tables are rounded to fp32
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=0, atol=1e-6)
    nearer = (apply_rope(query, cos, sin) * apply_rope(key, cos, sin).roll(2, dims=1)).sum(-1)[0, 3, 0]
    assert abs(nearer - scores[0]) > 1e-3


def test_low_precision_is_rotated_in_fp32_and_rounded_once() -> None:
    x = torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope_tables(8, 64, 10000.0, None)
    out = apply_rope(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), cos, sin).bfloat16())
