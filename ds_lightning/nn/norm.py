"""Root-mean-square normalisation as a module."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ds_lightning.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)
