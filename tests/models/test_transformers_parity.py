"""Oracle: transformers' own DeepseekV3, DeepseekV2 and MTP classes, which load the folders that ``save_hf`` writes.

Bounds are those of fp32 rounding for logits of order one (checked): 1e-5 on every logit, and 1e-4 of the norm on
every gradient. Measured: 5e-6 and 4e-6 at most; both sides lie as far from the fp64 result as from each other.
"""

from __future__ import annotations

import random
from dataclasses import replace
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
transformers.logging.set_verbosity_error()

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
        n_shared_experts=1 + seed // 2 % 3,
        num_experts_per_tok=draw.randint(1, min(4, topk_group * per_group)),
        moe_intermediate_size=draw.choice((10, 14)),
        first_k_dense_replace=draw.choice((0, 1)),
        n_group=groups,
        topk_group=topk_group,
        routed_scaling_factor=draw.choice((1.0, 2.5)),
        num_nextn_predict_layers=seed // 3 % 3,
        max_position_embeddings=64,
        rope_theta=draw.choice((10000.0, 500.0)),
        rope_scaling=scaling if seed // 2 % 2 else None,
        rms_norm_eps=draw.choice((1e-6, 1e-5, 1e-3)),
        initializer_range=0.15,
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


def assert_same_function(ours: DeepSeek, theirs: Any) -> None:
    inputs, labels = tokens(2, 1), tokens(2, 2)
    hidden = ours(inputs)
    mine, other = ours.logits(hidden), theirs(inputs).logits
    assert 0.5 < other.std() < 20, "the bound on logits means something only where they are of order one"
    deviation = (mine - other).abs().max().item()
    torch.autograd.backward(next_token_loss(hidden, ours.lm_head.weight, labels))
    torch.autograd.backward(cross_entropy(other.flatten(0, 1), labels.flatten(), reduction="sum"))
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
    print(f"logits {deviation:.1e} with std {other.std():.2f}, gradients {relative[worst]:.1e} in {worst}")
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


def test_draws_cover_every_feature() -> None:
    configs = [drawn_config(seed) for seed in range(16)]
    assert {config.q_lora_rank is None for config in configs} == {True, False}
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert {config.norm_topk_prob for config in configs} == {True, False}
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert {config.first_k_dense_replace for config in configs} == {0, 1}
    assert {config.n_shared_experts for config in configs} == {1, 2, 3}
    assert {config.num_nextn_predict_layers for config in configs} == {0, 1, 2}
    assert {config.n_group for config in configs} == {1, 2, 4}
    assert any(config.topk_group < config.n_group for config in configs)
    scalings = [config.rope_scaling for config in configs if config.rope_scaling]
    assert any(scaling.mscale != scaling.mscale_all_dim for scaling in scalings)
    assert any(scaling.mscale_all_dim == 0 and scaling.mscale != 1 for scaling in scalings)


@pytest.mark.parametrize("seed", [5, 8])
def test_transformers_mtp_modules_compute_the_same_hidden_states(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_layers import MtpModel

    config = replace(drawn_config(seed), num_nextn_predict_layers=2)
    model = drawn_model(config, seed)
    theirs = exchanged(model, tmp_path / "export")
    # The class knows only the layer number of the 671B model.
    pattern = rf"model\.layers\.[{config.num_hidden_layers}-9].*"
    monkeypatch.setattr(theirs, "_keys_to_ignore_on_load_unexpected", [pattern])
    mtp = MtpModel.from_pretrained(theirs)
    mtp.config._attn_implementation = "eager"
    mtp.config._experts_implementation = "eager"

    inputs = tokens(1, 3)
    with torch.no_grad():
        hidden = model(inputs)
        ours = model.mtp_hidden(inputs, hidden)
        their_hidden = theirs.model(inputs).last_hidden_state
        positions = torch.arange(SEQ).unsqueeze(0)
        for depth, mine in enumerate(ours):
            ahead = inputs.roll(-depth - 1, dims=1)
            their_hidden = mtp.forward_layer(depth, their_hidden, positions, None, input_ids=ahead)
            assert 0.5 < mine.std() < 5
            assert (mine - their_hidden).abs().max() <= LOGIT_BOUND
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_transformers_generates_the_greedy_tokens_of_this_model(tmp_path: Path) -> None:
    model = drawn_model(drawn_config(7), 7)
    theirs = exchanged(model, tmp_path / "export")
    sequence = tokens(1, 4)[:, :5]
    generated = theirs.generate(sequence, max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        for _ in range(20):
            best = model.logits(model(sequence))[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat((sequence, best), dim=1)
    assert torch.equal(generated, sequence)
    assert len(set(sequence[0, 5:].tolist())) > 3, "a constant continuation would prove little"


@pytest.mark.parametrize("family", ["v3", "v2"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_import_of_what_transformers_saved_is_exact(family: str, max_shard_size: str, tmp_path: Path) -> None:
    config = replace(drawn_config(3, family), num_nextn_predict_layers=0)
    theirs = exchanged(drawn_model(config, 3), tmp_path / "export")
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    ours = load_hf(tmp_path / "theirs")
    assert ours.config == replace(config, n_group=1, topk_group=1) if config.topk_method == "greedy" else config
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[their_name(name)]), name


def test_modules_that_transformers_announces_but_does_not_save_are_left_out_with_a_warning(tmp_path: Path) -> None:
    config = replace(drawn_config(5), num_nextn_predict_layers=2)
    theirs = exchanged(drawn_model(config, 5), tmp_path / "export")
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="num_nextn_predict_layers is 2 but the files have no such weights"):
        ours = load_hf(tmp_path / "theirs")
    assert ours.config == replace(config, num_nextn_predict_layers=0)


def test_transformers_refuses_a_model_that_none_of_its_classes_computes(tmp_path: Path) -> None:
    config = replace(drawn_config(2), scoring_func="softmax")
    save_hf(DeepSeek(config), tmp_path / "export")
    with pytest.raises(ValueError, match="ds_lightning"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert load_hf(tmp_path / "export").config == config


def test_transformers_reads_a_dense_model(tmp_path: Path) -> None:
    config = replace(drawn_config(9), n_routed_experts=0, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model = drawn_model(config, 9)
    assert_same_function(model, exchanged(model, tmp_path / "export"))
