"""Oracles: transformers' own classes on the meta device, and the sizes of the released files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lightning.flops import active_param_count, param_count, train_flops_per_token
from tests.cost.shapes import JSON, SHAPES

transformers = pytest.importorskip("transformers")

PARAMETERS = {
    "DeepSeek-V3": 671_026_419_200,  # arXiv:2412.19437, with the selection biases
    "Kimi-K2": 1_026_408_232_448,
    "Moonlight-16B-A3B": 15_960_110_208,
    "DeepSeek-V2": 235_741_434_880,  # of the released files, as Hugging Face counts them
    "DeepSeek-V2-Lite": 15_706_484_224,  # the same
}
ACTIVE_BILLIONS = {"DeepSeek-V3": 37, "Kimi-K2": 32, "Moonlight-16B-A3B": 3, "DeepSeek-V2": 21, "DeepSeek-V2-Lite": 2.4}


def of_transformers(name: str) -> int:
    """Count the weights and selection biases of transformers' model, which has no multi-token prediction."""
    values: dict[str, Any] = {
        key: value for key, value in JSON[name].items() if key not in ("model_type", "hidden_act")
    }
    if JSON[name]["model_type"] == "deepseek_v2":
        config = transformers.DeepseekV2Config(**values)
        with torch.device("meta"):
            model = transformers.DeepseekV2ForCausalLM(config)
    else:
        config = transformers.DeepseekV3Config(**values)
        with torch.device("meta"):
            model = transformers.DeepseekV3ForCausalLM(config)
    biases = sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias"))
    return int(sum(weight.numel() for weight in model.parameters()) + biases)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers_and_of_the_release(name: str) -> None:
    assert param_count(SHAPES[name]) == of_transformers(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_active_parameters_round_to_the_published_ones(name: str) -> None:
    """Published figures are whole billions, V2-Lite's is tenths, with or without the embedding."""
    counts = [active_param_count(SHAPES[name], include_embedding=embedding) / 1e9 for embedding in (False, True)]
    unit = 0.1 if name == "DeepSeek-V2-Lite" else 1.0
    assert min(abs(count - ACTIVE_BILLIONS[name]) for count in counts) <= 0.55 * unit


def test_the_files_of_kimi_k2_hold_one_scale_a_block_of_fp8_weights_besides() -> None:
    """1,026,470,731,056 numbers are in them; a scale belongs to 128 x 128 weights, embedding and head have none."""
    scales = 1_026_470_731_056 - PARAMETERS["Kimi-K2"]
    blocks = (PARAMETERS["Kimi-K2"] - 2 * 163840 * 7168) / 128**2
    assert scales == pytest.approx(blocks, rel=0.001)  # narrow matrices end in part of a block


def test_flops_of_deepseek_v3_are_exact() -> None:
    assert train_flops_per_token(SHAPES["DeepSeek-V3"], 4096) == 260_641_652_736
