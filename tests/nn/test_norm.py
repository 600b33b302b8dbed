"""Oracle: torch's RMSNorm module."""

from __future__ import annotations

import torch

from ds_lightning.nn.norm import RMSNorm


def test_the_module_is_torchs_with_its_gain_and_epsilon() -> None:
    ours, torchs = RMSNorm(6, 0.5).double(), torch.nn.RMSNorm(6, eps=0.5).double()
    gain = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for module in (ours, torchs):
        module.weight.data.copy_(gain)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-12, atol=1e-12)


def test_the_gain_starts_at_one_and_epsilon_at_one_millionth() -> None:
    module = RMSNorm(6)
    assert module.eps == 1e-6
    assert (module.weight == 1).all()
