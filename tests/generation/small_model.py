"""A small model with experts whose logits have spread, and prompts of unequal length."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models import DeepSeek

CONFIG = DeepSeekConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=3,
    intermediate_size=32,
    num_attention_heads=3,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=9,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=96,
    initializer_range=0.25,
)
MOE_LAYERS = 2


def small_model(**changes: Any) -> DeepSeek:
    """Build a model none of whose gains and selection biases has a special value."""
    torch.manual_seed(3)
    model = DeepSeek(replace(CONFIG, **changes))
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.1)
    return model


def prompts(count: int, longest: int = 20, seed: int = 5) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(0, CONFIG.vocab_size, (length,), generator=draw).tolist() for length in lengths]


def naive_logits(model: DeepSeek, ids: list[int]) -> Tensor:
    """Return the scores of the next token by the training forward over everything before it."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids])))[0, -1]
