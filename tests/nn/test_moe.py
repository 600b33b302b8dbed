"""Oracle: DeepSeekMoE as a Python loop over tokens and their experts, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from ds_lightning.config import DeepSeekConfig
from ds_lightning.nn.moe import DeepSeekMoE

CONFIG = DeepSeekConfig(
    vocab_size=11,
    hidden_size=10,
    num_hidden_layers=1,
    intermediate_size=8,
    num_attention_heads=1,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=5,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
V2 = replace(
    CONFIG, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0
)


def build(config: DeepSeekConfig, *, bias_scale: float = 0.5) -> DeepSeekMoE:
    moe = DeepSeekMoE(config).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(generator=rng)
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.normal_(0, bias_scale, generator=rng)
    return moe


def draw(batch: int = 2, seq: int = 6) -> Tensor:
    return torch.randn(batch, seq, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_loops(moe: DeepSeekMoE, x: Tensor) -> Tensor:
    """Route and compute one token at a time."""
    config = moe.gate.config
    out = torch.zeros_like(x)
    size = config.n_routed_experts // config.n_group
    for position in range(x.shape[0]):
        logits = moe.gate.weight @ x[position]
        scores = 1 / (1 + (-logits).exp()) if config.scoring_func == "sigmoid" else logits.softmax(0)
        bias = moe.gate.e_score_correction_bias
        choice = scores if bias is None else scores + bias
        groups = list(choice.split(size))
        rank = [float(g.max()) if bias is None else float(g.sort().values[-2:].sum()) for g in groups]
        best_groups = sorted(range(config.n_group), key=rank.__getitem__)[-config.topk_group :]
        if config.topk_method == "greedy":
            best_groups = list(range(config.n_group))
        candidates = [expert for expert in range(config.n_routed_experts) if expert // size in best_groups]
        experts = sorted(candidates, key=lambda e: float(choice[e]))[-config.num_experts_per_tok :]
        total = sum(float(scores[e]) for e in experts) if config.norm_topk_prob else 1.0
        for expert in experts:
            gate_proj, up_proj = moe.experts.gate_up_proj[expert].split(config.moe_intermediate_size)
            y = moe.experts.down_proj[expert] @ (silu(gate_proj @ x[position]) * (up_proj @ x[position]))
            out[position] += scores[expert] / total * config.routed_scaling_factor * y
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            inner = silu(shared.gate_proj.weight @ x[position]) * (shared.up_proj.weight @ x[position])
            out[position] += shared.down_proj.weight @ inner
    return out


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, norm_topk_prob=False, n_group=1, topk_group=1),
        replace(CONFIG, n_shared_experts=0, num_experts_per_tok=1),
        replace(CONFIG, num_experts_per_tok=8, topk_group=4),
        V2,
        replace(V2, topk_method="greedy"),
    ],
    ids=["v3", "v3 without groups", "no shared expert", "every expert", "v2", "v2-lite ignores groups"],
)
def test_the_layer_is_shared_experts_plus_gated_routed_experts(config: DeepSeekConfig) -> None:
    moe, x = build(config), draw()
    with torch.no_grad():
        out, gate = moe(x)
        expected = by_loops(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert gate.indices.shape == gate.weights.shape == (12, config.num_experts_per_tok)
    assert gate.scores.shape == (12, 8)


def test_shared_experts_are_one_feed_forward_of_their_common_width() -> None:
    shared = build(CONFIG).shared_experts
    assert shared is not None
    assert shared.gate_proj.weight.shape == (2 * 5, 10)


def test_only_bias_balanced_routing_has_a_selection_bias_and_it_is_no_parameter() -> None:
    assert build(V2).gate.e_score_correction_bias is None
    gate = DeepSeekMoE(CONFIG).gate
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert (gate.e_score_correction_bias == 0).all()
    assert dict(gate.named_parameters()).keys() == {"weight"}
    assert "e_score_correction_bias" in gate.state_dict()


def test_the_selection_bias_moves_tokens_but_no_gate_value_and_gets_no_gradient() -> None:
    moe, x = build(replace(CONFIG, n_group=1, topk_group=1)), draw()
    bias = moe.gate.e_score_correction_bias
    assert bias is not None
    bias.zero_()
    _, before = moe(x)
    bias[5] = 100
    out, after = moe(x)
    assert not (before.indices == 5).any(1).all()
    assert (after.indices[:, 0] == 5).all()
    values = after.scores.gather(1, after.indices)
    torch.testing.assert_close(after.weights, 2.5 * values / values.sum(1, keepdim=True), rtol=1e-12, atol=0)
    assert torch.equal(before.scores, after.scores)
    out.sum().backward()
    assert bias.grad is None
    assert moe.gate.weight.grad is not None
    assert moe.gate.weight.grad.abs().max() > 0


def test_autocast_leaves_the_router_in_fp32() -> None:
    moe, x = build(CONFIG).float(), draw().float()
    gate = moe(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        low = moe(x)[1]
    assert low.weights.dtype == low.scores.dtype == torch.float32
    assert torch.equal(low.scores, gate.scores)
    assert torch.equal(low.indices, gate.indices)


def test_all_tokens_on_the_same_experts_are_all_served() -> None:
    moe = build(CONFIG)
    x = draw(1, 1).expand(3, 7, 10)
    out, gate = moe(x)
    assert (gate.indices == gate.indices[0]).all()
    torch.testing.assert_close(out, out[:1, :1].expand_as(out), rtol=1e-12, atol=1e-12)
    assert out.abs().amax(-1).min() > 0


def test_no_weight_goes_without_gradient_when_every_expert_has_tokens() -> None:
    moe = build(CONFIG, bias_scale=0.0)
    out, gate = moe(draw(4, 16))
    assert set(gate.indices.flatten().tolist()) == set(range(8))
    out.square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name
