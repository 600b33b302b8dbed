"""Generation on a GPU. The oracles: the training forward over every row, and the same generation on the CPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.generation import Generator, Sample
from ds_lightning.models import DeepSeek
from tests.generation.small_model import prompts, small_model

SHAPES: dict[str, dict[str, Any]] = {
    "whole 16 bytes a row": {"moe_intermediate_size": 16},
    "odd widths": {},
    "no experts": {"n_routed_experts": 0},
}


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if precision == "bf16" else nullcontext()


def by_training(model: DeepSeek, prompt: list[int], sample: Sample) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities and experts by one training forward over the row, gradients included."""
    gates: list[Any] = []
    ids = torch.tensor([prompt + sample.tokens.tolist()], device="cuda")
    logits = model.logits(model(ids, gates=gates)[:, :-1]).float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, len(prompt) - 1 :, 0]
    return logprobs.detach().cpu(), torch.stack([gate.indices for gate in gates], 1).cpu() if gates else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probabilities_are_those_of_the_training_forward(precision: str, shape: str) -> None:
    model, asked = small_model(**SHAPES[shape]).cuda(), prompts(60)
    with autocast(precision):
        samples = Generator(model).generate(asked, max_new_tokens=24, stop=[1, 2, 3], max_batch=16)
        gaps = [by_training(model, p, s)[0] - s.logprobs for p, s in zip(asked, samples, strict=True)]
    gap = torch.cat(gaps).abs()
    print(f"{precision}, {shape}: median {gap.median():.1e}, max {gap.max():.1e}")
    # As on the CPU: fp32 sums of some tens of terms through three layers; bf16 is a few hundredths for logits of one.
    assert gap.max() < 2e-5 if precision == "fp32" else gap.median() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exact_figures_are_bitwise_those_of_the_training_forward(precision: str, shape: str) -> None:
    model, asked = small_model(**SHAPES[shape]).cuda(), prompts(12)
    with autocast(precision):
        samples = Generator(model).generate(asked, max_new_tokens=10, stop=[1, 2], exact=True, max_batch=5)
        for prompt, sample in zip(asked, samples, strict=True):
            logprobs, experts = by_training(model, prompt, sample)
            assert torch.equal(logprobs, sample.logprobs)
            if experts is not None:
                assert sample.routing is not None
                assert torch.equal(experts[:-1], sample.routing[:-1].long())


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 8}, {"top_p": 0.8}])
def test_tokens_are_those_of_the_cpu(settings: dict[str, Any]) -> None:
    asked = prompts(20)
    expected = Generator(small_model()).generate(asked, 2, max_new_tokens=12, seed=7, **settings)
    found = Generator(small_model().cuda()).generate(asked, 2, max_new_tokens=12, seed=7, **settings)
    # A number within rounding of the border of two tokens may fall on its other side: in 480 draws, next to never.
    assert [sample.tokens.tolist() for sample in found] == [sample.tokens.tolist() for sample in expected]


def test_the_same_request_is_answered_with_the_same_bits() -> None:
    model, asked = small_model(moe_intermediate_size=16).cuda(), prompts(30)
    with autocast("bf16"):
        one, other = (Generator(model).generate(asked, 3, max_new_tokens=12, seed=2) for _ in range(2))
    for sample, again in zip(one, other, strict=True):
        assert torch.equal(sample.tokens, again.tokens)
        assert torch.equal(sample.logprobs, again.logprobs)
