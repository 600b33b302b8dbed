"""Oracle: both routers as Python loops over tokens, groups and experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_lightning.ops.topk_gate import topk_gate

V3: dict[str, Any] = {"topk": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
V2: dict[str, Any] = {
    "topk": 3,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
}


def draw(tokens: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and a bias strong enough to change many choices."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=rng, dtype=torch.float64)
    return logits, 0.5 * torch.randn(experts, generator=rng, dtype=torch.float64)


def route_by_loops(
    logits: list[float],
    bias: list[float] | None,
    *,
    topk: int,
    n_group: int = 1,
    topk_group: int = 1,
    scoring_func: str = "sigmoid",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[list[int], list[float], list[float]]:
    """Return experts (best first), gate values and scores of one token."""
    if scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    choice = scores if bias is None else [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // n_group
    groups = [range(group * size, (group + 1) * size) for group in range(n_group)]

    def group_score(group: range) -> float:
        best = sorted((choice[expert] for expert in group), reverse=True)
        return best[0] if bias is None else sum(best[:2])

    if n_group > 1:
        groups = sorted(groups, key=group_score, reverse=True)[:topk_group]
    candidates = [expert for group in groups for expert in group]
    experts = sorted(candidates, key=lambda expert: choice[expert], reverse=True)[:topk]
    gates = [scores[expert] for expert in experts]
    if norm_topk_prob:
        gates = [gate / sum(gates) for gate in gates]
    return experts, [gate * routed_scaling_factor for gate in gates], scores


def assert_equals_loops(logits: Tensor, bias: Tensor | None, **options: Any) -> None:
    gate = topk_gate(logits, bias, **options)
    for token, row in enumerate(logits.tolist()):
        experts, values, scores = route_by_loops(row, None if bias is None else bias.tolist(), **options)
        assert gate.indices[token].tolist() == experts
        assert gate.weights[token].tolist() == pytest.approx(values, rel=1e-12)
        assert gate.scores[token].tolist() == pytest.approx(scores, rel=1e-12)


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "as they are"])
def test_v3_routing_is_the_loop(norm: bool) -> None:
    logits, bias = draw(50, 16)
    assert_equals_loops(logits, bias, **V3, norm_topk_prob=norm)
    assert_equals_loops(logits, bias, topk=3, norm_topk_prob=norm)


def test_v2_routing_is_the_loop() -> None:
    logits, _ = draw(50, 16)
    assert_equals_loops(logits, None, **V2)
    assert_equals_loops(logits, None, topk=3, scoring_func="softmax", norm_topk_prob=True)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_any_groups_are_the_loop(data: st.DataObject, seed: int) -> None:
    n_group = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(2, 5))
    topk_group = data.draw(st.integers(1, n_group))
    logits, bias = draw(5, n_group * size, seed)
    assert_equals_loops(
        logits,
        data.draw(st.sampled_from([bias, None])),
        topk=data.draw(st.integers(1, topk_group * size)),
        n_group=n_group,
        topk_group=topk_group,
        scoring_func=data.draw(st.sampled_from(["sigmoid", "softmax"])),
        norm_topk_prob=data.draw(st.booleans()),
        routed_scaling_factor=data.draw(st.floats(0.1, 20)),
    )


def test_bias_changes_selection_but_not_gate_values() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    gate = topk_gate(logits, bias, topk=2)
    assert gate.indices.tolist() == [[3, 0]]
    scores = logits.sigmoid()[0, [3, 0]]
    torch.testing.assert_close(gate.weights[0], scores / scores.sum(), rtol=1e-12, atol=0)
    assert torch.equal(gate.scores, logits.sigmoid())


def test_one_bias_for_all_experts_changes_nothing() -> None:
    logits, bias = draw(40, 16)
    plain, shifted = topk_gate(logits, bias, **V3), topk_gate(logits, bias + 3, **V3)
    assert torch.equal(plain.indices, shifted.indices)
    assert torch.equal(plain.weights, shifted.weights)


def test_a_negative_bias_never_lets_an_expert_of_an_excluded_group_in() -> None:
    logits, bias = draw(40, 16)
    gate = topk_gate(logits, bias - 10, **V3)
    assert all(len({expert // 4 for expert in row}) <= 2 for row in gate.indices.tolist())
    assert torch.equal(gate.indices, topk_gate(logits, bias, **V3).indices)


def test_the_bias_gets_no_gradient() -> None:
    logits, bias = draw(6, 16)
    bias.requires_grad_()
    gate = topk_gate(logits.requires_grad_(), bias, **V3)
    gate.weights[:, 0].sum().backward()
    assert bias.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


def test_gate_values_and_scores_carry_the_gradient_of_the_loops_formula() -> None:
    logits, bias = draw(6, 16)
    cotangent = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chosen = topk_gate(logits, bias, **V3).indices

    def gradient(weights: Tensor, scores: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad((weights * cotangent).sum() + scores.square().sum(), leaf)[0]

    leaf = logits.clone().requires_grad_()
    gate = topk_gate(leaf, bias, **V3)
    actual = gradient(gate.weights, gate.scores, leaf)
    leaf = logits.clone().requires_grad_()
    scores = 1 / (1 + (-leaf).exp())
    values = torch.stack([scores[t, chosen[t]] / scores[t, chosen[t]].sum() * 2.5 for t in range(6)])
    torch.testing.assert_close(actual, gradient(values, scores, leaf), rtol=1e-12, atol=1e-12)


def test_normalised_gate_values_sum_to_the_scaling_factor() -> None:
    logits, bias = draw(20, 16)
    sums = topk_gate(logits, bias, **V3).weights.sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 2.5), rtol=1e-12, atol=0)


def test_every_token_keeps_all_its_different_experts() -> None:
    logits, bias = draw(200, 16)
    gate = topk_gate(logits * 0.01, bias, **V3)
    assert gate.indices.shape == gate.weights.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in gate.indices.tolist())
    assert (gate.weights > 0).all()


def test_as_many_experts_as_there_are_are_all_chosen() -> None:
    logits, bias = draw(1, 6)
    gate = topk_gate(logits, bias, topk=6)
    assert sorted(gate.indices[0].tolist()) == list(range(6))


def test_low_precision_logits_are_scored_in_fp32() -> None:
    logits, bias = draw(20, 16)
    gate = topk_gate(logits.bfloat16(), bias.float(), **V3)
    assert gate.weights.dtype == gate.scores.dtype == torch.float32
    wide = topk_gate(logits.bfloat16().float(), bias.float(), **V3)
    assert torch.equal(gate.scores, wide.scores)
    assert torch.equal(gate.indices, wide.indices)


def test_scores_that_underflow_divide_by_no_zero() -> None:
    gate = topk_gate(torch.full((2, 4), -200.0), None, topk=2)
    assert gate.weights.isfinite().all()


@pytest.mark.parametrize("settings", [V3, V2], ids=["v3", "v2"])
def test_replayed_experts_get_the_gate_values_and_gradients_of_the_scores_at_hand(settings: dict[str, Any]) -> None:
    logits, bias = draw(9, 16)
    steering = bias if settings is V3 else None
    replay = torch.stack([torch.randperm(16)[: settings["topk"]] for _ in range(9)])
    replay[[2, 5]] = -1
    logits.requires_grad_()
    gate = topk_gate(logits, steering, replay=replay.to(torch.int16), **settings)
    free = topk_gate(logits, steering, **settings)
    assert gate.indices.dtype == torch.int64
    assert torch.equal(gate.indices[[2, 5]], free.indices[[2, 5]])
    assert torch.equal(gate.weights[[2, 5]], free.weights[[2, 5]])
    assert torch.equal(gate.scores, free.scores)
    fed = [token for token in range(9) if token not in (2, 5)]
    assert torch.equal(gate.indices[fed], replay[fed])
    cotangent = torch.randn(len(fed), settings["topk"], dtype=torch.float64)
    (actual,) = torch.autograd.grad((gate.weights[fed] * cotangent).sum(), logits)

    leaf = logits.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, token in enumerate(fed):
        values = 1 / (1 + (-leaf[token]).exp()) if settings is V3 else leaf[token].exp() / leaf[token].exp().sum()
        chosen = [values[expert] for expert in replay[token].tolist()]
        norm = sum(chosen) if settings is V3 else 1.0
        for slot, value in enumerate(chosen):
            total = total + cotangent[row, slot] * value / norm * settings["routed_scaling_factor"]
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_replaying_a_choice_of_ones_own_changes_no_bit() -> None:
    logits, bias = draw(50, 16)
    free = topk_gate(logits, bias, **V3)
    again = topk_gate(logits, bias, replay=free.indices, **V3)
    assert all(torch.equal(a, b) for a, b in zip(free, again, strict=True))
