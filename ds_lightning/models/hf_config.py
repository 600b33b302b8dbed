"""The JSON files beside exported weights: what transformers, vLLM and SGLang read to build the model and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.ops.rope import yarn_temperature

OWN_MODEL_TYPE = "ds_lightning"
"""``model_type`` of a model that no Hugging Face class computes: other readers refuse it, rather than run another."""

CHAT_TEMPLATE = "chat_template.jinja"

_READABLE = ("deepseek_v3", "deepseek_v2", "kimi_k2", OWN_MODEL_TYPE)
_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    OWN_MODEL_TYPE: "DeepSeek",
}


def model_type(config: DeepSeekConfig) -> str:
    """Return the Hugging Face family whose classes compute exactly this model.

    ``deepseek_v3`` has sigmoid scores with a selection bias; ``deepseek_v2`` has softmax scores, no bias, gate values
    that are not normalised, and heads that divide the hidden size.
    """
    if not config.n_routed_experts:
        return "deepseek_v3"
    routing = (config.scoring_func, config.topk_method)
    if routing == ("sigmoid", "noaux_tc"):
        return "deepseek_v3"
    is_v2 = routing in (("softmax", "greedy"), ("softmax", "group_limited_greedy"))
    if is_v2 and not config.norm_topk_prob and config.hidden_size % config.num_attention_heads == 0:
        return "deepseek_v2"
    return OWN_MODEL_TYPE


def config_values(
    config: DeepSeekConfig, dtype: torch.dtype, eos_token_id: int | None, pad_token_id: int | None
) -> dict[str, Any]:
    """Return the keys of ``config.json``, those of DeepSeek's release and those that only some readers need.

    vLLM and SGLang drop the selection bias without ``topk_method`` and use softmax without ``scoring_func``. Readers
    take an absent ``bos_token_id`` or ``eos_token_id`` for their own default, so both are always written.
    """
    kind = model_type(config)
    values = config.to_dict()
    values |= {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "num_key_value_heads": config.num_attention_heads,
        "pretraining_tp": 1,
        "rope_interleave": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if config.topk_method == "greedy":
        values |= {"n_group": 1, "topk_group": 1}  # vLLM limits groups whatever topk_method says
    if not config.n_routed_experts:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        values["first_k_dense_replace"] = max(config.first_k_dense_replace, layers)
    if config.rope_scaling is not None and _transformers_scales_otherwise(config.rope_scaling):
        values["rope_scaling"]["attention_factor"] = _attention_factor(config.rope_scaling)
    return dict(sorted(values.items()))


def read_config(path: Path) -> tuple[DeepSeekConfig, dict[str, Any]]:
    """Read a ``config.json``: the shape, and all keys as they stand.

    Raises:
        ValueError: If it is not JSON, describes a model of another family, or one that this package does not compute.
        FileNotFoundError: If there is no such file.
    """
    values = read_json_object(path)
    kind = values.get("model_type")
    if kind not in _READABLE:
        raise ValueError(f"{path}: model_type is {kind!r}, expected one of {', '.join(_READABLE)}")
    try:
        config = DeepSeekConfig.from_dict(values)
        _check_rope(config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if kind == "deepseek_v2" and config.norm_topk_prob:
        raise ValueError(
            f"{path}: norm_topk_prob is true with model_type deepseek_v2, expected false: readers disagree on it"
        )
    return config, values


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: If it holds something else.
        FileNotFoundError: If there is no such file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


def tokenizer_files(
    path: Path, config: DeepSeekConfig, eos_token_id: int | None, pad_token_id: int | None
) -> dict[str, str]:
    """Return the texts of the files with which ``AutoTokenizer`` rebuilds the tokenizer in ``tokenizer.json``.

    A ``chat_template.jinja`` beside it is among them; ``apply_chat_template`` reads it. Text that spells a special
    token encodes to it there, as chat templates need; everything else encodes as here.

    Raises:
        ValueError: If it is no tokenizer, has more ids than the model has embeddings, or lacks a special id.
        FileNotFoundError: If there is no such file.
    """
    description = read_json_object(path)
    try:
        special = {entry["id"]: entry["content"] for entry in description["added_tokens"] if entry["special"]}
        added = {entry["id"]: entry["content"] for entry in description["added_tokens"]}
        last = max([*description["model"]["vocab"].values(), *added])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer ({error!r}), expected the tokenizer.json of a BPE") from None
    if last >= config.vocab_size:
        raise ValueError(f"{path} has ids up to {last}, expected at most {config.vocab_size - 1} (vocab_size - 1)")
    named: dict[str, Any] = {}
    for name, index in (("eos_token", eos_token_id), ("pad_token", pad_token_id)):
        if index is not None and index not in special:
            raise ValueError(f"{name}_id is {index}, expected one of the special ids of {path}: {sorted(special)}")
        if index is not None:
            named[name] = special[index]
    named["additional_special_tokens"] = [text for text in special.values() if text not in named.values()]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **named,
    }
    template = path.with_name(CHAT_TEMPLATE)
    chat = {CHAT_TEMPLATE: template.read_text(encoding="utf-8")} if template.is_file() else {}
    return {
        **chat,
        "tokenizer.json": path.read_text(encoding="utf-8"),
        "tokenizer_config.json": as_json(settings),
        "special_tokens_map.json": as_json(named),
    }


def as_json(values: dict[str, Any]) -> str:
    """Return readable JSON with a final newline."""
    return json.dumps(values, indent=2) + "\n"


def _attention_factor(scaling: RopeScaling) -> float:
    """Return the factor on cosine and sine, as DeepSeek's released code computes it."""
    rotary = yarn_temperature(scaling.factor, scaling.mscale)
    return rotary / yarn_temperature(scaling.factor, scaling.mscale_all_dim)


def _transformers_scales_otherwise(scaling: RopeScaling) -> bool:
    """Tell whether transformers would ignore ``mscale``: it does where either of the two is zero."""
    return (not scaling.mscale or not scaling.mscale_all_dim) and scaling.mscale != 1


def _check_rope(config: DeepSeekConfig, values: dict[str, Any]) -> None:
    """Refuse the YaRN variants of transformers that DeepSeek's code does not have."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for key, only in (("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(key, only) != only:
            raise ValueError(f"rope {key} is {rope[key]!r}, expected {only!r}: no DeepSeek model has another")
    given = rope.get("attention_factor")
    if given is None:
        return
    expected = 1.0 if config.rope_scaling is None else _attention_factor(config.rope_scaling)
    if abs(given - expected) > 1e-6:
        raise ValueError(f"rope attention_factor is {given}, expected {expected}, which mscale and factor give")
