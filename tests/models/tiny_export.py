"""A tiny model with random weights, its export, and ways to alter the export; FP8 by loops over elements in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.models import DeepSeek

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


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


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
