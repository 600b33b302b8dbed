"""Exchange with Hugging Face checkpoints: the names, shards and precisions of DeepSeek's released weights.

In memory the experts of a layer are fused; on disk each has tensors of its own. Both directions walk over the same
list of names and the parts of the model's memory that hold them.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models.deepseek import DeepSeek
from ds_lightning.models.hf_config import (
    CHAT_TEMPLATE,
    as_json,
    config_values,
    read_config,
    read_json_object,
    tokenizer_files,
)
from ds_lightning.nn.moe import Router
from ds_lightning.ops.fp8 import dequantize_blocks, scale_shape

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BIAS = "e_score_correction_bias"
_SCALE = "_scale_inv"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_hf(
    model: DeepSeek,
    folder: str | Path,
    *,
    tokenizer_file: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that transformers, vLLM, SGLang and :func:`load_hf` read.

    The folder appears under its name only when everything in it is on disk. Tensors are converted and written one at
    a time. Multi-token prediction modules lie under ``model.layers.{num_hidden_layers + k}`` with copies of the
    embedding and the head, as DeepSeek released them. A model that no Hugging Face class computes (softmax scores
    with a selection bias, for example) gets a ``model_type`` of its own, which other readers refuse.

    Args:
        model: What to write, on any device.
        folder: Where to; made, with its parents.
        tokenizer_file: A ``tokenizer.json`` to put beside the weights, with the ``chat_template.jinja`` in its folder.
        dtype: Of the weights on disk; none: as they are. The selection bias is fp32 always.
        max_shard_bytes: Largest file of weights, unless one tensor is larger.
        eos_token_id: Token that ends a generated text.
        pad_token_id: Token that fills up batches.
        overwrite: Replace an earlier export of the same architecture.

    Raises:
        ValueError: If ``folder`` holds anything but an earlier export that may be replaced, or an argument is wrong.
        OSError: If a file cannot be written. ``folder`` is then as it was.
    """
    folder = Path(folder).resolve()
    kept = model.embed_tokens.weight.dtype if dtype is None else dtype
    if kept not in _DTYPES:
        raise ValueError(f"dtype is {kept}, expected one of {', '.join(map(str, _DTYPES))}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    texts = _companions(model.config, kept, tokenizer_file, eos_token_id, pad_token_id)
    _check_target(folder, model.config, overwrite)

    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_weights(model, staging, dtype, max_shard_bytes)
        for name, text in texts.items():
            _write_text(staging / name, text)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32) -> DeepSeek:
    """Read a model from a folder in Hugging Face layout, into CPU memory.

    Reads ``config.json`` and safetensors only. Block-scaled FP8 weights are dequantised. Names, shapes and types of
    all tensors are checked before the first is read. transformers saves the number of multi-token prediction modules
    without their weights: such a model comes back without the modules, and a warning says so.

    Args:
        folder: The checkpoint.
        dtype: Of the weights in memory. The selection bias is fp32 always.

    Raises:
        ValueError: If the folder holds no safetensors, a file is damaged, the model is of another family, or tensors
            are missing, unknown, of a wrong shape or of a wrong type.
        FileNotFoundError: If there is no ``config.json``.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    config, values = read_config(folder / "config.json")
    with ExitStack() as stack:
        files = _open_tensors(folder, stack)
        config = _without_absent_mtp(config, files, folder)
        with torch.device("meta"):
            model = DeepSeek(config).to(dtype)
            for module in model.modules():
                if isinstance(module, Router) and module.e_score_correction_bias is not None:
                    module.e_score_correction_bias = module.e_score_correction_bias.float()
        block = _check_tensors(model, files, values, folder)
        model.to_empty(device="cpu")
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        for name, part in _tensors(model):
            part.copy_(_read(name, files, block))
        for name, part in _copies(model):
            if name in files and not torch.equal(_read(name, files, block).to(part.dtype), part):
                raise ValueError(
                    f"{folder}: {name} differs from the weight that it is a copy of, expected equal values"
                )
    return model


def _tensors(model: DeepSeek) -> Iterator[tuple[str, Tensor]]:
    """Yield each name on disk with the part of the model's memory that belongs to it; copies are not among them."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        on_disk = _disk_name(name, model.config.num_hidden_layers)
        prefix, _, fused = on_disk.rpartition(".")
        if fused == "gate_up_proj":
            for expert, weights in enumerate(tensor):
                gate, up = weights.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
        elif fused == "down_proj":
            for expert, weights in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", weights
        else:
            yield on_disk, tensor


def _copies(model: DeepSeek) -> Iterator[tuple[str, Tensor]]:
    """Yield the names under which shared weights are repeated on disk; files may lack them."""
    if model.config.tie_word_embeddings:
        yield "lm_head.weight", model.embed_tokens.weight.detach()
    for depth in range(model.config.num_nextn_predict_layers):
        prefix = f"model.layers.{model.config.num_hidden_layers + depth}"
        yield f"{prefix}.embed_tokens.weight", model.embed_tokens.weight.detach()
        yield f"{prefix}.shared_head.head.weight", model.lm_head.weight.detach()


def _disk_name(name: str, layers: int) -> str:
    """Translate a name of the state dict, fused experts still fused."""
    if name.startswith("lm_head."):
        return name
    if not name.startswith("mtp."):
        return f"model.{name}"
    _, depth, rest = name.split(".", 2)
    rest = "shared_head.norm.weight" if rest == "norm.weight" else rest.removeprefix("block.")
    return f"model.layers.{layers + int(depth)}.{rest}"


def _companions(
    config: DeepSeekConfig,
    dtype: torch.dtype,
    tokenizer_file: str | Path | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> dict[str, str]:
    """Return the texts of the files beside the weights."""
    generation = {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    texts = {
        "config.json": as_json(config_values(config, dtype, eos_token_id, pad_token_id)),
        "generation_config.json": as_json(generation),
    }
    if tokenizer_file is not None:
        texts |= tokenizer_files(Path(tokenizer_file), config, eos_token_id, pad_token_id)
    return texts


def _check_target(folder: Path, config: DeepSeekConfig, overwrite: bool) -> None:
    """Refuse to replace anything but an export of the same architecture, and that only where told to."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to export to")
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return
    if not overwrite:
        raise ValueError(f"{folder} is not empty ({names[0]}), expected a new folder; overwrite replaces an export")
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", _WEIGHTS, _INDEX}
    own |= {"special_tokens_map.json", CHAT_TEMPLATE}
    foreign = [name for name in names if name not in own and not _is_shard(name)]
    if foreign or "config.json" not in names:
        what = f"{foreign[0]}, which no export writes" if foreign else "no config.json"
        raise ValueError(f"{folder} holds {what}, expected an earlier export to overwrite")
    present = config_values(read_config(folder / "config.json")[0], torch.float32, None, None)
    wanted = config_values(config, torch.float32, None, None)
    for key, value in wanted.items():
        if present[key] != value:
            raise ValueError(f"{folder} holds a model with {key} {present[key]}, expected {value} to overwrite it")


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")


def _write_weights(model: DeepSeek, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Write one file of weights, or several and an index."""
    shards: list[dict[str, tuple[Tensor, torch.dtype]]] = [{}]
    filled, total = 0, 0
    for name, tensor in [*_tensors(model), *_copies(model)]:
        kept = tensor.dtype if dtype is None or name.endswith(_BIAS) else dtype
        size = tensor.numel() * kept.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (tensor, kept)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        _write_shard(folder / _WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_text(folder / _INDEX, as_json(index))


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_shard(path: Path, shard: Mapping[str, tuple[Tensor, torch.dtype]]) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    The library's own writer wants all tensors of a file at once, and none that share memory as fused experts do.
    """
    ordered = sorted(shard.items(), key=lambda item: -item[1][1].itemsize)  # readers want each tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (tensor, dtype) in ordered:
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, (tensor, dtype) in ordered:
            values = tensor.detach().to("cpu", dtype).contiguous()
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _publish(staging: Path, folder: Path) -> None:
    """Give a finished folder its name; an earlier export is moved aside first and deleted last."""
    earlier = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(earlier)
    try:
        staging.rename(folder)
    except OSError:
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Return the open file of each tensor in the checkpoint."""
    if (folder / _WEIGHTS).is_file():
        file = _open(folder / _WEIGHTS, stack)
        return dict.fromkeys(file.keys(), file)
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        found = f"{pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
        raise ValueError(f"{folder} holds {found}, expected {_WEIGHTS} or {_INDEX}")
    weight_map = read_json_object(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} has no weight_map, expected one that names the file of each tensor")
    opened: dict[str, Any] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / _INDEX} names the file {name!r}, expected a .safetensors file beside it")
        opened[name] = _open(folder / name, stack)
    inside = {name: set(file.keys()) for name, file in opened.items()}
    lost = [f"{tensor} in {name}" for tensor, name in weight_map.items() if tensor not in inside[name]]
    if lost:
        raise ValueError(f"{folder / _INDEX} names {_some(lost)}, expected tensors that are there")
    return {tensor: opened[name] for tensor, name in weight_map.items()}


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, expected every file that the index names") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}), expected a complete safetensors file") from None


def _without_absent_mtp(config: DeepSeekConfig, files: Mapping[str, Any], folder: Path) -> DeepSeekConfig:
    """Drop announced multi-token prediction modules of which the files have not one tensor."""
    announced = config.num_nextn_predict_layers
    prefixes = tuple(f"model.layers.{config.num_hidden_layers + depth}." for depth in range(announced))
    if not announced or any(name.startswith(prefixes) for name in files):
        return config
    warnings.warn(
        f"{folder}: num_nextn_predict_layers is {announced} but the files have no such weights; loading without",
        stacklevel=3,
    )
    return replace(config, num_nextn_predict_layers=0)


def _check_tensors(
    model: DeepSeek, files: Mapping[str, Any], values: Mapping[str, Any], folder: Path
) -> tuple[int, int]:
    """Hold names, shapes and types of the files against the model; return the block of FP8 scales."""
    shapes = {name: list(part.shape) for name, part in _tensors(model)}
    missing = [name for name in shapes if name not in files]
    if missing:
        raise ValueError(f"{folder} lacks {_some(missing)}, expected the tensors of its config.json")
    shapes |= {name: list(part.shape) for name, part in _copies(model) if name in files}
    scaled = {name for name, shape in shapes.items() if len(shape) == 2 and name + _SCALE in files}
    block = _fp8_block(values, folder) if scaled else (1, 1)

    known = {*shapes, *(name + _SCALE for name in scaled)}
    unknown = [name for name in files if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise ValueError(f"{folder} has {_some(unknown)}, expected only the tensors of its config.json")
    wrong = []
    for name, shape in shapes.items():
        part = files[name].get_slice(name)
        found, kind = part.get_shape(), part.get_dtype()
        kinds = ("F8_E4M3",) if name in scaled else tuple(_DTYPES.values())
        if found != shape:
            wrong.append(f"{name} with the shape {found} instead of {shape}")
        elif kind not in kinds:
            wrong.append(f"{name} of type {kind} instead of {' or '.join(kinds)}")
        elif name in scaled:
            found = files[name + _SCALE].get_slice(name + _SCALE).get_shape()
            expected = list(scale_shape(shape[0], shape[1], block))
            if found != expected:
                wrong.append(f"{name}{_SCALE} with the shape {found} instead of {expected}")
    if wrong:
        raise ValueError(f"{folder} has {_some(wrong)}, expected what its config.json says")
    return block


def _fp8_block(values: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Return rows and columns that share a scale, from ``quantization_config``."""
    settings = values.get("quantization_config") or {}
    match settings.get("quant_method"), settings.get("weight_block_size"):
        case "fp8", [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(
        f"{folder / 'config.json'}: quantization_config is {settings}, expected quant_method 'fp8' and "
        "weight_block_size [rows, columns], since the weights have scales"
    )


def _read(name: str, files: Mapping[str, Any], block: tuple[int, int]) -> Tensor:
    """Read one tensor, dequantised where it has scales."""
    tensor: Tensor = files[name].get_tensor(name)
    if name + _SCALE not in files:
        return tensor
    return dequantize_blocks(tensor, files[name + _SCALE].get_tensor(name + _SCALE), block)


def _some(names: list[str]) -> str:
    """Name the first few of a list, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more (of {len(names)})"
