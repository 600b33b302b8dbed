"""RMSNorm on a CPU in fp32, by ``cpu.cpp``."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.ops.compiled import call

SOURCE = Path(__file__).with_name("cpu.cpp")

_BLOCK = 64
"""Rows whose gradients of the gain are summed by one thread, whatever the number of threads."""


class _Norm(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "gain")],
        *[(name, ctypes.c_int64) for name in ("rows", "width", "x_stride", "block")],
        ("eps", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in ("out", "scales", "grad_out", "grad_x", "grad_gains")],
    ]


def rms_norm(
    x: Float[Tensor, "... hidden"], weight: Float[Tensor, " hidden"], eps: float
) -> Float[Tensor, "... hidden"]:
    """Return what the public function does."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out: Tensor = _RMSNorm.apply(rows, weight.contiguous(), eps)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    """Keeps what came in, and the factor of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scales = x.new_empty(x.shape), x.new_empty(len(x))
        _call("norm_forward", x, weight, eps, out=out, scales=scales)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad_x, grad_gains = x.new_empty(x.shape), x.new_zeros(-(-len(x) // _BLOCK), x.shape[1])
        outputs = {"grad_out": grads[0].contiguous(), "grad_x": grad_x, "grad_gains": grad_gains}
        _call("norm_backward", x, weight, 0.0, scales=scales, **outputs)
        return grad_x, grad_gains.sum(0), None


def _call(name: str, x: Tensor, weight: Tensor, eps: float, **further: Tensor) -> None:
    tensors = {"x": x, "gain": weight, **further}
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    norm = _Norm(**pointers, rows=len(x), width=x.shape[1], x_stride=x.stride(0), block=_BLOCK, eps=eps)
    call(SOURCE, name, norm, work=4 * x.numel())
