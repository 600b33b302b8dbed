"""Oracles: torch's cross_entropy over all logits at once, and labels shifted by a Python loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ds_lightning.losses.next_token import IGNORE, mtp_labels, next_token_loss


def draw() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(13, (3, 5), generator=rng)
    labels[0, 3:] = IGNORE
    hidden = torch.randn(3, 5, 7, generator=rng, dtype=torch.float64)
    return hidden, torch.randn(13, 7, generator=rng, dtype=torch.float64), labels


def test_the_loss_is_the_sum_over_counted_positions() -> None:
    hidden, head, labels = draw()
    expected = cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(next_token_loss(hidden, head, labels), expected, rtol=1e-12, atol=0)


def test_rows_add_up_whatever_batch_they_are_in() -> None:
    hidden, head, labels = draw()
    parts = [next_token_loss(hidden[row : row + 1], head, labels[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(sum(parts), next_token_loss(hidden, head, labels), rtol=1e-12, atol=0)


def test_token_weights_weigh_the_token_they_stand_at() -> None:
    hidden, head, labels = draw()
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    each = cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE)
    actual = next_token_loss(hidden, head, labels, weights)
    torch.testing.assert_close(actual, (each * weights.flatten()).sum(), rtol=1e-12, atol=0)


def test_hidden_states_and_head_both_learn() -> None:
    hidden, head, labels = draw()
    hidden.requires_grad_()
    head.requires_grad_()
    next_token_loss(hidden, head, labels).backward()
    for leaf in (hidden, head):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 8])
def test_labels_of_a_depth_lie_that_many_positions_on(depth: int) -> None:
    labels = torch.arange(10).view(2, 5)
    expected = [[row[t + depth] if t + depth < 5 else IGNORE for t in range(5)] for row in labels.tolist()]
    assert mtp_labels(labels, depth).tolist() == expected
    assert labels.tolist() == torch.arange(10).view(2, 5).tolist()


def test_ignored_labels_stay_ignored_where_they_move_to() -> None:
    labels = torch.tensor([[1, IGNORE, 3, 4]])
    assert mtp_labels(labels, 1).tolist() == [[IGNORE, 3, 4, IGNORE]]
