"""Oracle: the formula in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from ds_lightning.ops.swiglu import swiglu


def test_the_gate_passes_through_silu_and_the_rest_does_not() -> None:
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, 5, 7))
    expected = gate / (1 + np.exp(-gate)) * up
    out = swiglu(torch.from_numpy(gate), torch.from_numpy(up))
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-14)
    assert not np.allclose(expected, up / (1 + np.exp(-up)) * gate)
