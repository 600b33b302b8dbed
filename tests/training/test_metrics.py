"""Oracles: sums over tokens by plain Python, and a model that is uniform over bytes."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ds_lightning.training.metrics import LanguageModelMetrics


def draw(batches: int) -> list[tuple[list[float], list[int]]]:
    """Return probabilities of tokens, and the bytes that each stands for, of a few batches of different sizes."""
    rng = random.Random(0)
    sizes = [rng.randint(1, 40) for _ in range(batches)]
    return [([rng.uniform(0.01, 1) for _ in range(n)], [rng.randint(0, 9) for _ in range(n)]) for n in sizes]


def update(metrics: LanguageModelMetrics, batch: tuple[list[float], list[int]]) -> None:
    probabilities, num_bytes = batch
    nll = torch.tensor(-sum(map(math.log, probabilities)), dtype=torch.float64)
    metrics.update(nll, len(probabilities), sum(num_bytes))


def by_hand(batches: list[tuple[list[float], list[int]]]) -> dict[str, float]:
    probabilities = [p for batch in batches for p in batch[0]]
    bits = -sum(map(math.log2, probabilities))
    mean = -sum(map(math.log, probabilities)) / len(probabilities)
    return {
        "val/loss": mean,
        "val/ppl": math.prod(p ** (-1 / len(probabilities)) for p in probabilities),
        "val/bits_per_byte": bits / sum(sum(batch[1]) for batch in batches),
    }


def values(metrics: LanguageModelMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.compute().items()}


def test_every_token_weighs_the_same_whatever_batch_it_is_in() -> None:
    metrics, batches = LanguageModelMetrics(), draw(5)
    for batch in batches:
        update(metrics, batch)
    assert values(metrics) == pytest.approx(by_hand(batches), rel=1e-12)


def test_a_model_that_is_uniform_over_bytes_needs_eight_bits_a_byte() -> None:
    metrics = LanguageModelMetrics()
    metrics.update(torch.tensor(1000 * math.log(256)), 1000, 1000)
    assert values(metrics) == pytest.approx({"val/loss": math.log(256), "val/ppl": 256, "val/bits_per_byte": 8})


def test_a_token_without_text_is_paid_for_and_stands_for_no_byte() -> None:
    metrics = LanguageModelMetrics()
    metrics.update(torch.tensor(3 * math.log(2.0)), 3, 2)  # the last one ends the text
    assert values(metrics)["val/bits_per_byte"] == pytest.approx(1.5)
    assert values(metrics)["val/loss"] == pytest.approx(math.log(2.0))


def test_ranks_add_up_their_sums() -> None:
    batches = draw(6)
    ranks = [LanguageModelMetrics(), LanguageModelMetrics()]
    for index, batch in enumerate(batches):
        update(ranks[index % 2], batch)
    others = iter([ranks[1].nll, ranks[1].tokens, ranks[1].bytes])
    ranks[0].distributed_available_fn = lambda: True
    ranks[0].dist_sync_fn = lambda value, group: [value, next(others)]
    assert values(ranks[0]) == pytest.approx(by_hand(batches), rel=1e-12)


def test_a_reset_forgets_everything() -> None:
    metrics, (first, second) = LanguageModelMetrics(), draw(2)
    update(metrics, first)
    metrics.reset()
    update(metrics, second)
    assert values(metrics) == pytest.approx(by_hand([second]), rel=1e-12)


def test_small_losses_are_not_lost_in_large_sums() -> None:
    metrics = LanguageModelMetrics()
    metrics.update(torch.tensor(2.0**25), 2**25, 2**25)
    for _ in range(100):
        metrics.update(torch.tensor(1.0), 1, 1)  # half a unit in the last place of an fp32 sum
    assert float(metrics.nll) == float(metrics.tokens) == float(metrics.bytes) == 2**25 + 100
