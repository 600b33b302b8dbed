"""Oracles: a loop that runs the training forward over everything for every token, and the forward itself.

Log-probabilities may differ from the training forward by 1e-5 in fp32: both are sums of some tens of terms of size one
through three layers; measured at most 5e-6.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.generation import Generator, Sample
from ds_lightning.generation.sampling import draw, mix, uniform
from ds_lightning.models import DeepSeek
from tests.generation.small_model import CONFIG, MOE_LAYERS, naive_logits, prompts, small_model

BOUND = 1e-5


def naive(model: DeepSeek, prompt: list[int], key: tuple[int, int, int], tokens: int, **settings: Any) -> list[int]:
    """Continue one prompt by itself; the key is seed, prompt and number of the sample."""
    seed, *path = (torch.tensor([part]) for part in key)
    hashed = mix(mix(seed, path[0]), path[1])
    ids = list(prompt)
    for count in range(tokens):
        chance = uniform(hashed, torch.tensor([count]))
        ids.append(int(draw(naive_logits(model, ids)[None], chance, **settings).tokens))
    return ids[len(prompt) :]


def by_training(model: DeepSeek, prompt: list[int], sample: Sample, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and experts by one training forward over the row."""
    gates: list[Any] = []
    ids = torch.tensor([prompt + sample.tokens.tolist()])
    with torch.no_grad():
        logits = model.logits(model(ids, gates=gates))[0, len(prompt) - 1 : -1] / temperature
    experts = torch.stack([gate.indices for gate in gates], 1)
    return logits.log_softmax(-1).gather(1, sample.tokens[:, None])[:, 0], experts


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.5, "top_p": 0.8},
    ],
    ids=["greedy", "plain", "top-k", "top-p"],
)
def test_tokens_are_those_of_a_loop_over_full_forwards(settings: dict[str, Any]) -> None:
    model, asked = small_model(), prompts(5)
    samples = Generator(model).generate(asked, 2, max_new_tokens=9, seed=11, max_batch=3, **settings)
    assert [sample.prompt for sample in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for number, sample in enumerate(samples):
        key = (11, number // 2, number % 2)
        assert sample.tokens.tolist() == naive(model, asked[number // 2], key, 9, **settings)
        assert sample.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_of_a_hundred_prompts_are_those_of_the_training_forward(temperature: float) -> None:
    model, asked = small_model(), prompts(100)
    stop = [1, 2, 3]  # some end soon, others late: rows leave and enter all the time
    samples = Generator(model).generate(asked, max_new_tokens=30, stop=stop, temperature=temperature, max_batch=16)
    lengths = Counter(len(sample.tokens) for sample in samples)
    assert len(lengths) > 10, "rows are meant to leave at different times"
    worst = 0.0
    for prompt, sample in zip(asked, samples, strict=True):
        logprobs, experts = by_training(model, prompt, sample, temperature)
        worst = max(worst, (logprobs - sample.logprobs).abs().max().item())
        assert torch.equal(sample.logprobs, sample.sampling_logprobs)
        assert sample.routing is not None
        assert sample.routing.dtype == torch.int16
        assert torch.equal(sample.routing[:-1].long(), experts[:-1])
        assert (sample.routing[-1] == -1).all()
        ended = sample.tokens[-1].item() in stop
        assert sample.finish_reason == ("stop" if ended else "length")
        assert ended or len(sample.tokens) == 30
        assert not set(sample.tokens[:-1].tolist()) & set(stop)
    print(f"worst gap {worst:.1e}")
    assert worst <= BOUND


@pytest.mark.parametrize("changes", [{"q_lora_rank": None}, {"n_routed_experts": 0}, {"tie_word_embeddings": True}])
def test_other_shapes_agree_with_the_training_forward_too(changes: dict[str, Any]) -> None:
    model, asked = small_model(**changes), prompts(6)
    for prompt, sample in zip(asked, Generator(model).generate(asked, max_new_tokens=8), strict=True):
        gates = by_training(model, prompt, sample)[0] if model.config.n_routed_experts else None
        if gates is None:
            assert sample.routing is None
            logits = torch.stack([naive_logits(model, prompt + sample.tokens[:t].tolist()) for t in range(8)])
            gates = logits.log_softmax(-1).gather(1, sample.tokens[:, None])[:, 0]
        assert (gates - sample.logprobs).abs().max() <= BOUND


def test_exact_figures_are_bitwise_those_of_the_training_forward_with_gradient() -> None:
    model, asked = small_model(), prompts(12)
    samples = Generator(model).generate(asked, max_new_tokens=10, stop=[1, 2], exact=True, max_batch=5, temperature=0.8)
    for prompt, sample in zip(asked, samples, strict=True):
        gates: list[Any] = []
        ids = torch.tensor([prompt + sample.tokens.tolist()])
        logits = model.logits(model(ids, gates=gates)[:, :-1]) / 0.8
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, len(prompt) - 1 :, 0]
        assert logprobs.requires_grad
        assert torch.equal(logprobs, sample.logprobs)
        assert sample.routing is not None
        assert torch.equal(torch.stack([gate.indices for gate in gates], 1)[:-1], sample.routing[:-1].long())


def test_samples_do_not_depend_on_the_batch_or_the_order() -> None:
    model, asked = small_model(), prompts(20)

    def tokens(order: list[int], **settings: Any) -> dict[int, list[list[int]]]:
        chosen = [asked[i] for i in order]
        samples = Generator(model).generate(chosen, 3, max_new_tokens=12, stop=[4], keys=order, seed=2, **settings)
        return {key: [s.tokens.tolist() for s in samples[3 * i : 3 * i + 3]] for i, key in enumerate(order)}

    expected = tokens(list(range(20)))
    assert tokens(list(range(20)), max_batch=1) == expected
    assert tokens(list(reversed(range(20))), max_batch=7) == expected
    assert tokens([13, 4]) == {key: expected[key] for key in (13, 4)}
    alone = Generator(model).generate([asked[13]], 3, max_new_tokens=12, stop=[4], keys=[13], seed=3)
    assert [sample.tokens.tolist() for sample in alone] != expected[13]
    assert len({tuple(row) for row in expected[13]}) == 3


@pytest.mark.parametrize("cuts", [(0, 7, 7, 15), (0, 1, 14, 15), (0, 6, 12, 15)])
def test_samples_can_be_made_in_parts(cuts: tuple[int, ...]) -> None:
    model, asked = small_model(), prompts(5)
    settings: dict[str, Any] = {"n": 3, "max_new_tokens": 9, "stop": [4], "keys": [9, 8, 7, 6, 5], "seed": 2}
    whole = Generator(model).generate(asked, **settings)
    parts = [range(start, stop) for start, stop in pairwise(cuts)]
    found = [
        sample for part in parts for sample in Generator(model).generate(asked, numbers=part, max_batch=2, **settings)
    ]
    assert [sample.prompt for sample in found] == [sample.prompt for sample in whole]
    for sample, expected in zip(found, whole, strict=True):
        assert torch.equal(sample.tokens, expected.tokens)
        assert (sample.logprobs - expected.logprobs).abs().max() <= BOUND
        assert sample.routing is not None
        assert expected.routing is not None
        assert torch.equal(sample.routing, expected.routing)


def test_samples_of_one_prompt_have_the_frequencies_of_the_model() -> None:
    model, draws = small_model(), 4000
    samples = Generator(model).generate([[7, 3]], draws, max_new_tokens=1, temperature=2.0, max_batch=500)
    counts = torch.bincount(torch.cat([sample.tokens for sample in samples]), minlength=CONFIG.vocab_size)
    expected = (naive_logits(model, [7, 3]) / 2.0).softmax(-1)
    assert (counts / draws - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_prompt_runs_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model(), list[tuple[int, ...]]()
    model.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    Generator(model).generate([[1] * 4, [2] * 6], 7, max_new_tokens=5, max_batch=4)
    assert seen == [(1, 4), (1, 6)]
    monkeypatch.setattr("ds_lightning.generation.engine.PREFILL_TOKENS", 14)
    seen.clear()
    Generator(model).generate([[1] * 7, [2] * 3, [3] * 2, [4] * 20], max_new_tokens=2)
    assert seen == [(1, 20), (2, 7), (1, 2)]


def test_stop_sequences_end_a_sample_where_they_are_complete() -> None:
    model, prompt = small_model(), [5, 6, 7]
    free = Generator(model).generate([prompt], max_new_tokens=20, seed=4)[0].tokens.tolist()
    pair = free[8:10]
    first = next(i for i in range(len(free) - 1) if free[i : i + 2] == pair)
    (ended,) = Generator(model).generate([prompt], max_new_tokens=20, seed=4, stop=[pair, [39, 39, 39]])
    assert ended.tokens.tolist() == free[: first + 2]
    assert ended.finish_reason == "stop"
    (other,) = Generator(model).generate([[*prompt, pair[0]]], max_new_tokens=1, stop=[[pair[0], 99], [pair[0]] * 9])
    assert other.finish_reason == "length"


def test_a_stop_sequence_does_not_begin_in_the_prompt() -> None:
    model = small_model()
    first = int(naive_logits(model, [5, 6]).argmax())
    (sample,) = Generator(model).generate([[5, 6]], max_new_tokens=3, temperature=0.0, stop=[[6, first]])
    assert sample.finish_reason == "length"


def test_tokens_are_told_as_they_come() -> None:
    told: dict[int, list[int]] = {}

    def listen(numbers: list[int], tokens: list[int]) -> None:
        for number, token in zip(numbers, tokens, strict=True):
            told.setdefault(number, []).append(token)

    samples = Generator(small_model()).generate(
        prompts(5), 2, max_new_tokens=6, stop=[3], max_batch=4, on_tokens=listen
    )
    assert [told[i] for i in range(10)] == [sample.tokens.tolist() for sample in samples]


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        Generator(model).generate(prompts(3), max_new_tokens=3)

        def fail(*_: Any) -> None:
            assert torch.is_inference_mode_enabled()
            assert not model.training
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Generator(model).generate(prompts(3), max_new_tokens=3, on_tokens=fail)
        assert all(module.training is training for module in model.modules())
        assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(weight.grad is not None for weight in model.layers.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bf16_and_autocast_agree_with_the_training_forward_in_the_same_precision() -> None:
    # 8 bits of mantissa through three layers: a few hundredths for logits of size one; measured 0.06 and 0.09 at most
    for model, autocast in ((small_model().bfloat16(), False), (small_model(), True)):
        asked = prompts(10)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            samples = Generator(model).generate(asked, max_new_tokens=10, max_batch=4)
            gaps = [(by_training(model, p, s)[0].float() - s.logprobs) for p, s in zip(asked, samples, strict=True)]
            gap = torch.cat(gaps).abs()
            print(f"autocast {autocast}: mean {gap.mean():.3f}, max {gap.max():.3f}")
            assert gap.median() < 0.03
            assert samples[0].logprobs.dtype == torch.float32
            model(torch.tensor([[1, 2, 3]])).float().sum().backward()
        assert all(weight.grad is not None for weight in model.layers.parameters())


def test_no_prompt_gives_no_sample() -> None:
    assert Generator(small_model()).generate([], max_new_tokens=3) == []


def test_the_context_can_be_filled_to_its_end() -> None:
    model, context = small_model(), CONFIG.max_position_embeddings
    (sample,) = Generator(model).generate([[1] * (context - 2)], max_new_tokens=2)
    assert len(sample.tokens) == 2
    assert sample.routing is not None
    assert sample.routing.shape == (context, MOE_LAYERS, CONFIG.num_experts_per_tok)
    assert math.isfinite(sample.logprobs.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"max_batch": 0}, "max_batch is 0, expected at least 1"),
        ({"temperature": -0.5}, r"temperature is -0\.5, expected 0 or more"),
        ({"top_k": -1}, r"top_k is -1, expected 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"top_p is 0\.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1\.5, expected more than 0"),
        ({"stop": [[]]}, "stop holds an empty sequence, expected at least one token in each"),
        ({"keys": [1]}, "keys has 1 numbers, expected 2: one a prompt"),
        ({"numbers": range(1, 3)}, r"numbers is range\(1, 3\), expected consecutive ones within the 2 samples of all"),
        ({"numbers": range(0, 2, 2)}, r"numbers is range\(0, 2, 2\), expected consecutive ones"),
        ({"prompts": [[1], []]}, "prompt 1 has no token, expected at least one"),
        ({"prompts": [[1], [40]]}, r"prompt 1 holds the token 40, expected 0 to 39 \(vocab_size 40\)"),
        ({"prompts": [[1], [-1]]}, "prompt 1 holds the token -1, expected 0 to 39"),
        (
            {"prompts": [[1] * 93]},
            r"prompt 0 has 93 tokens, which with max_new_tokens \(4\) is more than max_position_embeddings \(96\)",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator(small_model()).generate(**{"prompts": [[1], [2]], "max_new_tokens": 4, **arguments})
