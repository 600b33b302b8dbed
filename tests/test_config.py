"""Oracles: DeepSeek's released config.json files, written out from their published keys, and the rules themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.config import DeepSeekConfig, RopeScaling

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
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=7,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=2,
)
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=4096)
RELEASED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def released(**changes: Any) -> dict[str, Any]:
    return {**RELEASED_V3, **changes}


def test_the_released_v3_config_is_read_key_by_key() -> None:
    config = DeepSeekConfig.from_dict(RELEASED_V3)
    for key, value in RELEASED_V3.items():
        if hasattr(config, key) and key != "rope_scaling":
            assert getattr(config, key) == value, key
    assert config.rope_scaling == RopeScaling(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    assert config.qk_head_dim == 192
    assert config.num_moe_layers == 59  # 61 - 3 dense + 1 MTP module


def test_whole_numbers_in_json_become_the_floats_that_the_fields_promise() -> None:
    config = DeepSeekConfig.from_dict(RELEASED_V3)
    assert isinstance(config.rope_theta, float)
    assert config.rope_scaling is not None
    assert isinstance(config.rope_scaling.factor, float)


def test_v2_lite_has_no_query_rank_and_softmax_routing() -> None:
    values = released(q_lora_rank=None, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
    config = DeepSeekConfig.from_dict(values)
    assert config.q_lora_rank is None
    assert (config.scoring_func, config.topk_method) == ("softmax", "greedy")


def test_routing_keys_that_a_v2_file_leaves_out_mean_v2_routing() -> None:
    values = released(model_type="deepseek_v2", n_group=None, topk_group=None)
    for key in ("scoring_func", "topk_method", "norm_topk_prob"):
        del values[key]
    config = DeepSeekConfig.from_dict(values)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert (config.n_group, config.topk_group) == (1, 1)


def test_routing_keys_that_a_v3_file_leaves_out_mean_v3_routing() -> None:
    values = released()
    for key in ("scoring_func", "topk_method", "norm_topk_prob"):
        del values[key]
    assert DeepSeekConfig.from_dict(values) == DeepSeekConfig.from_dict(RELEASED_V3)


def test_null_experts_mean_a_dense_model() -> None:
    values = released(n_routed_experts=None, n_shared_experts=None, num_experts_per_tok=None)
    config = DeepSeekConfig.from_dict(values)
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (0, 0, 0)
    assert config.num_moe_layers == 0
    assert not any(config.is_moe_layer(layer) for layer in range(61))


def test_rope_parameters_are_read_where_newer_files_keep_them() -> None:
    values = released(rope_parameters={**RELEASED_V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 50000})
    del values["rope_scaling"], values["rope_theta"]
    del values["rope_parameters"]["type"]
    config = DeepSeekConfig.from_dict(values)
    assert config.rope_theta == 50000.0
    assert config.rope_scaling == YARN


def test_default_rope_parameters_extend_nothing() -> None:
    values = released(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    config = DeepSeekConfig.from_dict(values)
    assert config.rope_scaling is None
    assert config.rope_theta == 20000.0


def test_temperatures_that_a_file_leaves_out_are_those_of_the_released_code() -> None:
    rope = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}
    scaling = DeepSeekConfig.from_dict(released(rope_scaling=rope)).rope_scaling
    assert scaling == RopeScaling(
        factor=4.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0
    )


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, rope_scaling=YARN, q_lora_rank=None, tie_word_embeddings=True),
        replace(TINY, rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.0)),
        replace(TINY, n_routed_experts=0, n_group=1, topk_group=1, num_experts_per_tok=0),
        replace(TINY, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
    ],
    ids=["plain", "yarn", "yarn temperatures", "dense", "v2"],
)
def test_a_config_survives_json(config: DeepSeekConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert DeepSeekConfig.from_json(path) == config


def test_layers_with_experts_begin_after_the_dense_prefix_and_go_on_into_mtp() -> None:
    assert [TINY.is_moe_layer(layer) for layer in range(5)] == [False, True, True, True, True]
    assert TINY.num_moe_layers == 4
    assert replace(TINY, first_k_dense_replace=4).num_moe_layers == 1
    assert replace(TINY, first_k_dense_replace=9).num_moe_layers == 0


def test_as_many_experts_a_token_as_the_groups_allow_are_accepted() -> None:
    assert replace(TINY, num_experts_per_tok=4).num_experts_per_tok == 4
    assert replace(TINY, num_experts_per_tok=8, topk_group=4).num_experts_per_tok == 8
    assert replace(TINY, n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1).num_moe_layers == 4


def changed(config: DeepSeekConfig, **changes: Any) -> DeepSeekConfig:
    return replace(config, **changes)


POSITIVE = (
    "vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings"
)


@pytest.mark.parametrize("name", POSITIVE.split())
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is 0, expected at least 1$"):
        changed(TINY, **{name: 0})


@pytest.mark.parametrize("name", ["num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"])
def test_sizes_of_experts_are_positive_in_a_model_with_experts(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is 0, expected at least 1 in a model with experts$"):
        changed(TINY, **{name: 0})


@pytest.mark.parametrize(
    "name", ["first_k_dense_replace", "num_nextn_predict_layers", "n_routed_experts", "n_shared_experts"]
)
def test_counts_are_not_negative(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is -1, expected at least 0$"):
        changed(TINY, **{name: -1})


@pytest.mark.parametrize("name", ["rms_norm_eps", "initializer_range", "routed_scaling_factor"])
def test_factors_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is 0\.0, expected more than 0$"):
        changed(TINY, **{name: 0.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": 0}, r"^q_lora_rank is 0, expected at least 1 or null$"),
        ({"qk_rope_head_dim": 3}, r"^qk_rope_head_dim is 3, expected an even number$"),
        ({"rope_theta": 1.0}, r"^rope_theta is 1\.0, expected more than 1$"),
        ({"n_group": 3}, r"^n_routed_experts \(8\) is not divisible by n_group \(3\)$"),
        ({"topk_group": 5}, r"^topk_group \(5\) is larger than n_group \(4\)$"),
        ({"num_experts_per_tok": 5}, r"^num_experts_per_tok \(5\) is larger than the 4 experts that topk_group \(2\)"),
        ({"n_group": 8}, r"^n_group \(8\) leaves 1 expert a group, expected at least 2"),
    ],
)
def test_an_impossible_shape_is_named_with_its_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scoring_func", r"^scoring_func is 'best', expected 'sigmoid' or 'softmax'$"),
        ("topk_method", r"^topk_method is 'best', expected 'noaux_tc', 'greedy' or 'group_limited_greedy'$"),
    ],
)
def test_an_unknown_kind_of_routing_is_named(name: str, message: str) -> None:
    config = replace(TINY)
    object.__setattr__(config, name, "best")  # the suite's own type check would refuse it as an argument
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, r"^rope_scaling\.factor is 0\.5, expected at least 1$"),
        ({"original_max_position_embeddings": 0}, r"^rope_scaling\.original_max_position_embeddings is 0, expected at"),
        ({"beta_slow": 32.0}, r"^rope_scaling\.beta_slow is 32\.0, expected between 0 and beta_fast \(32\.0\)$"),
        ({"beta_slow": 0.0}, r"^rope_scaling\.beta_slow is 0\.0, expected between 0 and beta_fast \(32\.0\)$"),
    ],
)
def test_an_impossible_context_extension_is_named_with_its_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(YARN, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, r"^hidden_act is 'gelu', expected 'silu': no DeepSeek model has another$"),
        ({"attention_bias": True}, r"^attention_bias is True, expected False"),
        ({"moe_layer_freq": 2}, r"^moe_layer_freq is 2, expected 1"),
        ({"rope_interleave": False}, r"^rope_interleave is False, expected True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"^rope type is 'linear', expected 'yarn' or 'default'$"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, r"lacks the key rope_scaling\.original_max_position_embed"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "40", "original_max_position_embeddings": 4096}},
            r"^rope_scaling\.factor is '40', expected float$",
        ),
        ({"hidden_size": "7168"}, r"^hidden_size is '7168', expected int$"),
        ({"hidden_size": True}, r"^hidden_size is True, expected int$"),
        ({"hidden_size": 71.5}, r"^hidden_size is 71\.5, expected int$"),
        ({"hidden_size": None}, r"^config\.json lacks the key hidden_size$"),
        ({"q_lora_rank": 1.5}, r"^q_lora_rank is 1\.5, expected int \| None$"),
        ({"norm_topk_prob": 1}, r"^norm_topk_prob is 1, expected bool$"),
    ],
)
def test_a_file_that_describes_another_architecture_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig.from_dict(released(**changes))


@pytest.mark.parametrize("name", ["vocab_size", "kv_lora_rank"])
def test_a_missing_key_is_named(name: str) -> None:
    values = {key: value for key, value in RELEASED_V3.items() if key != name}
    with pytest.raises(ValueError, match=rf"^config\.json lacks the key {name}$"):
        DeepSeekConfig.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json is not JSON: Expecting"),
        (b"\xff\xfe", r"config\.json is not JSON: 'utf-8' codec"),
        (b"[1]", r"config\.json holds a JSON list, expected an object with the model's keys$"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig.from_json(path)


def test_a_missing_file_is_the_file_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        DeepSeekConfig.from_json(tmp_path / "nowhere.json")
