"""Oracles: attention as NumPy loops over queries and keys, and fp64 autograd of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_lightning.ops.attention import causal_attention, reference
from tests.ops.error_ratio import assert_as_close_as_plain

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])


def draw(batch: int, heads: int, seq: int, qk: int, v_dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, heads, seq, qk, generator=rng, dtype=torch.float64) for _ in range(2))
    return query, key, torch.randn(batch, heads, seq, v_dim, generator=rng, dtype=torch.float64)


def by_loops(query: Tensor, key: Tensor, value: Tensor, scale: float, segments: Tensor | None) -> np.ndarray:
    q, k, v = query.numpy(), key.numpy(), value.numpy()
    out = np.zeros(v.shape)
    for b, h, t in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = np.array([scale * q[b, h, t] @ k[b, h, s] for s in seen])
        share = np.exp(scores - scores.max())
        out[b, h, t] = sum(p * v[b, h, s] for p, s in zip(share / share.sum(), seen, strict=True))
    return out


def value_and_gradients(function: object, inputs: tuple[Tensor, ...], segments: Tensor | None) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert callable(function)
    out = function(*leaves, scale=0.7, segment_ids=segments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole row", "documents"])
@pytest.mark.parametrize(("qk", "v_dim"), [(6, 4), (4, 6), (5, 5), (3, 1)])
@pytest.mark.parametrize("function", [causal_attention, reference.causal_attention], ids=["fast", "reference"])
def test_attention_is_a_softmax_over_earlier_positions(
    function: object, qk: int, v_dim: int, segments: Tensor | None
) -> None:
    query, key, value = draw(2, 3, 7, qk, v_dim)
    assert callable(function)
    out = function(query, key, value, scale=0.7, segment_ids=segments)
    np.testing.assert_allclose(out.numpy(), by_loops(query, key, value, 0.7, segments), rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 1000),
)
def test_output_and_all_gradients_are_those_of_the_reference(
    batch: int, heads: int, seq: int, qk: int, v_dim: int, documents: bool, seed: int
) -> None:
    inputs = draw(batch, heads, seq, qk, v_dim, seed)
    segments = None
    if documents:
        ends = torch.rand(batch, seq, generator=torch.Generator().manual_seed(seed)) < 0.3
        segments = ends.long().cumsum(1)
    actual = value_and_gradients(causal_attention, inputs, segments)
    expected = value_and_gradients(reference.causal_attention, inputs, segments)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
def test_rows_longer_than_a_block_of_queries_equal_the_reference(*, documents: bool) -> None:
    inputs = draw(1, 2, 300, 5, 3)
    segments = (torch.arange(300) // 70)[None] if documents else None
    actual = value_and_gradients(causal_attention, inputs, segments)
    expected = value_and_gradients(reference.causal_attention, inputs, segments)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_input_gets_no_gradient_and_shifts_none(frozen: int) -> None:
    inputs = draw(1, 2, 9, 5, 3)
    everything = [tensor.clone().requires_grad_() for tensor in inputs]
    leaves = [tensor.clone().requires_grad_(place != frozen) for place, tensor in enumerate(inputs)]
    for query, key, value in (everything, leaves):
        causal_attention(query, key, value, scale=0.7).square().sum().backward()
    for place, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        assert (leaf.grad is None) == (place == frozen)
        assert full.grad is not None
        assert leaf.grad is None or torch.equal(leaf.grad, full.grad)


def test_two_backward_passes_of_one_graph_agree_and_leave_the_inputs_alone() -> None:
    inputs = draw(1, 2, 9, 5, 3)
    query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
    out = causal_attention(query, key, value, scale=0.7)
    first, second = (torch.autograd.grad(out.sum(), (query, key, value), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip((query, key, value), inputs, strict=True))


def test_the_first_position_of_a_document_sees_itself_alone() -> None:
    query, key, value = draw(2, 1, 7, 4, 4)
    out = causal_attention(query, key, value, scale=0.7, segment_ids=SEGMENTS)
    for row, column in ((0, 0), (0, 3), (0, 5), (1, 0), (1, 1)):
        torch.testing.assert_close(out[row, :, column], value[row, :, column], rtol=1e-12, atol=1e-12)


def test_bf16_is_as_close_to_the_truth_as_the_plain_definition() -> None:
    inputs = draw(2, 2, 48, 24, 16)
    low = tuple(tensor.bfloat16() for tensor in inputs)
    for segments in (None, (torch.arange(48) // 13).expand(2, 48)):
        truth = value_and_gradients(reference.causal_attention, inputs, segments)
        plain = value_and_gradients(reference.causal_attention, low, segments)
        fast = value_and_gradients(causal_attention, low, segments)
        for name, f, p, t in zip(("out", "query", "key", "value"), fast, plain, truth, strict=True):
            assert f.dtype == torch.bfloat16
            assert_as_close_as_plain(name, f, p, t)
