"""The routed experts as matrix products over rows sorted by expert."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, silu

ALIGN = 64
"""Rows that an expert's part of the sorted tokens is rounded up to: CPU libraries prepare a product anew for every
number of rows that they have not seen, which takes longer than a small product, and GPU kernels want aligned rows."""


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up_proj: Float[Tensor, "experts two_ffn hidden"],
    down_proj: Float[Tensor, "experts hidden ffn"],
) -> Float[Tensor, "tokens hidden"]:
    """Return what the public function does, on any device and in any precision."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _RoutedExperts.apply(x.to(dtype), indices, weights, gate_up_proj, down_proj)  # type: ignore[no-untyped-call]
    return out


class _RoutedExperts(torch.autograd.Function):
    """One node for the whole pipeline: keeps the sorted input and the gate and up outputs, recomputes the rest.

    The rows of an expert begin at a multiple of ``ALIGN``. Those that fill the gap repeat some token with gate value
    zero, so they change neither output nor gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        place, ends = _layout(indices, gate_up_proj.shape[0])
        gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
        num_rows = _num_rows(ends, indices)
        token = place.new_zeros(num_rows)
        token[place] = torch.arange(place.shape[0], device=x.device) // indices.shape[1]
        gate_values = weights.new_zeros(num_rows)
        gate_values[place] = weights.flatten()
        gate_values = gate_values.unsqueeze(-1).to(x.dtype)
        rows = x.index_select(0, token)
        gate_up = _rows_by_expert(rows, gate_up_proj.transpose(1, 2), ends)
        gate, up = gate_up.chunk(2, -1)
        y = _rows_by_expert(silu(gate).mul_(up).mul_(gate_values), down_proj.transpose(1, 2), ends)
        ctx.save_for_backward(place, ends, token, rows, gate_values, gate_up, gate_up_proj, down_proj)
        ctx.shape, ctx.weights_dtype = indices.shape, weights.dtype
        return _sum_slots(y, place.view_as(indices))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        place, ends, token, rows, gate_values, gate_up, gate_up_proj, down_proj = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_y = grads[0].to(rows.dtype).index_select(0, token)
        sigmoid = gate.sigmoid()
        act = gate * sigmoid
        hidden = act * up
        grad_scaled = _rows_by_expert(grad_y, down_proj, ends)  # [rows ffn]
        grad_weights = (grad_scaled * hidden).sum(-1, dtype=ctx.weights_dtype)[place].view(ctx.shape)
        grad_down = _weights_by_expert(grad_y, hidden.mul_(gate_values), ends)
        grad_hidden = grad_scaled.mul_(gate_values)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(grad_hidden, act, out=grad_up)
        slope = act.mul_(1 - sigmoid).add_(sigmoid)  # of silu: s + silu(g) (1 - s)
        torch.mul(slope.mul_(up), grad_hidden, out=grad_gate)
        grad_rows = _rows_by_expert(grad_gate_up, gate_up_proj, ends)
        grad_gate_up_proj = _weights_by_expert(grad_gate_up, rows, ends)
        return _sum_slots(grad_rows, place.view(ctx.shape)), None, grad_weights, grad_gate_up_proj, grad_down


def _sum_slots(rows: Tensor, place: Tensor) -> Tensor:
    """Return for each token the sum of the rows of its slots, a gather and a sum in one pass."""
    return embedding_bag(place, rows, mode="sum")


def _layout(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the row of each slot of each token, and where the rows of each expert end."""
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    ends = ((counts + ALIGN - 1) // ALIGN * ALIGN).cumsum(0)
    order = flat.argsort(stable=True)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    shift = starts - (counts.cumsum(0) - counts)  # of an expert's first row by the gaps before it
    place = torch.empty_like(flat)
    place[order] = torch.arange(flat.shape[0], device=flat.device) + shift[flat[order]]
    return place, ends.to(torch.int32)


def _num_rows(ends: Tensor, indices: Tensor) -> int:
    """Return the rows of all experts; on a GPU an upper bound, so that nothing waits for the count."""
    if ends.is_cuda:
        return indices.numel() + ends.shape[0] * ALIGN
    return int(ends[-1])


def _segments(ends: Tensor) -> list[tuple[int, int, int]]:
    """Return (expert, first row, last row + 1) of every expert that has rows."""
    bounds = [0, *ends.tolist()]
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


def _one_kernel(operand: Tensor, *widths: int) -> bool:
    """Tell whether torch's kernel takes a product: bfloat16 on a GPU, and matrices of which a row is whole 16 bytes."""
    return operand.is_cuda and operand.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _rows_by_expert(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row [k] with the weight [k n] of its expert."""
    if _one_kernel(rows, *weight.shape[1:]):
        return grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for expert, first, last in _segments(ends):
        torch.mm(rows[first:last], weight[expert], out=out[first:last])
    return out


def _weights_by_expert(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return ``left^T right`` over the rows of each expert: [experts m n]."""
    if _one_kernel(left, left.shape[1], right.shape[1]):
        return grouped_mm(left.T, right, offs=ends)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    for expert, first, last in _segments(ends):
        torch.mm(left[first:last].T, right[first:last], out=out[expert])
    return out
