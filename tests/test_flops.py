"""Oracles: DeepSeek-V3's published figures, and a count over the list of every weight's shape of tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_lightning.config import DeepSeekConfig
from ds_lightning.flops import active_param_count, forward_flops_per_token, param_count, train_flops_per_token

V3 = DeepSeekConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18432,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
TINY = DeepSeekConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=24,
    num_attention_heads=2,
    q_lora_rank=6,
    kv_lora_rank=5,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=3,
    n_routed_experts=4,
    n_shared_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=7,
    first_k_dense_replace=1,
    num_nextn_predict_layers=2,
)
SHAPES = {
    "everything": TINY,
    "no query rank": replace(TINY, q_lora_rank=None),
    "no bias": replace(TINY, topk_method="greedy"),
    "no experts": replace(TINY, n_routed_experts=0, num_experts_per_tok=0),
    "no shared expert": replace(TINY, n_shared_experts=0),
    "no dense prefix": replace(TINY, first_k_dense_replace=0),
    "dense prefix longer than the model": replace(TINY, first_k_dense_replace=4),
    "tied": replace(TINY, tie_word_embeddings=True),
    "no prediction modules": replace(TINY, num_nextn_predict_layers=0),
}


def weight_shapes(c: DeepSeekConfig, *, mtp: bool) -> list[tuple[str, tuple[int, ...], float]]:
    """List (kind, shape, share of it that a token uses) of every weight, written from the module tree."""
    heads, h = c.num_attention_heads, c.hidden_size
    weights: list[tuple[str, tuple[int, ...], float]] = [("norm", (h,), 1)]
    weights.append(("embedding", (c.vocab_size, h), 1))
    if not c.tie_word_embeddings:
        weights.append(("head", (c.vocab_size, h), 1))
    depth = c.num_nextn_predict_layers if mtp else 0
    for layer in range(c.num_hidden_layers + depth):
        if layer >= c.num_hidden_layers:
            weights += [("linear", (h, 2 * h), 1), ("norm", (h,), 1), ("norm", (h,), 1), ("norm", (h,), 1)]
        weights += [("norm", (h,), 1), ("norm", (h,), 1)]
        q_width = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            weights += [("linear", (c.q_lora_rank, h), 1), ("norm", (c.q_lora_rank,), 1)]
            weights.append(("linear", (q_width, c.q_lora_rank), 1))
        else:
            weights.append(("linear", (q_width, h), 1))
        weights += [("linear", (c.kv_lora_rank + c.qk_rope_head_dim, h), 1), ("norm", (c.kv_lora_rank,), 1)]
        weights.append(("linear", (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), 1))
        weights.append(("linear", (h, heads * c.v_head_dim), 1))
        if c.n_routed_experts and layer >= c.first_k_dense_replace:
            share = c.num_experts_per_tok / c.n_routed_experts
            weights.append(("linear", (c.n_routed_experts, 2 * c.moe_intermediate_size, h), share))
            weights.append(("linear", (c.n_routed_experts, h, c.moe_intermediate_size), share))
            weights.append(("linear", (c.n_routed_experts, h), 1))
            weights += [("linear", (c.n_shared_experts * c.moe_intermediate_size, h), 1)] * 3
            if c.topk_method == "noaux_tc":
                weights.append(("bias", (c.n_routed_experts,), 1))
        else:
            weights += [("linear", (c.intermediate_size, h), 1)] * 3
    return weights


def size(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def test_deepseek_v3_has_its_published_parameters() -> None:
    assert param_count(V3) == 671_026_419_200
    # The released weights' README gives 11.5B unique parameters to the prediction module.
    assert param_count(V3, include_mtp=True) - param_count(V3) == pytest.approx(11.5e9, rel=0.01)


def test_deepseek_v3_activates_37_billion() -> None:
    assert round(active_param_count(V3) / 1e9, 2) == 37.55
    assert active_param_count(V3, include_embedding=False) == pytest.approx(36.62e9, abs=0.01e9)
    assert active_param_count(V3, include_embedding=False, include_head=False) == pytest.approx(35.70e9, abs=0.01e9)


def test_deepseek_v3_needs_its_published_flops() -> None:
    assert round(train_flops_per_token(V3, 4096, include_mtp=False) / 1e9, 2) == 250.45
    assert round(train_flops_per_token(V3, 4096) / 1e9, 2) == 260.64
    without = replace(V3, num_nextn_predict_layers=0)
    assert train_flops_per_token(without, 4096) == train_flops_per_token(V3, 4096, include_mtp=False)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mtp", [False, True])
def test_parameters_are_the_sum_over_every_weight(name: str, mtp: bool) -> None:
    config = SHAPES[name]
    weights = weight_shapes(config, mtp=mtp)
    assert param_count(config, include_mtp=mtp) == sum(size(shape) for _, shape, _ in weights)
    active = sum(size(shape) * share for _, shape, share in weights)
    assert active_param_count(config, include_mtp=mtp) == active
    bare = sum(size(shape) * share for kind, shape, share in weights if kind not in ("embedding", "head"))
    assert active_param_count(config, include_mtp=mtp, include_embedding=False, include_head=False) == bare


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mtp", [False, True])
def test_flops_are_two_a_weight_of_every_matmul_and_the_attention_square(name: str, mtp: bool) -> None:
    config, seq = SHAPES[name], 8
    linear = sum(size(shape) * share for kind, shape, share in weight_shapes(config, mtp=mtp) if kind == "linear")
    depth = config.num_nextn_predict_layers if mtp else 0
    heads_run = (1 + depth) * config.vocab_size * config.hidden_size
    square = 0
    for _ in range(config.num_hidden_layers + depth):
        for _ in range(config.num_attention_heads):
            square += seq * seq * config.qk_head_dim + seq * seq * config.v_head_dim
    expected = 2 * (linear + heads_run) + 2 * square / seq
    assert forward_flops_per_token(config, seq, causal=False, include_mtp=mtp) == expected
    assert forward_flops_per_token(config, seq, include_mtp=mtp) == expected - square / seq
    assert train_flops_per_token(config, seq, include_mtp=mtp) == 3 * (expected - square / seq)


def test_a_tied_head_is_one_matrix() -> None:
    tied = replace(TINY, tie_word_embeddings=True)
    table = TINY.vocab_size * TINY.hidden_size
    assert param_count(TINY) - param_count(tied) == table
    assert active_param_count(tied, include_embedding=False) == active_param_count(tied)
    assert train_flops_per_token(tied, 16) == train_flops_per_token(TINY, 16)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len is 0, expected at least 1"):
        train_flops_per_token(TINY, 0)
