"""Oracles: fp64 autograd of the reference; torch's cross_entropy; a dispatch mode that sees every tensor made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ds_lightning.ops.cross_entropy as op
from ds_lightning.ops.cross_entropy import linear_cross_entropy, reference
from tests.ops.error_ratio import assert_as_close_as_plain

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(tokens: int, hidden: int = 5, vocab: int = 11, *, seed: int = 0) -> Inputs:
    """Hidden states, head, labels of which about a quarter are ignored, and token weights."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (tokens,), generator=rng)
    labels[torch.rand(tokens, generator=rng) < 0.25] = -100
    return (
        torch.randn(tokens, hidden, generator=rng, dtype=torch.float64),
        torch.randn(vocab, hidden, generator=rng, dtype=torch.float64),
        labels,
        torch.rand(tokens, generator=rng, dtype=torch.float64) + 0.5,
    )


def value_and_gradients(function: object, inputs: Inputs, upstream: float = 1.0) -> list[Tensor]:
    hidden, weight, labels, token_weights = inputs
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    assert callable(function)
    loss = function(*leaves, labels, token_weights)
    assert loss.shape == ()
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def assert_equals_reference(inputs: Inputs, upstream: float = 1.0) -> None:
    """1e-12 is a few thousand roundings of fp64."""
    actual = value_and_gradients(linear_cross_entropy, inputs, upstream)
    expected = value_and_gradients(reference.linear_cross_entropy, inputs, upstream)
    for name, a, e in zip(("loss", "hidden", "weight"), actual, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=f"{name} of {a} instead of {e}")


def test_the_reference_is_the_weighted_sum_of_log_losses() -> None:
    hidden, weight, labels, token_weights = draw(tokens=9)
    expected = 0.0
    for h, label, token_weight in zip(hidden.tolist(), labels.tolist(), token_weights.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(h, row, strict=True)) for row in weight.tolist()]
        if label != -100:
            expected += token_weight * (math.log(sum(math.exp(score) for score in scores)) - scores[label])
    assert float(reference.linear_cross_entropy(hidden, weight, labels, token_weights)) == pytest.approx(expected)
    assert expected > 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30), st.floats(-3, 3).filter(bool), st.integers(0, 1000))
def test_loss_and_both_gradients_are_those_of_the_reference(
    tokens: int, hidden: int, vocab: int, upstream: float, seed: int
) -> None:
    assert_equals_reference(draw(tokens, hidden, vocab, seed=seed), upstream)


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 24, 1000])
def test_where_the_slices_end_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_TOKENS", chunk)
    assert_equals_reference(draw(tokens=23), upstream=0.3)


def test_more_tokens_than_one_slice_of_the_real_size() -> None:
    assert_equals_reference(draw(tokens=op.CHUNK_TOKENS + 3, hidden=3, vocab=7))


def test_ignored_labels_count_nothing_and_pass_no_gradient() -> None:
    hidden, weight, labels, token_weights = draw(tokens=30)
    ignored = labels == -100
    assert 0 < ignored.sum() < 30
    loss, grad_hidden, grad_weight = value_and_gradients(linear_cross_entropy, (hidden, weight, labels, token_weights))
    assert (grad_hidden[ignored] == 0).all()
    assert (grad_hidden[~ignored].abs().amax(-1) > 0).all()
    kept = (hidden[~ignored], weight, labels[~ignored], token_weights[~ignored])
    kept_loss, _, kept_grad_weight = value_and_gradients(linear_cross_entropy, kept)
    torch.testing.assert_close(loss, kept_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_weight, kept_grad_weight, rtol=1e-12, atol=1e-12)


def test_a_batch_of_ignored_labels_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, weight, labels, token_weights = draw(tokens=6)
    inputs = (hidden, weight, torch.full_like(labels, -100), token_weights)
    for tensor in value_and_gradients(linear_cross_entropy, inputs):
        assert (tensor == 0).all()


def test_it_is_a_sum_weighted_by_token() -> None:
    hidden, weight, labels, _ = draw(tokens=12)
    ones = torch.ones(12, dtype=torch.float64)
    total = linear_cross_entropy(hidden, weight, labels, ones)
    torch.testing.assert_close(total, cross_entropy(hidden @ weight.T, labels, reduction="sum"), rtol=1e-12, atol=0)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 3 * ones), 3 * total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_shifts_none(frozen: int) -> None:
    hidden, weight, labels, token_weights = draw(tokens=9)
    expected = value_and_gradients(linear_cross_entropy, (hidden, weight, labels, token_weights))[1:]
    leaves = [tensor.clone().requires_grad_(place != frozen) for place, tensor in enumerate((hidden, weight))]
    weighting = token_weights.clone().requires_grad_()
    linear_cross_entropy(leaves[0], leaves[1], labels, weighting).backward()
    assert leaves[frozen].grad is None
    assert weighting.grad is None
    other = leaves[1 - frozen].grad
    assert other is not None
    assert torch.equal(other, expected[1 - frozen])


def test_scores_too_large_for_an_exponential_give_a_finite_loss() -> None:
    hidden, weight, labels, token_weights = draw(tokens=8)
    large = (hidden * 1000, weight, labels, token_weights)
    assert (large[0] @ weight.T).amax() > 710  # exp overflows fp64 there
    loss, *gradients = value_and_gradients(linear_cross_entropy, large)
    torch.testing.assert_close(loss, reference.linear_cross_entropy(*large), rtol=1e-12, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operation gave out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("grad", [True, False], ids=["training", "validation"])
def test_the_logits_of_a_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch, *, grad: bool) -> None:
    tokens, hidden, vocab, chunk = 96, 8, 160, 16
    monkeypatch.setattr(op, "CHUNK_TOKENS", chunk)
    inputs = draw(tokens, hidden, vocab)
    leaves = [tensor.clone().requires_grad_(grad) for tensor in inputs[:2]]
    with LargestTensor() as seen, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy(leaves[0], leaves[1], *inputs[2:])
        if grad:
            loss.backward()
    assert seen.numel == chunk * vocab
    with LargestTensor() as seen:
        reference.linear_cross_entropy(*inputs)
    assert seen.numel == tokens * vocab  # the mode does see the logits where they exist


def test_autocast_is_as_close_to_the_truth_as_the_plain_definition_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_TOKENS", 32)
    hidden, weight, labels, token_weights = draw(tokens=128, hidden=48, vocab=90)
    weight = weight / 5
    truth = value_and_gradients(reference.linear_cross_entropy, (hidden, weight, labels, token_weights), 1 / 3)
    low = (hidden.bfloat16(), weight.bfloat16(), labels, token_weights.float())
    plain = value_and_gradients(reference.linear_cross_entropy, low, 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        wide = (hidden.float(), weight.float(), labels, token_weights.float())
        fast = value_and_gradients(linear_cross_entropy, wide, 1 / 3)
    assert [tensor.dtype for tensor in fast] == [torch.float32] * 3
    assert_as_close_as_plain("hidden", fast[1], plain[1], truth[1])
    assert_as_close_as_plain("weight", fast[2], plain[2], truth[2])
    # the loss adds up 128 rounded terms, whose errors cancel in one number: 2e-3 is half a unit of bf16's last place
    assert abs(fast[0].double() - truth[0]) <= 2e-3 * truth[0]


def test_scaling_the_loss_scales_bf16_gradients_without_a_bias() -> None:
    hidden, weight, labels, token_weights = draw(tokens=128, hidden=48, vocab=90)
    wide = (hidden.float(), weight.float(), labels, token_weights.float())
    upstream = 1 / 3  # 0.2% away from the nearest bf16 number
    with torch.autocast("cpu", torch.bfloat16):
        unscaled = value_and_gradients(linear_cross_entropy, wide)
        scaled = value_and_gradients(linear_cross_entropy, wide, upstream)
    for one, part in zip(unscaled[1:], scaled[1:], strict=True):
        one, part = one.double(), part.double()
        ratio = (one * part).sum() / (one * one).sum()  # regression: rounding errors of elements average out
        assert abs(ratio / upstream - 1) < 2e-4
