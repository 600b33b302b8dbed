"""Oracles: the blocks composed by hand, isolated runs of the same tokens, and counts and sizes in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.flops import param_count
from ds_lightning.losses.load_balance import expert_load, sequence_balance_loss
from ds_lightning.losses.next_token import next_token_loss
from ds_lightning.models.deepseek import Block, DeepSeek
from ds_lightning.nn.moe import DeepSeekMoE, Router
from ds_lightning.nn.norm import RMSNorm
from ds_lightning.ops.rope import rope_tables
from ds_lightning.ops.topk_gate import Gate

CONFIG = DeepSeekConfig(
    vocab_size=23,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=24,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=10,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
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


def build(config: DeepSeekConfig = CONFIG) -> DeepSeek:
    torch.manual_seed(0)
    return DeepSeek(config).double()


def tokens(batch: int = 2, seq: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(23, (batch, seq), generator=torch.Generator().manual_seed(seed))


def routers(model: DeepSeek) -> list[Router]:
    """Return the routers in the order of the layers, those of MTP modules last."""
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    return [block.mlp.gate for block in blocks if isinstance(block.mlp, DeepSeekMoE)]


def test_the_model_is_its_blocks_on_a_residual_stream() -> None:
    model, ids = build(), tokens()
    cos, sin = rope_tables(4, 12, 10000.0, None)
    x = model.embed_tokens.weight[ids]
    for block in model.layers:
        assert isinstance(block, Block)
        x = x + block.self_attn(block.input_layernorm(x), cos, sin)
        out = block.mlp(block.post_attention_layernorm(x))
        x = x + (out if isinstance(out, Tensor) else out[0])
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight
    hidden = model(ids)
    torch.testing.assert_close(hidden, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.logits(hidden), expected @ model.lm_head.weight.T, rtol=1e-11, atol=1e-11)


def test_module_names_are_those_of_the_released_weights() -> None:
    names = set(build().state_dict())
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    expected |= {f"mtp.{k}.{name}.weight" for k in range(2) for name in ("enorm", "hnorm", "eh_proj", "norm")}
    for block in ("layers.0", "layers.1", "layers.2", "mtp.0.block", "mtp.1.block"):
        expected |= {f"{block}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{block}.self_attn.{name}.weight" for name in attention.split()}
        feed_forward = [f"{block}.mlp"] if block == "layers.0" else [f"{block}.mlp.shared_experts"]
        if block != "layers.0":
            expected |= {f"{block}.mlp.gate.weight", f"{block}.mlp.gate.e_score_correction_bias"}
            expected |= {f"{block}.mlp.experts.gate_up_proj", f"{block}.mlp.experts.down_proj"}
        expected |= {f"{part}.{name}_proj.weight" for part in feed_forward for name in ("gate", "up", "down")}
    assert names == expected


def test_a_token_changes_nothing_before_it_and_something_after() -> None:
    model, ids = build(), tokens()
    before = model(ids)
    for position in (0, 5, 11):
        changed = ids.clone()
        changed[:, position] = (ids[:, position] + 1) % 23
        difference = (model(changed) - before).abs().amax(-1)
        # rows may be summed in another order where routing changed
        assert (difference[:, :position] < 1e-12).all()
        assert (difference[:, position:] > 1e-6).all()


def test_documents_in_one_row_are_as_if_alone() -> None:
    model, ids = build(), tokens(batch=1)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    together = model(ids, segment_ids=segments)
    for start, end in ((0, 5), (5, 9), (9, 12)):
        alone = model(ids[:, start:end])
        # rotary tables are rounded to fp32, so that equal distances at other positions agree to about 1e-6
        torch.testing.assert_close(together[:, start:end], alone, rtol=1e-5, atol=1e-5)
    assert (model(ids) - together).abs().amax(-1)[0, 5:].min() > 1e-3  # the mask did something


def loss_of(model: DeepSeek, ids: Tensor, gates: list[Gate]) -> Tensor:
    hidden = model(ids, gates=gates)
    states = [hidden, *model.mtp_hidden(ids, hidden, gates=gates)]
    loss = sum((next_token_loss(state, model.lm_head.weight, ids) for state in states), torch.zeros(()))
    return loss + 0.1 * sum(sequence_balance_loss(gate.scores, 2, seq_len=ids.shape[1]) for gate in gates)


def test_recomputation_changes_no_bit_and_records_no_routing_twice() -> None:
    runs: list[Any] = []
    for recompute in (False, True):
        model = build().float()
        model.recompute = recompute
        calls = [0]
        model.layers[1].register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        gates: list[Gate] = []
        loss = loss_of(model, tokens(), gates)
        loss.backward()
        runs.append((loss.detach(), [parameter.grad for parameter in model.parameters()], gates))
        assert calls[0] == 1 + recompute
        assert len(gates) == CONFIG.num_moe_layers
    (loss, gradients, gates), (loss_again, gradients_again, gates_again) = runs
    assert torch.equal(loss, loss_again)
    for one, other in zip(gradients, gradients_again, strict=True):
        assert one is not None
        assert torch.equal(one, other)
    for gate, gate_again in zip(gates, gates_again, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(gate, gate_again, strict=True))


def test_recomputation_leaves_evaluation_alone() -> None:
    model = build()
    model.recompute = True
    with torch.no_grad():
        assert torch.equal(model(tokens()), build()(tokens()))


def test_gates_come_in_the_order_of_the_layers_mtp_modules_last() -> None:
    model, ids = build(), tokens()
    decided: dict[int, Gate] = {}
    for place, router in enumerate(routers(model)):
        router.register_forward_hook(lambda *args, place=place: decided.__setitem__(place, args[2]))
    gates: list[Gate] = []
    model.mtp_hidden(ids, model(ids, gates=gates), gates=gates)
    assert len(gates) == len(decided) == CONFIG.num_moe_layers == 4
    for place, gate in enumerate(gates):
        assert gate.indices is decided[place].indices
        assert gate.weights.grad_fn is not None
        assert gate.scores.grad_fn is not None


def test_no_token_is_dropped() -> None:
    gates: list[Gate] = []
    build()(tokens(3, 20), gates=gates)
    assert len(gates) == 2
    for gate in gates:
        assert float(expert_load(gate.indices, 8).sum()) == 3 * 20 * 2
        assert all(len(set(row)) == 2 for row in gate.indices.tolist())


def test_a_selection_bias_sends_every_token_to_its_expert_and_no_gradient_reaches_it() -> None:
    model, ids = build(), tokens()
    for router in routers(model):
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias[6] = 50.0
    gates: list[Gate] = []
    model(ids, gates=gates).sum().backward()
    for gate in gates:
        assert (gate.indices[:, 0] == 6).all()
        assert (gate.weights < 2.5).all()  # a gate value that held the bias would be next to 2.5 or 0
        assert (gate.weights > 0.1).all()
    assert all(router.e_score_correction_bias.grad is None for router in routers(model))  # type: ignore[union-attr]


def test_tied_embeddings_are_one_weight_that_learns_from_both_ends() -> None:
    model, ids = build(replace(CONFIG, tie_word_embeddings=True)), tokens()
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    loss = next_token_loss(model(ids), model.lm_head.weight, ids.roll(-1, 1))
    (both,) = torch.autograd.grad(loss, model.embed_tokens.weight)
    untied = build(replace(CONFIG, num_nextn_predict_layers=0))
    untied.load_state_dict(model.state_dict(), strict=False)
    loss = next_token_loss(untied(ids), untied.lm_head.weight, ids.roll(-1, 1))
    ends = torch.autograd.grad(loss, (untied.embed_tokens.weight, untied.lm_head.weight))
    torch.testing.assert_close(both, ends[0] + ends[1], rtol=1e-10, atol=1e-12)
    assert build().lm_head.weight is not build().embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_start_normal_norms_at_one_and_biases_at_zero(tied: bool) -> None:
    torch.manual_seed(0)
    wide = replace(CONFIG, vocab_size=500, hidden_size=64, initializer_range=0.006, tie_word_embeddings=tied)
    model = DeepSeek(wide)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert len(norms) == 1 + 4 * 5 + 3 * 2  # final; two and two latent ones a block; three a module
    for name, parameter in model.named_parameters():
        if name in norms:
            assert (parameter == 1).all(), name
            continue
        # five standard errors of a standard deviation, and of a mean, of that many draws
        assert abs(float(parameter.std()) / 0.006 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
        assert abs(float(parameter.mean())) < 5 * 0.006 / parameter.numel() ** 0.5, name
    for router in routers(model):
        assert router.e_score_correction_bias is not None
        assert router.e_score_correction_bias.dtype == torch.float32
        assert (router.e_score_correction_bias == 0).all()


def test_the_same_seed_gives_the_same_weights() -> None:
    one, other = build().state_dict(), build().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rotary_tables_are_exact_whatever_precision_the_model_is_cast_to() -> None:
    yarn = RopeScaling(factor=4.0, original_max_position_embeddings=16)
    model = build(replace(CONFIG, rope_scaling=yarn)).to(torch.bfloat16)
    seen: list[Tensor] = []
    model.get_submodule("layers.0.self_attn").register_forward_pre_hook(lambda _, args: seen.extend(args[1:3]))
    hidden = model(tokens(1, 64))
    assert hidden.dtype == torch.bfloat16
    for actual, expected in zip(seen, rope_tables(4, 64, 10000.0, yarn), strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)
    assert not [name for name, _ in model.named_buffers() if "e_score_correction_bias" not in name]


def test_a_longer_sequence_after_a_shorter_one_is_as_if_it_came_first() -> None:
    model = build()
    model(tokens(1, 3))
    assert torch.equal(model(tokens(1, 30)), build()(tokens(1, 30)))
    assert torch.equal(model(tokens(1, 3)), build()(tokens(1, 3)))


def test_training_after_a_validation_in_inference_mode_works() -> None:
    model = build()
    with torch.inference_mode():
        model(tokens())
    model(tokens()).sum().backward()
    assert model.embed_tokens.weight.grad is not None


def test_a_sequence_longer_than_the_tables_is_refused() -> None:
    model = build()
    assert model(tokens(1, 64)).shape == (1, 64, 16)
    with pytest.raises(
        ValueError, match=r"^a sequence of 65 tokens is longer than max_position_embeddings \(64\): sho"
    ):
        model(tokens(1, 65))
    with pytest.raises(ValueError, match=r"longer than max_position_embeddings \(64\)"):
        model.mtp_hidden(tokens(1, 65), torch.zeros(1, 65, 16, dtype=torch.float64))


def test_autocast_keeps_gradients_in_fp32_and_stays_near_the_truth() -> None:
    dense = replace(CONFIG, n_routed_experts=0, n_group=1, topk_group=1, num_experts_per_tok=0)
    for config in (dense, CONFIG):
        truth, model = build(config), build(config).float()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(tokens())
            loss_of(model, tokens(), []).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
        if config is dense:  # where nothing is routed, nothing can be routed differently
            error = (hidden.double() - truth(tokens())).norm() / truth(tokens()).norm()
            assert 1e-5 < error < 0.03  # three layers, each with some ten roundings to 8 bits


def test_one_token_and_a_dense_model_run() -> None:
    assert build()(tokens(1, 1)).isfinite().all()
    gates: list[Gate] = []
    dense = build(replace(CONFIG, n_routed_experts=0, n_group=1, topk_group=1, num_experts_per_tok=0))
    assert dense(tokens(), gates=gates).isfinite().all()
    assert gates == []


def size(model: nn.Module) -> int:
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return sum(tensor.numel() for tensor in [*model.parameters(), *biases])


def test_v3_has_671_026_419_200_parameters() -> None:
    with torch.device("meta"):
        model = DeepSeek(V3)
    assert size(model) - size(model.mtp) == 671_026_419_200 == param_count(V3)
    assert size(model) == param_count(V3, include_mtp=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_model_has_the_parameters_of_the_closed_form(data: st.DataObject) -> None:
    def whole(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    n_group, per_group = whole(1, 3), whole(2, 3)
    config = DeepSeekConfig(
        vocab_size=whole(1, 9),
        hidden_size=whole(1, 9),
        num_hidden_layers=whole(1, 4),
        intermediate_size=whole(1, 9),
        num_attention_heads=whole(1, 3),
        q_lora_rank=data.draw(st.none() | st.integers(1, 5)),
        kv_lora_rank=whole(1, 5),
        qk_nope_head_dim=whole(1, 5),
        qk_rope_head_dim=2 * whole(1, 3),
        v_head_dim=whole(1, 5),
        n_routed_experts=n_group * per_group * whole(0, 1),
        n_shared_experts=whole(0, 3),
        num_experts_per_tok=1,
        moe_intermediate_size=whole(1, 5),
        first_k_dense_replace=whole(0, 6),
        n_group=n_group,
        topk_method=data.draw(st.sampled_from(["noaux_tc", "greedy", "group_limited_greedy"])),
        num_nextn_predict_layers=whole(0, 3),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    with torch.device("meta"):
        model = DeepSeek(config)
    assert size(model) == param_count(config, include_mtp=True)
    assert size(model) - size(model.mtp) == param_count(config)
