"""Oracles: the safetensors library, names spelled out by hand, NumPy loops for FP8, and the model that was saved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.data.corpus import Document
from ds_lightning.data.tokenizer import END_OF_TEXT, PAD, load_tokenizer, special_id, train_tokenizer
from ds_lightning.models import DeepSeek, hf
from ds_lightning.models.hf import load_hf, save_hf

CONFIG = DeepSeekConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    intermediate_size=12,
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
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=0.7),
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


def random_model(config: DeepSeekConfig = CONFIG) -> DeepSeek:
    """Build a model in which every number differs from every other."""
    torch.manual_seed(0)
    model = DeepSeek(config)
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model


def assert_same_tensors(model: DeepSeek, other: DeepSeek) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def export(tmp_path: Path) -> Path:
    save_hf(random_model(), tmp_path / "export")
    return tmp_path / "export"


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


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
    for sample in (text, "  leading, naïve \u4f60\u597d \n\n\t x==1.25 ", ""):
        assert theirs.encode(sample) == ours.encode(sample).ids
        assert theirs.decode(theirs.encode(sample)) == sample
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, end)
    assert (theirs.pad_token, theirs.pad_token_id) == (PAD, pad)
    assert theirs.encode("a<think>b")[1] == special_id(ours, "<think>")
    assert theirs.model_max_length == 64
    assert "<think>" not in theirs.decode(theirs.encode("a<think>b"), skip_special_tokens=True)
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == end


def quantized_by_loops(weight: np.ndarray[Any, Any], block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return E4M3 bytes, scales, and the weights they stand for, element by element."""
    bits = np.arange(127)
    exponent, mantissa = bits >> 3, bits & 7
    positive = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    rows, columns = weight.shape
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            here = (row // block[0], column // block[1])
            scales[here] = max(scales[here], abs(weight[row, column]) / np.float32(448))
    chosen, meant = np.zeros((rows, columns), dtype=np.uint8), np.zeros((rows, columns), dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row // block[0], column // block[1]]
            nearest = int(np.abs(positive - abs(weight[row, column]) / scale).argmin())
            negative = weight[row, column] < 0
            chosen[row, column] = nearest + 128 * negative
            meant[row, column] = np.float32(positive[nearest] * (-1 if negative else 1)) * scale
    return torch.from_numpy(chosen).view(torch.float8_e4m3fn), torch.from_numpy(scales), torch.from_numpy(meant)


def quantize_export(folder: Path, block: tuple[int, int]) -> dict[str, Tensor]:
    """Make an FP8 checkpoint of an export, as DeepSeek released theirs; return what its weights stand for."""
    tensors = load_file(folder / "model.safetensors")
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        stored[name] = meant[name] = tensor
        kept = ("embed_tokens.weight", "head.weight", "mlp.gate.weight", "eh_proj.weight")
        if tensor.ndim == 2 and not name.endswith(kept):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantized_by_loops(tensor.numpy(), block)
    save_file(stored, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(folder, quantization_config=settings)
    return meant


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


# What a reader refuses.


def test_a_pickled_checkpoint_is_refused(export: Path) -> None:
    (export / "model.safetensors").rename(export / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pytorch_model.bin, a pickle, which can run code when it is read"):
        load_hf(export)


def test_a_folder_without_weights_is_refused(export: Path) -> None:
    (export / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights, expected model.safetensors or model.safetensors.index"):
        load_hf(export)


def test_a_folder_without_config_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds a JSON list, expected an object")])
def test_a_config_that_is_no_json_object_is_refused(text: str, message: str, export: Path) -> None:
    (export / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_hf(export)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"config.json: model_type is 'llama', expected one of deepseek_v3, deepseek_v2"),
        ({"hidden_act": "gelu"}, r"config.json: hidden_act is 'gelu', expected 'silu'"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob is true with model_type deepseek_v2"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "truncate": False}},
         "rope truncate is False, expected True"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8,
                           "attention_factor": 3.0}},
         r"rope attention_factor is 3.0, expected 1.06931\d*, which mscale and factor give"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(changes: dict[str, Any], message: str, export: Path) -> None:
    edit_config(export, **changes)
    with pytest.raises(ValueError, match=message):
        load_hf(export)


def test_missing_tensors_are_named_and_counted(export: Path) -> None:
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(4)]
    edit_tensors(export, **dict.fromkeys(names))
    with pytest.raises(ValueError, match=r"lacks model.layers.1.mlp.experts.0.up_proj.weight, .* and 1 more \(of 4\)"):
        load_hf(export)


def test_unknown_tensors_are_named(export: Path) -> None:
    edit_tensors(export, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"has model.layers.0.self_attn.q_proj.bias, expected only the tensors of its"):
        load_hf(export)


def test_tensors_of_a_wrong_shape_or_type_are_named(export: Path) -> None:
    edit_tensors(export, **{"model.norm.weight": torch.ones(9), "lm_head.weight": torch.ones(20, 8).int()})
    message = r"model.norm.weight with the shape \[9\] instead of \[8\], lm_head.weight of type I32 instead of F64 or"
    with pytest.raises(ValueError, match=message):
        load_hf(export)


def test_one_missing_mtp_tensor_is_not_taken_for_an_absent_module(export: Path) -> None:
    edit_tensors(export, **{"model.layers.2.hnorm.weight": None})
    with pytest.raises(ValueError, match=r"lacks model.layers.2.hnorm.weight, expected"):
        load_hf(export)


def test_a_copy_that_is_none_is_refused(export: Path) -> None:
    edit_tensors(export, **{"model.layers.2.shared_head.head.weight": torch.zeros(20, 8)})
    with pytest.raises(ValueError, match=r"model.layers.2.shared_head.head.weight differs from the weight that it is"):
        load_hf(export)


def test_fp8_weights_without_scales_are_refused(export: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(export, **{name: torch.zeros(12, 8).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{name} of type F8_E4M3 instead of F64 or"):
        load_hf(export)


def test_scales_of_a_weight_that_is_no_fp8_are_refused(export: Path) -> None:
    quantize_export(export, (4, 3))
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(export, **{name: torch.zeros(12, 8)})
    with pytest.raises(ValueError, match=rf"{name} of type F32 instead of F8_E4M3"):
        load_hf(export)


def test_scales_for_another_block_size_are_refused(export: Path) -> None:
    quantize_export(export, (4, 3))
    edit_config(export, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ValueError, match=r"q_a_proj.weight_scale_inv with the shape \[2, 3\] instead of \[1, 1\]"):
        load_hf(export)


@pytest.mark.parametrize("settings", [None, {"quant_method": "gptq"}, {"quant_method": "fp8"},
                                      {"quant_method": "fp8", "weight_block_size": [0, 128]}])  # fmt: skip
def test_scales_without_a_block_size_are_refused(settings: dict[str, Any] | None, export: Path) -> None:
    quantize_export(export, (4, 3))
    edit_config(export, quantization_config=settings)
    with pytest.raises(
        ValueError, match=r"quantization_config is \{.*\}, expected quant_method 'fp8' and weight_block"
    ):
        load_hf(export)


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(kept_bytes: int, export: Path) -> None:
    data = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(data[:kept_bytes])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*\), expected a complete safetensors file"):
        load_hf(export)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}}, "has no weight_map"),
        (
            {"weight_map": {"lm_head.weight": "../model.safetensors"}},
            r"names the file '../model.safetensors', expected",
        ),
        ({"weight_map": {"lm_head.weight": "model.bin"}}, r"names the file 'model.bin', expected a .safetensors file"),
        (
            {"weight_map": {"lm_head.weight": "absent.safetensors"}},
            r"absent.safetensors does not exist, expected every",
        ),
        ({"weight_map": {"head": "a.safetensors"}}, r"names head in a.safetensors, expected tensors that are there"),
    ],
)
def test_a_wrong_index_is_refused(index: dict[str, Any], message: str, export: Path) -> None:
    (export / "model.safetensors").rename(export / "a.safetensors")
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_hf(export)


def test_a_type_that_weights_cannot_have_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int8, expected one of torch.float64, torch.float32"):
        load_hf(export, torch.int8)
    with pytest.raises(ValueError, match=r"dtype is torch.float8_e4m3fn, expected one of"):
        save_hf(random_model(), tmp_path / "new", dtype=torch.float8_e4m3fn)


# What a writer refuses.


def test_an_occupied_folder_is_refused_and_left_alone(export: Path) -> None:
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    with pytest.raises(ValueError, match=r"export is not empty \(config.json\), expected a new folder"):
        save_hf(random_model(), export)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_an_earlier_export_of_the_same_architecture_is_replaced_where_asked(export: Path) -> None:
    model = random_model()
    model.embed_tokens.weight.data.zero_()
    save_hf(model, export, overwrite=True, max_shard_bytes=2_000)
    assert not (export / "model.safetensors").exists()
    assert_same_tensors(model, load_hf(export))
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_hf(random_model(), tmp_path / "new")
    assert_same_tensors(random_model(), load_hf(tmp_path / "new"))


def test_overwrite_spares_other_models_and_other_files(export: Path, tmp_path: Path) -> None:
    other = random_model(replace(CONFIG, vocab_size=21))
    with pytest.raises(ValueError, match="holds a model with vocab_size 20, expected 21 to overwrite it"):
        save_hf(other, export, overwrite=True)
    (export / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which no export writes, expected an earlier export"):
        save_hf(random_model(), export, overwrite=True)
    (tmp_path / "loose").mkdir()
    shutil.copy(export / "model.safetensors", tmp_path / "loose")
    with pytest.raises(ValueError, match=r"holds no config.json, expected an earlier export to overwrite"):
        save_hf(random_model(), tmp_path / "loose", overwrite=True)
    with pytest.raises(ValueError, match=r"notes.txt is a file, expected a folder to export to"):
        save_hf(random_model(), export / "notes.txt")


def test_a_failed_write_leaves_everything_as_it_was(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in export.iterdir()}

    def full_disk(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(hf, "_write_text", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_hf(random_model(), export, overwrite=True)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_an_earlier_export_comes_back_if_the_new_one_cannot_take_its_name(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        save_hf(random_model(), export, overwrite=True)
    monkeypatch.undo()
    assert_same_tensors(random_model(), load_hf(export))
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_a_shard_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes is 0, expected at least 1"):
        save_hf(random_model(), tmp_path / "new", max_shard_bytes=0)


def tokenizer_with(folder: Path, **changes: Any) -> Path:
    added = [{"id": 5, "content": "<end>", "special": True}, {"id": 6, "content": "plain", "special": False}]
    values = {"added_tokens": added, "model": {"vocab": {"a": 0}}} | changes
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    model, target = random_model(), tmp_path / "new"
    with pytest.raises(ValueError, match=r"tokenizer.json has ids up to 20, expected at most 19 \(vocab_size - 1\)"):
        save_hf(model, target, tokenizer_file=tokenizer_with(tmp_path, model={"vocab": {"a": 20}}))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer \(KeyError\('vocab'\)\), expected"):
        save_hf(model, target, tokenizer_file=tokenizer_with(tmp_path, model={}))
    with pytest.raises(ValueError, match=r"eos_token_id is 6, expected one of the special ids of .*: \[5\]"):
        save_hf(model, target, tokenizer_file=tokenizer_with(tmp_path), eos_token_id=6)
    with pytest.raises(FileNotFoundError):
        save_hf(model, target, tokenizer_file=tmp_path / "absent.json")
    assert not target.exists()
