"""Oracles: SplitMix64 in Python's integers and its published outputs; a token's place on the unit interval by loops."""

import math

import pytest
import torch

from ds_lightning.generation.sampling import draw, mix, uniform

GAMMA, WRAP = 0x9E3779B97F4A7C15, 2**64


def splitmix(state: int) -> int:
    z = state % WRAP
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WRAP
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WRAP
    return z ^ (z >> 31)


def test_hashes_are_those_of_splitmix64() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567]
    counters = [0, 1, 2, 1000]
    for key in keys:
        found = mix(torch.full((4,), key), torch.tensor(counters))
        expected = [splitmix(key + (counter + 1) * GAMMA) for counter in counters]
        assert [value % WRAP for value in found.tolist()] == expected
    # the first outputs of the generator from state 0, as published with it
    first = [value % WRAP for value in mix(torch.zeros(2, dtype=torch.long), torch.arange(2)).tolist()]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_chances_are_the_top_24_bits_and_uniform() -> None:
    keys = torch.arange(50).repeat_interleave(400)
    chances = uniform(keys, torch.arange(400).repeat(50))
    assert chances[7].item() == (splitmix(8 * GAMMA) >> 40) / 2**24
    assert 0 <= chances.min() < chances.max() < 1
    # 20,000 draws: the mean's standard deviation is 0.002, a bin's share of 0.1 has 0.0021
    assert abs(chances.mean().item() - 0.5) < 0.01
    assert (torch.histc(chances, 10, 0, 1) / 20000 - 0.1).abs().max() < 0.01


def by_loop(
    logits: list[float], chance: float, temperature: float, top_k: int, top_p: float
) -> tuple[int, float, float]:
    """Return token, log-probability before cutting, log-probability after."""
    weight = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weight[token])
    kept = order[: top_k or len(order)]
    if top_p < 1:
        total, mass, short = sum(weight[token] for token in kept), 0.0, []
        for token in kept:
            if mass >= top_p:
                break
            short.append(token)
            mass += weight[token] / total
        kept = short
    total, mass = sum(weight[token] for token in kept), 0.0
    for token in sorted(kept):
        mass += weight[token] / total
        if mass > chance:
            return token, math.log(weight[token] / sum(weight)), math.log(weight[token] / total)
    raise AssertionError("no token")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.8), (1, 1.0), (0, 1e-6), (99, 0.999)])
def test_tokens_and_both_log_probabilities_are_those_of_the_loop(temperature: float, top_k: int, top_p: float) -> None:
    logits, chance = torch.randn(200, 12) * 2, torch.rand(200)
    tokens, logprobs, sampling = draw(logits, chance, temperature=temperature, top_k=top_k, top_p=top_p)
    for row in range(200):
        expected = by_loop(logits[row].tolist(), chance[row].item(), temperature, top_k, top_p)
        assert tokens[row].item() == expected[0]
        assert logprobs[row].item() == pytest.approx(expected[1], abs=2e-5)  # a few roundings of numbers up to 20
        assert sampling[row].item() == pytest.approx(expected[2], abs=2e-5)


def test_the_largest_chance_finds_a_token_that_can_be_drawn() -> None:
    for scale in (1.0, 30.0):
        logits = torch.randn(500, 33) * scale
        logits[:, -3:] = -torch.inf
        chance = torch.full((500,), 1 - 2.0**-24)
        tokens, logprobs, _ = draw(logits, chance)
        assert tokens.max() < 30
        assert logprobs.isfinite().all()
        assert (draw(logits, torch.zeros(500))[0] < 30).all()


def test_equally_likely_tokens_at_the_cut_are_all_kept() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -1.0]]).expand(2, 4)
    tokens, _, sampling = draw(logits, torch.tensor([0.2, 0.8]), top_k=1)
    assert tokens.tolist() == [1, 2]
    assert sampling.tolist() == pytest.approx([math.log(0.5)] * 2)


def test_temperature_zero_takes_the_likeliest_token_and_reports_its_probability_at_one() -> None:
    logits = torch.randn(20, 9)
    tokens, logprobs, sampling = draw(logits, torch.rand(20), temperature=0.0, top_p=0.5)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), rtol=0, atol=0)
    assert torch.equal(logprobs, sampling)
