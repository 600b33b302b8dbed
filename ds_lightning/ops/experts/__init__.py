"""The routed experts as matrix products over rows sorted by expert."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from ds_lightning.ops.experts import reference

__all__ = ["reference", "routed_experts"]


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up_proj: Float[Tensor, "experts two_ffn hidden"],
    down_proj: Float[Tensor, "experts hidden ffn"],
) -> Float[Tensor, "tokens hidden"]:
    """Return what :func:`reference.routed_experts` defines.

    Rows are sorted by expert once; every product then runs over contiguous rows, and gate values enter before the
    down projection, so that its output is summed as it is. An expert without tokens costs nothing.

    Numerics: products run in the autocast dtype where autocast is on, else in the dtype of ``x``; sums over a token's
    experts and all gradients of weights are rounded once. Deterministic.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _RoutedExperts.apply(x.to(dtype), indices, weights, gate_up_proj, down_proj)
    return out


class _RoutedExperts(torch.autograd.Function):
    """One node for the whole pipeline: keeps the sorted input and the gate and up outputs, recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        topk = indices.shape[1]
        order = indices.flatten().argsort(stable=True)
        ends = torch.bincount(indices.flatten(), minlength=gate_up_proj.shape[0]).cumsum(0).to(torch.int32)
        gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
        rows = x[order // topk]  # [tokens*topk hidden]
        row_weights = weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        gate_up = _rows_by_expert(rows, gate_up_proj.transpose(1, 2), ends)
        gate, up = gate_up.chunk(2, -1)
        y = _rows_by_expert(silu(gate).mul_(up).mul_(row_weights), down_proj.transpose(1, 2), ends)
        ctx.save_for_backward(order, ends, rows, row_weights, gate_up, gate_up_proj, down_proj)
        ctx.weights_dtype = weights.dtype
        return _sum_over_slots(y, order, topk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, ends, rows, row_weights, gate_up, gate_up_proj, down_proj = ctx.saved_tensors
        topk = rows.shape[0] // grads[0].shape[0]
        gate, up = gate_up.chunk(2, -1)
        grad_y = grads[0].to(rows.dtype)[order // topk]
        sigmoid = gate.sigmoid()
        act = gate * sigmoid
        grad_scaled = _rows_by_expert(grad_y, down_proj, ends)  # [tokens*topk ffn]
        hidden = act * up
        grad_weights = torch.empty_like(order, dtype=ctx.weights_dtype)
        grad_weights[order] = (grad_scaled * hidden).sum(-1, dtype=ctx.weights_dtype)
        grad_down = _weights_by_expert(grad_y, hidden.mul_(row_weights), ends)
        grad_hidden = grad_scaled.mul_(row_weights)
        grad_gate_up = torch.empty_like(gate_up)
        torch.mul(grad_hidden, act, out=grad_gate_up[:, gate.shape[1] :])
        # d silu(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
        slope = act.mul_(1 - sigmoid).add_(sigmoid)
        torch.mul(slope.mul_(up), grad_hidden, out=grad_gate_up[:, : gate.shape[1]])
        grad_x = _sum_over_slots(_rows_by_expert(grad_gate_up, gate_up_proj, ends), order, topk)
        grad_gate_up_proj = _weights_by_expert(grad_gate_up, rows, ends)
        return grad_x, None, grad_weights.view(-1, topk), grad_gate_up_proj, grad_down


def _segments(ends: Tensor) -> list[tuple[int, int, int]]:
    """Return (expert, first row, last row + 1) of every expert that has rows."""
    bounds = [0, *ends.tolist()]
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


def _rows_by_expert(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row [k] with the weight [k n] of its expert."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for expert, first, last in _segments(ends):
        torch.mm(rows[first:last], weight[expert], out=out[first:last])
    return out


def _weights_by_expert(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return ``left^T right`` over the rows of each expert: [experts m n]."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return grouped_mm(left.T, right, offs=ends)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    for expert, first, last in _segments(ends):
        torch.mm(left[first:last].T, right[first:last], out=out[expert])
    return out


def _sum_over_slots(rows: Tensor, order: Tensor, topk: int) -> Tensor:
    """Put sorted rows back in token order and sum those of each token."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return rows[place].view(-1, topk, rows.shape[1]).sum(1)
