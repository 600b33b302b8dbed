"""Oracles: causal attention over each row with its prefix in front of it, and fp64 autograd of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_lightning.ops.attention.reference import causal_attention
from ds_lightning.ops.prefix_attention import prefix_attention, reference
from tests.ops.error_ratio import assert_as_close_as_plain

PREFIX = torch.tensor([0, 2, 2, 1, 2])
LENGTHS = torch.tensor([3, 1, 4])


def draw(seq: int, qk: int = 5, v_dim: int = 3, heads: int = 2) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seq)
    shapes = [(5, seq, qk), (5, seq, qk), (5, seq, v_dim), (3, 4, qk), (3, 4, v_dim)]
    return [torch.randn(n, heads, s, d, generator=rng, dtype=torch.float64) for n, s, d in shapes]


def row_by_row(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, scale: float
) -> Tensor:
    """Attend with each row alone; the queries of a prefix are of no interest."""
    rows = []
    for row, prefix in enumerate(PREFIX.tolist()):
        length = int(LENGTHS[prefix])
        keys = torch.cat((prefix_key[prefix, :, :length], key[row]), 1)
        values = torch.cat((prefix_value[prefix, :, :length], value[row]), 1)
        queries = torch.cat((torch.zeros_like(keys[:, :length]), query[row]), 1)
        rows.append(causal_attention(queries[None], keys[None], values[None], scale=scale)[0, :, length:])
    return torch.stack(rows)


def value_and_gradients(function: object, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert callable(function)
    out = function(*leaves, scale=0.7)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def fast(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> Tensor:
    return prefix_attention(q, k, v, prefix_k, prefix_v, PREFIX, LENGTHS, scale=scale)


def plain(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, scale: float) -> Tensor:
    return reference.prefix_attention(q, k, v, prefix_k, prefix_v, PREFIX, LENGTHS, scale=scale)


@pytest.mark.parametrize("seq", [1, 2, 7, 130], ids=lambda seq: f"{seq} tokens")
@pytest.mark.parametrize("function", [fast, plain], ids=["fast", "reference"])
def test_a_row_sees_its_prefix_and_what_it_has_before(function: object, seq: int) -> None:
    inputs = draw(seq)
    for actual, expected in zip(
        value_and_gradients(function, inputs), value_and_gradients(row_by_row, inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_padding_of_a_prefix_changes_nothing_and_gets_no_gradient() -> None:
    inputs = draw(4)
    changed = [tensor.clone() for tensor in inputs]
    changed[3][1, :, 1:], changed[4][1, :, 1:] = 7.0, -9.0
    found, expected = value_and_gradients(fast, changed), value_and_gradients(fast, inputs)
    assert torch.equal(found[0], expected[0])
    assert not found[4][1, :, 1:].any()
    assert not found[5][1, :, 1:].any()


def test_two_backward_passes_of_one_graph_agree_and_leave_the_inputs_alone() -> None:
    inputs = draw(9)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    query, key, value, prefix_key, prefix_value = leaves
    out = fast(query, key, value, prefix_key, prefix_value, 0.7)
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(leaves, inputs, strict=True))


def test_bf16_is_as_close_to_the_truth_as_the_plain_definition() -> None:
    inputs = draw(48, qk=24, v_dim=16)
    low = [tensor.bfloat16() for tensor in inputs]
    names = ("out", "query", "key", "value", "prefix_key", "prefix_value")
    found = [value_and_gradients(*case) for case in ((fast, low), (plain, low), (plain, inputs))]
    for name, ours, simple, truth in zip(names, *found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_as_close_as_plain(name, ours, simple, truth)
