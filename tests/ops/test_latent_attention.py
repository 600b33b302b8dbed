"""Oracles: attention by a loop over rows, heads and positions; the reference in fp64."""

import math

import pytest
import torch
from torch import Tensor

from ds_lightning.ops.latent_attention import latent_attention, reference
from tests.ops.error_ratio import assert_as_close_as_plain

RANK, WIDTH = 5, 8


def draw(rows: int, heads: int, seq: int) -> tuple[Tensor, Tensor, Tensor]:
    query, cache = torch.randn(rows, heads, WIDTH).double(), torch.randn(rows, seq, WIDTH).double()
    lengths = torch.randint(1, seq + 1, (rows, 1))
    return query, cache, torch.zeros(rows, seq).double().masked_fill(torch.arange(seq) >= lengths, -torch.inf)


def test_the_reference_is_the_loop() -> None:
    query, cache, bias = draw(3, 2, 6)
    expected = torch.zeros(3, 2, RANK).double()
    for row in range(3):
        for head in range(2):
            seen = [s for s in range(6) if bias[row, s] == 0]
            weight = [math.exp(0.3 * float(query[row, head] @ cache[row, s])) for s in seen]
            for s, w in zip(seen, weight, strict=True):
                expected[row, head] += w / sum(weight) * cache[row, s, :RANK]
    actual = reference.latent_attention(query, cache, bias, kv_rank=RANK, scale=0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "heads", "seq"), [(1, 1, 1), (4, 3, 33), (7, 1, 64), (0, 2, 5)])
def test_the_fast_form_is_the_reference(rows: int, heads: int, seq: int) -> None:
    inputs = draw(rows, heads, seq)
    actual = latent_attention(*inputs, kv_rank=RANK, scale=0.7)
    expected = reference.latent_attention(*inputs, kv_rank=RANK, scale=0.7)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_bf16_is_as_close_to_the_truth_as_the_plain_definition() -> None:
    inputs = draw(16, 4, 50)
    truth = reference.latent_attention(*inputs, kv_rank=RANK, scale=0.7)
    query, cache, bias = (tensor.bfloat16() for tensor in inputs)
    plain = reference.latent_attention(query, cache, bias, kv_rank=RANK, scale=0.7)
    assert_as_close_as_plain("out", latent_attention(query, cache, bias, kv_rank=RANK, scale=0.7), plain, truth)
