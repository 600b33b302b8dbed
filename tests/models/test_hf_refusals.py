"""Oracle: the message that names what is wrong, for every damaged, foreign or ill-fitting input; files unchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lightning.models import hf
from ds_lightning.models.hf import load_hf, save_hf
from tests.models.tiny_export import (
    CONFIG,
    assert_same_tensors,
    edit_config,
    edit_tensors,
    quantize_export,
    random_model,
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    save_hf(random_model(), tmp_path / "export")
    return tmp_path / "export"


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
