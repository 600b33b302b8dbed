"""Oracles: fp64 autograd of the reference; torch's log_softmax; a dispatch mode that sees every tensor made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ds_lightning.ops.token_logprobs as op
from ds_lightning.ops.token_logprobs import reference, token_logprobs
from tests.ops.error_ratio import assert_as_close_as_plain

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(tokens: int, hidden: int = 5, vocab: int = 11, *, seed: int = 0) -> Inputs:
    """Hidden states, head, targets of which about a quarter are ignored, and the gradients that arrive."""
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (tokens,), generator=rng)
    targets[torch.rand(tokens, generator=rng) < 0.25] = -100
    return (
        torch.randn(tokens, hidden, generator=rng, dtype=torch.float64),
        torch.randn(vocab, hidden, generator=rng, dtype=torch.float64),
        targets,
        torch.randn(tokens, generator=rng, dtype=torch.float64),
    )


def values_and_gradients(function: object, inputs: Inputs, temperature: float = 1.0) -> list[Tensor]:
    hidden, weight, targets, upstream = inputs
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    assert callable(function)
    logprobs, entropy = function(*leaves, targets, temperature)
    assert not entropy.requires_grad
    return [logprobs.detach(), entropy, *torch.autograd.grad((logprobs * upstream).sum(), leaves)]


def assert_equals_reference(inputs: Inputs, temperature: float = 1.0) -> None:
    """1e-12 is a few thousand roundings of fp64."""
    actual = values_and_gradients(token_logprobs, inputs, temperature)
    expected = values_and_gradients(reference.token_logprobs, inputs, temperature)
    for name, a, e in zip(("logprobs", "entropy", "hidden", "weight"), actual, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=f"{name} of {a} instead of {e}")


def test_the_reference_is_the_log_softmax_of_the_target() -> None:
    hidden, weight, targets, _ = draw(tokens=9)
    logprobs, entropy = reference.token_logprobs(hidden, weight, targets, 0.7)
    for h, target, logprob, uncertainty in zip(
        hidden.tolist(), targets.tolist(), logprobs.tolist(), entropy.tolist(), strict=True
    ):
        scores = [math.exp(sum(a * b for a, b in zip(h, row, strict=True)) / 0.7) for row in weight.tolist()]
        p = [score / sum(scores) for score in scores]
        assert logprob == pytest.approx(0.0 if target == -100 else math.log(p[target]))
        assert uncertainty == pytest.approx(-sum(q * math.log(q) for q in p))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30), st.floats(0.2, 3), st.integers(0, 1000))
def test_values_and_both_gradients_are_those_of_the_reference(
    tokens: int, hidden: int, vocab: int, temperature: float, seed: int
) -> None:
    assert_equals_reference(draw(tokens, hidden, vocab, seed=seed), temperature)


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 24, 1000])
def test_where_the_slices_end_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_TOKENS", chunk)
    assert_equals_reference(draw(tokens=23), temperature=0.6)


def test_the_graph_can_be_walked_twice() -> None:
    hidden, weight, targets, upstream = draw(tokens=9)
    leaf = hidden.requires_grad_()
    logprobs, _ = token_logprobs(leaf, weight, targets)
    total = (logprobs * upstream).sum()
    first = torch.autograd.grad(total, leaf, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(total, leaf))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_shifts_none(frozen: int) -> None:
    inputs = draw(tokens=9)
    expected = values_and_gradients(token_logprobs, inputs)[2:]
    leaves = [tensor.clone().requires_grad_(place != frozen) for place, tensor in enumerate(inputs[:2])]
    (token_logprobs(leaves[0], leaves[1], inputs[2])[0] * inputs[3]).sum().backward()
    assert leaves[frozen].grad is None
    other = leaves[1 - frozen].grad
    assert other is not None
    assert torch.equal(other, expected[1 - frozen])


def test_scores_too_large_for_an_exponential_give_finite_values() -> None:
    hidden, weight, targets, upstream = draw(tokens=8)
    large = (hidden * 300, weight, targets, upstream)
    assert (large[0] @ weight.T).amax() > 710  # exp overflows fp64 there
    assert all(tensor.isfinite().all() for tensor in values_and_gradients(token_logprobs, large))


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


def test_the_logits_of_a_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, hidden, vocab, chunk = 96, 8, 160, 16
    monkeypatch.setattr(op, "CHUNK_TOKENS", chunk)
    with LargestTensor() as seen:
        values_and_gradients(token_logprobs, draw(tokens, hidden, vocab))
    assert seen.numel == chunk * vocab


def test_autocast_is_as_close_to_the_truth_as_the_plain_definition_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_TOKENS", 32)
    hidden, weight, targets, upstream = draw(tokens=128, hidden=48, vocab=90)
    weight = weight / 5
    truth = values_and_gradients(reference.token_logprobs, (hidden, weight, targets, upstream))
    low = (hidden.bfloat16(), weight.bfloat16(), targets, upstream.float())
    plain = values_and_gradients(reference.token_logprobs, low)
    with torch.autocast("cpu", torch.bfloat16):
        fast = values_and_gradients(token_logprobs, (hidden.float(), weight.float(), targets, upstream.float()))
    assert [tensor.dtype for tensor in fast] == [torch.float32] * 4
    for name, *three in zip(("logprobs", "entropy", "hidden", "weight"), fast, plain, truth, strict=True):
        assert_as_close_as_plain(name, *three)
