"""Oracle: the absorbed formulation of MLA, one position at a time over the latents a cache would hold, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.nn.attention import MLA
from ds_lightning.ops.rope import rope_tables

CONFIG = DeepSeekConfig(
    vocab_size=11,
    hidden_size=10,
    num_hidden_layers=1,
    intermediate_size=8,
    num_attention_heads=3,
    q_lora_rank=7,
    kv_lora_rank=5,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
)
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.5)
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])


def build(config: DeepSeekConfig) -> MLA:
    mla = MLA(config).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in mla.parameters():
        parameter.data.normal_(generator=rng)
    return mla


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.square().mean() + 1e-6).sqrt()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply the complex numbers in neighbouring channels by the position's rotation."""
    out = torch.complex(x[0::2], x[1::2]) * torch.complex(cos.double(), sin.double())
    return torch.view_as_real(out).flatten(-2)


def absorbed(mla: MLA, x: Tensor, cos: Tensor, sin: Tensor, segments: Tensor | None) -> Tensor:
    """Keys and values are never formed: queries move into the latent space, and the mean latent out of it."""
    c = mla.config
    temperature = 1.0
    if c.rope_scaling is not None:
        temperature = (0.1 * c.rope_scaling.mscale_all_dim * math.log(c.rope_scaling.factor) + 1) ** 2
    up = mla.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim))
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        cache = []
        for t in range(x.shape[1]):
            compressed = mla.kv_a_proj_with_mqa.weight @ x[b, t]
            latent = rms(compressed[: c.kv_lora_rank], mla.kv_a_layernorm.weight)
            cache.append((latent, turn(compressed[c.kv_lora_rank :], cos[t], sin[t])))
            if c.q_lora_rank is None:
                queries = mla.q_proj.weight @ x[b, t]
            else:
                queries = mla.q_b_proj.weight @ rms(mla.q_a_proj.weight @ x[b, t], mla.q_a_layernorm.weight)
            seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
            mixed = []
            for head, query in enumerate(queries.split(c.qk_nope_head_dim + c.qk_rope_head_dim)):
                content = up[head, : c.qk_nope_head_dim].T @ query[: c.qk_nope_head_dim]
                position = turn(query[c.qk_nope_head_dim :], cos[t], sin[t])
                scores = torch.stack([content @ cache[s][0] + position @ cache[s][1] for s in seen])
                share = (scores * temperature / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)).softmax(0)
                mean = sum(p * cache[s][0] for p, s in zip(share, seen, strict=True))
                mixed.append(up[head, c.qk_nope_head_dim :] @ mean)
            out[b, t] = mla.o_proj.weight @ torch.cat(mixed)
    return out


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole row", "documents"])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, q_lora_rank=None),
        replace(CONFIG, rope_scaling=YARN),
        replace(CONFIG, v_head_dim=12, qk_rope_head_dim=2, num_attention_heads=1),
        replace(CONFIG, rms_norm_eps=0.5),
    ],
    ids=["query rank", "no query rank", "yarn", "values wider than keys", "latent norms keep their own epsilon"],
)
def test_training_form_and_absorbed_form_agree(config: DeepSeekConfig, segments: Tensor | None) -> None:
    mla = build(config)
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cos, sin = rope_tables(config.qk_rope_head_dim, 7, config.rope_theta, config.rope_scaling)
    with torch.no_grad():
        expected = absorbed(mla, x, cos, sin, segments)
        out = mla(x, cos, sin, segments)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert expected.abs().amax() > 0.1


def test_weights_have_the_shapes_of_the_released_ones() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in MLA(CONFIG).named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (7, 10),
        "q_a_layernorm.weight": (7,),
        "q_b_proj.weight": (3 * (6 + 4), 7),
        "kv_a_proj_with_mqa.weight": (5 + 4, 10),
        "kv_a_layernorm.weight": (5,),
        "kv_b_proj.weight": (3 * (6 + 8), 5),
        "o_proj.weight": (10, 3 * 8),
    }
    assert "q_proj.weight" in dict(MLA(replace(CONFIG, q_lora_rank=None)).named_parameters())


def test_the_softmax_scale_of_v3_grows_by_the_square_of_its_temperature() -> None:
    wide = replace(CONFIG, qk_nope_head_dim=128, qk_rope_head_dim=64)
    assert MLA(wide).scale == pytest.approx(192**-0.5)
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    assert MLA(replace(wide, rope_scaling=scaling)).scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)


@pytest.mark.parametrize("q_lora_rank", [None, 6])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0, original_max_position_embeddings=4, mscale=0.7)])
def test_decoding_from_latents_is_the_last_row_of_the_training_form(
    q_lora_rank: int | None, scaling: RopeScaling | None
) -> None:
    """In fp64 both forms are the same sums of some tens of terms in another order: 1e-12."""
    mla = build(replace(CONFIG, q_lora_rank=q_lora_rank, rope_scaling=scaling))
    config, lengths = mla.config, [7, 1, 4]
    x = torch.randn(3, 7, config.hidden_size, dtype=torch.float64)
    cos, sin = (t.double() for t in rope_tables(config.qk_rope_head_dim, 7, config.rope_theta, scaling))
    latents: list[Tensor] = []
    with torch.no_grad():
        full = mla(x, cos, sin, latents=latents)
        assert torch.equal(full, mla(x, cos, sin))
        (cache,) = latents
        last = torch.tensor(lengths) - 1
        cache = torch.where(torch.arange(7)[:, None] < last[:, None, None], cache, 5.0)  # newer entries are not there
        bias = torch.zeros(3, 7, dtype=torch.float64).masked_fill(torch.arange(7) > last[:, None], -torch.inf)
        rows = torch.arange(3)
        out = mla.decode(x[rows, last], cos[last], sin[last], cache, last, bias, mla.absorb())
    torch.testing.assert_close(out, full[rows, last], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cache[rows, last], latents[0][rows, last], rtol=1e-14, atol=1e-14)


def test_absorbed_weights_are_the_halves_of_the_projection() -> None:
    mla = build(CONFIG)
    key, value = mla.absorb()
    weight = mla.kv_b_proj.weight.unflatten(0, (CONFIG.num_attention_heads, -1))
    for head in range(CONFIG.num_attention_heads):
        assert torch.equal(key[head], weight[head, : CONFIG.qk_nope_head_dim])
        assert torch.equal(value[head], weight[head, CONFIG.qk_nope_head_dim :].T)
