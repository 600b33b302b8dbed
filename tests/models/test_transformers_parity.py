"""Oracle: transformers' own DeepseekV3, DeepseekV2 and MTP classes, which load the folders that ``save_hf`` writes.

Bounds are those of fp32 rounding for logits of order one (checked): 1e-5 on every logit, and 1e-4 of the norm on
every gradient.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.losses.next_token import next_token_loss
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import load_hf, save_hf

transformers = pytest.importorskip("transformers")

LOGIT_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
VOCAB = 83
SEQ = 24


def drawn_config(seed: int, family: str = "v3") -> DeepSeekConfig:
    """Draw a shape; features alternate with the seed where chance might leave one out of a few draws."""
    draw = random.Random(seed)
    groups, per_group = draw.choice(((1, 6), (2, 4), (4, 2), (4, 4)))
    topk_group = draw.randint(1, groups)
    scaling = RopeScaling(
        factor=draw.choice((2.0, 5.0, 40.0)),
        original_max_position_embeddings=draw.choice((8, 16)),
        beta_fast=draw.choice((32.0, 4.0)),
        mscale=draw.choice((1.0, 0.707, 0.4)),
        mscale_all_dim=draw.choice((1.0, 0.707, 0.0)),
    )
    heads = draw.choice((2, 3))
    routing: dict[str, Any] = {"norm_topk_prob": seed % 3 != 0}
    if family == "v2":
        method = "group_limited_greedy" if seed % 2 else "greedy"
        routing = {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": method}
    return DeepSeekConfig(
        vocab_size=VOCAB,
        hidden_size=12 * heads,
        num_hidden_layers=draw.choice((2, 3)),
        intermediate_size=draw.choice((20, 40)),
        num_attention_heads=heads,
        kv_lora_rank=draw.choice((8, 16)),
        qk_nope_head_dim=draw.choice((4, 8)),
        qk_rope_head_dim=draw.choice((4, 8)),
        v_head_dim=draw.choice((6, 8)),
        q_lora_rank=draw.choice((10, 16)) if seed % 2 else None,
        n_routed_experts=groups * per_group,
        n_shared_experts=1 + seed % 3,
        num_experts_per_tok=draw.randint(1, min(4, topk_group * per_group)),
        moe_intermediate_size=draw.choice((10, 14)),
        first_k_dense_replace=draw.choice((0, 1)),
        n_group=groups,
        topk_group=topk_group,
        routed_scaling_factor=draw.choice((1.0, 2.5)),
        num_nextn_predict_layers=seed // 2 % 3,
        max_position_embeddings=64,
        rope_theta=draw.choice((10000.0, 500.0)),
        rope_scaling=scaling if seed // 2 % 2 else None,
        rms_norm_eps=draw.choice((1e-6, 1e-5, 1e-3)),
        initializer_range=0.2,
        tie_word_embeddings=seed % 4 == 3,
        **routing,
    )


def drawn_model(config: DeepSeekConfig, seed: int) -> DeepSeek:
    """Build a model none of whose weights, gains and selection biases has a special value."""
    torch.manual_seed(seed)
    model = DeepSeek(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.2)
    return model


def exchanged(model: DeepSeek, folder: Path) -> Any:
    """Return transformers' model of an export, after checking that it found every weight and no unknown one."""
    save_hf(model, folder)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    layers = range(model.config.num_hidden_layers, model.config.num_hidden_layers + len(model.mtp))
    mtp = tuple(f"model.layers.{layer}." for layer in layers)
    assert all(name.startswith(mtp) for name in info["unexpected_keys"])
    assert bool(info["unexpected_keys"]) == bool(mtp)
    return theirs.eval()


def their_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows, SEQ), generator=torch.Generator().manual_seed(seed))


def assert_same_function(ours: DeepSeek, theirs: Any, record: dict[str, float] | None = None) -> None:
    inputs, labels = tokens(2, 1), tokens(2, 2)
    hidden = ours(inputs)
    mine, other = ours.logits(hidden), theirs(inputs).logits
    assert 0.5 < other.std() < 20, "the bound on logits means something only where they are of order one"
    deviation = (mine - other).abs().max().item()
    next_token_loss(hidden, ours.lm_head.weight, labels).backward()
    cross_entropy(other.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    relative = {}
    for name, parameter in ours.named_parameters():
        if name.startswith("mtp."):
            continue
        expected = gradients[their_name(name)]
        assert parameter.grad is not None
        assert expected.norm() > 0
        relative[name] = ((parameter.grad - expected).norm() / expected.norm()).item()
    worst = max(relative, key=lambda name: relative[name])
    print(f"logits {deviation:.1e} of std {other.std():.2f}, gradients {relative[worst]:.1e} in {worst}")
    assert deviation <= LOGIT_BOUND
    assert relative[worst] <= GRADIENT_BOUND, worst


@pytest.mark.parametrize("seed", range(16))
def test_v3_logits_and_gradients_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    model = drawn_model(drawn_config(seed), seed)
    theirs = exchanged(model, tmp_path / "export")
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert_same_function(model, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_v2_logits_and_gradients_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    model = drawn_model(drawn_config(seed, "v2"), seed)
    theirs = exchanged(model, tmp_path / "export")
    assert type(theirs).__name__ == "DeepseekV2ForCausalLM"
    assert_same_function(model, theirs)
