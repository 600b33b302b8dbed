"""Root-mean-square normalisation (arXiv:1910.07467)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.ops.compiled import takes
from ds_lightning.ops.rms_norm import cpu, reference

__all__ = ["reference", "rms_norm"]


def rms_norm(
    x: Float[Tensor, "... hidden"], weight: Float[Tensor, " hidden"], eps: float
) -> Float[Tensor, "... hidden"]:
    """Return what :func:`reference.rms_norm` defines, in the autocast dtype where autocast is on.

    Numerics: fp32 or wider inside, rounded once.
    """
    if takes(cpu.SOURCE, x, weight):
        return cpu.rms_norm(x, weight, eps)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if not autocast and not torch.is_grad_enabled():  # the same, without the cost of a node: half of it for few rows
        normal, _ = _normalise(x, eps)
        return (normal * weight).to(x.dtype)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    with torch.autocast(device, enabled=False):
        out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps the normalised input, and nothing else of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normal, scale = _normalise(x, eps)
        ctx.save_for_backward(normal, scale, weight)
        ctx.dtype = x.dtype
        out: Tensor = (normal * weight).to(dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        grad = grads[0].to(normal.dtype)
        product = grad * normal
        grad_weight = product.reshape(-1, product.shape[-1]).sum(0).to(weight.dtype)
        mean = (product @ weight.to(normal.dtype)).div_(normal.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).sub_(normal * mean).mul_(scale).to(ctx.dtype)
        return grad_x, grad_weight, None, None


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the input over its root mean square, and one over that."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide * scale, scale
