"""Oracle: the formula written with plain matrix products."""

from __future__ import annotations

import torch
from torch import nn

from ds_lightning.nn.linear import Linear
from ds_lightning.nn.mlp import MLP


def test_the_feed_forward_is_down_of_silu_of_gate_times_up() -> None:
    mlp = MLP(5, 7).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in mlp.parameters():
        parameter.data.normal_(generator=rng)
    x = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T
    expected = (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)
    assert [tuple(parameter.shape) for parameter in mlp.parameters()] == [(7, 5), (7, 5), (5, 7)]


def test_linear_has_no_bias_and_leaves_its_weights_to_the_models_init() -> None:
    layer = Linear(4, 3)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    before = torch.random.get_rng_state()
    Linear(4, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
