"""The routed experts on a CPU in fp32, by ``cpu.cpp``: one kernel for each direction, no sorted copy of the input."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.compiled import call

SOURCE = Path(__file__).with_name("cpu.cpp")

_INPUTS = ("x", "indices", "gates", "gate_up_proj", "down_proj")
_OUTPUTS = ("slots", "places", "ends", "gate_up", "rows", "out")
_GRADS = ("grad_out", "grad_x", "grad_gates", "grad_gate_up_proj", "grad_down_proj")


class _Experts(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in _INPUTS],
        *[(name, ctypes.c_int64) for name in ("tokens", "topk", "experts", "hidden", "width")],
        *[(name, ctypes.c_void_p) for name in (*_OUTPUTS, *_GRADS)],
    ]


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up_proj: Float[Tensor, "experts two_ffn hidden"],
    down_proj: Float[Tensor, "experts hidden ffn"],
) -> Float[Tensor, "tokens hidden"]:
    """Return what the public function does."""
    out: Tensor = _RoutedExperts.apply(x, indices, weights, gate_up_proj, down_proj)  # type: ignore[no-untyped-call]
    return out


class _RoutedExperts(torch.autograd.Function):
    """Keeps the input, the order of its slots, and the gate and up outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        inputs = [part.contiguous() for part in (x, indices, weights, gate_up_proj, down_proj)]
        count, (experts, _, width) = indices.numel(), down_proj.shape
        slots, places, ends = (indices.new_empty(size) for size in (count, count, experts + 1))
        gate_up = x.new_empty(count, 2 * width)
        out = torch.empty_like(inputs[0])
        kept = (slots, places, ends, gate_up)
        _call("experts_forward", inputs, kept, out=out)
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, kept = saved[: len(_INPUTS)], saved[len(_INPUTS) :]
        x, _, weights, gate_up_proj, down_proj = inputs
        grad_x, grad_gates = torch.empty_like(x), torch.empty_like(weights)
        grad_gate_up_proj, grad_down_proj = torch.zeros_like(gate_up_proj), torch.zeros_like(down_proj)
        of_inputs = (grads[0].contiguous(), grad_x, grad_gates, grad_gate_up_proj, grad_down_proj)
        _call("experts_backward", inputs, kept, **dict(zip(_GRADS, of_inputs, strict=True)))
        return grad_x, None, grad_gates, grad_gate_up_proj, grad_down_proj


def _call(name: str, inputs: Any, kept: Any, **further: Tensor) -> None:
    x, indices, down_proj = inputs[0], inputs[1], inputs[4]
    rows = x.new_empty(indices.numel(), x.shape[1])
    tensors = dict(zip((*_INPUTS, *_OUTPUTS), (*inputs, *kept, rows), strict=False)) | further
    experts = _Experts(
        **{key: tensor.data_ptr() for key, tensor in tensors.items()},
        tokens=len(x),
        topk=indices.shape[1],
        experts=len(down_proj),
        hidden=x.shape[1],
        width=down_proj.shape[2],
    )
    call(SOURCE, name, experts, work=3 * rows.numel() * experts.width)
