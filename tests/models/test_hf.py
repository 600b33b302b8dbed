"""Oracles: the safetensors library, names spelled out by hand, loops for FP8, and the model that was saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ds_lightning.data.corpus import Document
from ds_lightning.data.tokenizer import END_OF_TEXT, PAD, load_tokenizer, special_id, train_tokenizer
from ds_lightning.models.hf import load_hf, save_hf
from tests.models.tiny_export import (
    CONFIG,
    assert_same_tensors,
    edit_tensors,
    quantize_export,
    random_model,
)

ATTENTION = {
    "self_attn.q_a_proj.weight": (6, 8),
    "self_attn.q_a_layernorm.weight": (6,),
    "self_attn.q_b_proj.weight": (12, 6),
    "self_attn.kv_a_proj_with_mqa.weight": (7, 8),
    "self_attn.kv_a_layernorm.weight": (5,),
    "self_attn.kv_b_proj.weight": (14, 5),
    "self_attn.o_proj.weight": (8, 6),
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
}
DENSE = {"mlp.gate_proj.weight": (12, 8), "mlp.up_proj.weight": (12, 8), "mlp.down_proj.weight": (8, 12)}
EXPERTS = {
    "mlp.gate.weight": (4, 8),
    "mlp.gate.e_score_correction_bias": (4,),
    "mlp.shared_experts.gate_proj.weight": (14, 8),
    "mlp.shared_experts.up_proj.weight": (14, 8),
    "mlp.shared_experts.down_proj.weight": (8, 14),
    **{f"mlp.experts.{expert}.gate_proj.weight": (7, 8) for expert in range(4)},
    **{f"mlp.experts.{expert}.up_proj.weight": (7, 8) for expert in range(4)},
    **{f"mlp.experts.{expert}.down_proj.weight": (8, 7) for expert in range(4)},
}
MTP = {
    "enorm.weight": (8,),
    "hnorm.weight": (8,),
    "eh_proj.weight": (8, 16),
    "shared_head.norm.weight": (8,),
    "shared_head.head.weight": (20, 8),
    "embed_tokens.weight": (20, 8),
}
RELEASED = {
    "model.embed_tokens.weight": (20, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
    **{f"model.layers.0.{name}": shape for name, shape in (ATTENTION | DENSE).items()},
    **{f"model.layers.1.{name}": shape for name, shape in (ATTENTION | EXPERTS).items()},
    **{f"model.layers.2.{name}": shape for name, shape in (ATTENTION | EXPERTS | MTP).items()},
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    save_hf(random_model(), tmp_path / "export")
    return tmp_path / "export"


def test_names_and_shapes_on_disk_are_the_released_ones(export: Path) -> None:
    with safe_open(export / "model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == RELEASED  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in export.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_fused_experts_and_shared_weights_land_under_the_right_names(export: Path) -> None:
    model, on_disk = random_model(), load_file(export / "model.safetensors")
    state = model.state_dict()
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(on_disk[f"{name}.gate_proj.weight"], state["layers.1.mlp.experts.gate_up_proj"][expert, :7])
        assert torch.equal(on_disk[f"{name}.up_proj.weight"], state["layers.1.mlp.experts.gate_up_proj"][expert, 7:])
        assert torch.equal(on_disk[f"{name}.down_proj.weight"], state["layers.1.mlp.experts.down_proj"][expert])
    assert torch.equal(on_disk["model.layers.2.shared_head.norm.weight"], state["mtp.0.norm.weight"])
    assert torch.equal(on_disk["model.layers.2.shared_head.head.weight"], state["lm_head.weight"])
    assert torch.equal(on_disk["model.layers.2.embed_tokens.weight"], state["embed_tokens.weight"])
    assert torch.equal(on_disk["model.layers.2.input_layernorm.weight"], state["mtp.0.block.input_layernorm.weight"])


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 2_000, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_is_exact(max_shard_bytes: int, tied: bool, tmp_path: Path) -> None:
    model = random_model(replace(CONFIG, tie_word_embeddings=tied, num_nextn_predict_layers=2))
    save_hf(model, tmp_path / "export", max_shard_bytes=max_shard_bytes)
    loaded = load_hf(tmp_path / "export")
    assert_same_tensors(model, loaded)
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_shards_and_index_agree_with_each_other_and_the_limit(tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "export", max_shard_bytes=2_000)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 3
    assert files[1].name == f"model-00002-of-{len(files):05d}.safetensors"
    sizes = {path.name: {n: t.numel() * t.itemsize for n, t in load_file(path).items()} for path in files}
    assert index["weight_map"] == {name: file for file, tensors in sizes.items() for name in tensors}
    assert index["metadata"] == {"total_size": sum(sum(tensors.values()) for tensors in sizes.values())}
    assert all(sum(tensors.values()) <= 2_000 for tensors in sizes.values())


def test_a_tied_head_is_written_for_readers_that_do_not_tie(tmp_path: Path) -> None:
    model = random_model(replace(CONFIG, tie_word_embeddings=True))
    save_hf(model, tmp_path / "export")
    assert torch.equal(
        load_file(tmp_path / "export" / "model.safetensors")["lm_head.weight"], model.embed_tokens.weight
    )
    edit_tensors(tmp_path / "export", **{"lm_head.weight": None})
    assert_same_tensors(model, load_hf(tmp_path / "export"))


def test_bf16_on_disk_and_in_memory_keeps_selection_biases_in_fp32(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path / "export", dtype=torch.bfloat16)
    on_disk = load_file(tmp_path / "export" / "model.safetensors")
    for name, tensor in on_disk.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    assert json.loads((tmp_path / "export" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_hf(tmp_path / "export", torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected), name


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 500])
def test_every_tensor_in_a_file_is_aligned_to_its_type(max_shard_bytes: int, tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "export", dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes)
    for path in (tmp_path / "export").glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]
        for name, entry in header.items():
            assert entry["data_offsets"][0] % {"BF16": 2, "F32": 4}[entry["dtype"]] == 0, name


def test_config_json_has_the_keys_that_readers_miss_silently(export: Path) -> None:
    values = json.loads((export / "config.json").read_text())
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float32",
    }
    assert {key: values[key] for key in expected} == expected
    assert values["rope_scaling"] == {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "deepseek_v3"),
        ({"n_routed_experts": 0, "scoring_func": "softmax"}, "deepseek_v3"),
        ({"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}, "deepseek_v2"),
        ({"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}, "deepseek_v2"),
        ({"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": True}, "ds_lightning"),
        (
            {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "num_attention_heads": 3},
            "ds_lightning",
        ),
        ({"scoring_func": "softmax"}, "ds_lightning"),
        ({"topk_method": "greedy"}, "ds_lightning"),
    ],
)
def test_a_model_gets_the_type_whose_classes_compute_it(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config = replace(CONFIG, **changes)
    save_hf(random_model(config), tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["model_type"] == expected
    assert_same_tensors(random_model(config), load_hf(tmp_path / "export"))


def test_groups_that_greedy_routing_ignores_are_not_written(tmp_path: Path) -> None:
    config = replace(CONFIG, scoring_func="softmax", topk_method="greedy", n_group=2, topk_group=2)
    save_hf(random_model(config), tmp_path / "export")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (values["n_group"], values["topk_group"]) == (1, 1)


def test_transformers_reads_the_tokenizer_and_encodes_identically(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = "for name, tensor in model.items(): print(name, tensor.shape)\n" * 20
    trained = train_tokenizer([Document("a", text)], 300)
    trained.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    end, pad = special_id(ours, END_OF_TEXT), special_id(ours, PAD)
    save_hf(
        random_model(replace(CONFIG, vocab_size=300)),
        tmp_path / "export",
        tokenizer_file=tmp_path / "tokenizer.json",
        eos_token_id=end,
        pad_token_id=pad,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for sample in (text, "  leading, na\u00efve \u4f60\u597d \n\n\t x==1.25 ", ""):
        assert theirs.encode(sample) == ours.encode(sample).ids
        assert theirs.decode(theirs.encode(sample)) == sample
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, end)
    assert (theirs.pad_token, theirs.pad_token_id) == (PAD, pad)
    assert theirs.encode("a<think>b")[1] == special_id(ours, "<think>")
    assert theirs.model_max_length == 64
    assert "<think>" not in theirs.decode(theirs.encode("a<think>b"), skip_special_tokens=True)
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == end


def test_a_block_scaled_fp8_checkpoint_is_dequantized(export: Path, tmp_path: Path) -> None:
    meant = quantize_export(export, (4, 3))
    original = load_file(export / "model.safetensors")
    assert sum(name.endswith("_scale_inv") for name in original) == 3 + 12 + 12 + 3 * 5 + 2 * 3
    save_hf(load_hf(export), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(again[name], tensor), name


def test_frequencies_that_old_checkpoints_carry_are_passed_over(export: Path) -> None:
    edit_tensors(export, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)})
    assert_same_tensors(random_model(), load_hf(export))


def test_copies_of_embedding_and_head_may_be_absent(export: Path) -> None:
    edit_tensors(export, **{"model.layers.2.embed_tokens.weight": None, "model.layers.2.shared_head.head.weight": None})
    assert_same_tensors(random_model(), load_hf(export))


def test_loading_computes_no_init(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plain = Tensor.normal_

    def normal(self: Tensor, *rest: Any, **settings: Any) -> Tensor:
        drawn.append(self.device.type)
        return plain(self, *rest, **settings)

    monkeypatch.setattr(Tensor, "normal_", normal)
    load_hf(export)
    assert set(drawn) == {"meta"}
