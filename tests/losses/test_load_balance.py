"""Oracles: the paper's formulas as Python loops, and gradients by autograd of the formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.losses.load_balance import bias_update, expert_load, max_violation, sequence_balance_loss

counts = st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=3)


def test_the_load_is_a_count_of_tokens_in_fp32() -> None:
    indices = torch.tensor([[0, 3], [3, 1], [3, 0]])
    load = expert_load(indices, 5)
    assert load.dtype == torch.float32
    assert load.tolist() == [2, 1, 0, 3, 0]


@settings(deadline=None)
@given(counts)
def test_max_violation_is_the_fullest_experts_excess_over_the_mean(rows: list[list[int]]) -> None:
    expected = [max(row) / (sum(row) / 4) - 1 if any(row) else 0.0 for row in rows]
    assert max_violation(torch.tensor(rows).double()).tolist() == pytest.approx(expected, abs=1e-12)


def test_max_violation_of_all_tokens_on_one_of_n_experts_is_n_minus_one() -> None:
    assert max_violation(torch.tensor([[0.0, 9, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]])).tolist() == [3, 0, 0]


@settings(deadline=None)
@given(counts, st.floats(0, 0.1))
def test_the_bias_of_the_overloaded_falls_and_of_the_underloaded_rises(rows: list[list[int]], gamma: float) -> None:
    bias = torch.arange(4.0, dtype=torch.float64).expand(len(rows), 4)
    updated = bias_update(torch.tensor(rows).double(), bias, gamma=gamma)
    for row, before, after in zip(rows, bias.tolist(), updated.tolist(), strict=True):
        for expert, load in enumerate(row):
            step = gamma * ((load < sum(row) / 4) - (load > sum(row) / 4))
            assert after[expert] == pytest.approx(before[expert] + step, abs=1e-12)


def test_a_balanced_layer_keeps_its_bias_and_inputs_are_left_alone() -> None:
    load, bias = torch.full((7,), 11.0), torch.linspace(-1, 1, 7)
    kept = bias.clone()
    assert torch.equal(bias_update(load, bias, gamma=0.1), kept)
    bias_update(torch.arange(7.0), bias, gamma=0.1)
    assert torch.equal(bias, kept)


def sequence_loss_by_loops(scores: list[list[float]], topk: int, seq_len: int) -> float:
    """f_i = experts / (topk T) sum_t 1(i among the topk of t);  P_i = 1/T sum_t s_it / sum_j s_jt;  sum of f_i P_i."""
    total = 0.0
    for start in range(0, len(scores), seq_len):
        sequence = scores[start : start + seq_len]
        experts = len(sequence[0])
        for i in range(experts):
            visits = sum(i in sorted(range(experts), key=row.__getitem__)[-topk:] for row in sequence)
            share = sum(row[i] / sum(row) for row in sequence) / seq_len
            total += experts / (topk * seq_len) * visits * share
    return total


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 6).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))),
    st.integers(0, 1000),
)
def test_the_sequence_loss_is_the_papers_sum(batch: int, seq: int, experts_topk: tuple[int, int], seed: int) -> None:
    experts, topk = experts_topk
    scores = torch.rand(batch * seq, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = sequence_balance_loss(scores, topk, seq_len=seq)
    assert float(loss) == pytest.approx(sequence_loss_by_loops(scores.tolist(), topk, seq), rel=1e-12)


def test_perfect_balance_costs_one_a_sequence() -> None:
    scores = torch.eye(4, dtype=torch.float64).repeat(2, 1) + 0.1
    assert float(sequence_balance_loss(scores, 1, seq_len=4)) == pytest.approx(2.0)
    assert float(sequence_balance_loss(scores, 1, seq_len=8)) == pytest.approx(1.0)


def test_the_gradient_flows_through_the_mean_scores_alone_and_pushes_the_fullest_down() -> None:
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:, 2] += 1  # every token chooses expert 2
    leaf = scores.clone().requires_grad_()
    sequence_balance_loss(leaf, 1, seq_len=6).backward()
    other = scores.clone().requires_grad_()
    (4 * (other[:, 2] / other.sum(-1)).mean()).backward()  # f is 4 for expert 2 and 0 elsewhere
    assert leaf.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert (leaf.grad[:, 2] > 0).all()
