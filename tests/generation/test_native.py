"""Oracle: the steps by the modules of the model, in fp64.

A step computes in fp32: sums through three layers, measured at most 6e-7 from the truth in the 2-norm; 2e-6 is allowed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.generation import Generator, LatentCache, native
from ds_lightning.generation.native import NativeSteps
from ds_lightning.generation.steps import TorchSteps, steps_of
from tests.generation.small_model import CONFIG, prompts, small_model
from tests.ops.compiler import needs_compiler
from tests.ops.error_ratio import relative_error

BOUND = 2e-6

V2: dict[str, Any] = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
SHAPES: dict[str, dict[str, Any]] = {
    "V3": {},
    "V3 in groups": {"n_group": 4, "topk_group": 2},
    "V2": {**V2, "n_group": 2, "topk_group": 1, "q_lora_rank": None},
    "V2 without groups": {**V2, "topk_method": "greedy", "n_group": 2, "topk_group": 1},
    "no shared experts": {"n_shared_experts": 0},
    "no experts": {"n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0},
    "experts in all layers": {"first_k_dense_replace": 0, "num_experts_per_tok": 8},
    "tied": {"tie_word_embeddings": True},
    "a longer context": {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=24)},
    "widths of whole panels": {"hidden_size": 32, "kv_lora_rank": 16, "moe_intermediate_size": 16, "v_head_dim": 16},
}


def filled_cache(config: DeepSeekConfig, rows: int, dtype: torch.dtype) -> LatentCache:
    """Return a cache of rows of unequal length."""
    rng = torch.Generator().manual_seed(0)
    cache = LatentCache(config, rows, dtype, torch.device("cpu"))
    width = config.kv_lora_rank + config.qk_rope_head_dim
    for row in range(rows):
        drawn = torch.randn(config.num_hidden_layers, 1 + row * 7 % 40, width, generator=rng, dtype=torch.float64)
        cache.admit(drawn.to(dtype), 1)
    return cache


def after(steps: Any, config: DeepSeekConfig, rows: int) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Return the scores of two steps, the experts of the last, and what is in the cache then."""
    cache, scores, chosen = filled_cache(config, rows, steps.dtype), [], None
    with torch.inference_mode():
        for step in range(2):
            tokens = (torch.arange(rows) * 11 + step) % config.vocab_size
            logits, chosen = steps(tokens, cache)
            scores.append(logits)
            cache.advance()
    return scores, chosen, cache.seen()[0]


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 150])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_the_modules(shape: str, rows: int) -> None:
    model = small_model(**SHAPES[shape])
    steps = NativeSteps.of(model)
    assert steps is not None
    found, chosen, cache = after(steps, model.config, rows)
    expected, experts, truth = after(TorchSteps(model.double()), model.config, rows)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < BOUND
    assert relative_error(cache, truth) < BOUND
    if experts is None:
        assert chosen is None
    else:
        assert chosen is not None
        assert torch.equal(chosen, experts)


@needs_compiler
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads() -> None:
    model, before = small_model(), torch.get_num_threads()
    steps = NativeSteps.of(model)
    assert steps is not None
    try:
        runs = []
        for threads, rows in ((1, 150), (2, 150), (3, 80), (1, 9)):
            torch.set_num_threads(threads)
            runs.append(after(steps, model.config, rows)[0][1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(run[:9], runs[0][:9]) for run in runs)


@needs_compiler
def test_a_generator_takes_the_kernel_and_draws_what_the_modules_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = small_model(), prompts(5)
    assert isinstance(steps_of(model), NativeSteps)
    settings: dict[str, Any] = {"n": 3, "max_new_tokens": 20, "seed": 4, "stop": [3], "max_batch": 4}
    fast = Generator(model).generate(asked, **settings)
    monkeypatch.setattr(NativeSteps, "of", classmethod(lambda cls, model: None))
    slow = Generator(model).generate(asked, **settings)
    for ours, theirs in zip(fast, slow, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.routing is not None
        assert theirs.routing is not None
        assert torch.equal(ours.routing, theirs.routing)
        assert (ours.logprobs - theirs.logprobs).abs().max() < 1e-5  # as samples against the training forward


@needs_compiler
def test_weights_are_those_of_the_moment() -> None:
    model = small_model()
    before = after(NativeSteps.of(model), model.config, 3)[0][0]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(after(NativeSteps.of(model), model.config, 3)[0][0], 2 * before)


@pytest.mark.parametrize("reason", ["precision", "autocast", "size", "shards", "compiler"])
def test_a_model_that_it_cannot_take_is_left_to_the_modules(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    if reason == "precision":
        model.bfloat16()
    if reason == "size":
        monkeypatch.setattr(native, "SMALL", 100)
    if reason == "shards":
        model.norm.weight.data = torch.empty(0)
    if reason == "compiler":
        monkeypatch.setattr(native, "takes", lambda source, *weights: False)
    with torch.autocast("cpu", enabled=reason == "autocast"):
        assert isinstance(steps_of(model), TorchSteps)


@needs_compiler
def test_v3s_bias_steers_the_choice_and_no_gate_value() -> None:
    model = small_model(first_k_dense_replace=0)
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        bias = block.mlp.gate.e_score_correction_bias
        bias.fill_(-5.0)
        bias[2:5] = 5.0
    found, chosen, _ = after(NativeSteps.of(model), replace(CONFIG, first_k_dense_replace=0), 6)
    assert chosen is not None
    assert set(chosen.flatten().tolist()) == {2, 3, 4}
    expected = after(TorchSteps(model.double()), model.config, 6)[0]
    assert relative_error(found[1], expected[1]) < BOUND
