"""Output head and cross-entropy in one, a slice of tokens at a time: the logits of a batch never exist at once."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.cross_entropy import reference

__all__ = ["linear_cross_entropy", "reference"]

CHUNK_TOKENS = 512


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Return what :func:`reference.linear_cross_entropy` defines, in memory for ``CHUNK_TOKENS`` rows of logits.

    The gradients are computed in the forward pass, while the logits are at hand; the backward pass scales them.

    Numerics: products run in the autocast dtype where autocast is on; softmax, loss and the sum of weight gradients in
    fp32 or wider. ``token_weights`` and ``labels`` get no gradient.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden.to(dtype or hidden.dtype), weight, labels, token_weights)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        loss = hidden.new_zeros((), dtype=wide)
        counted = labels != -100
        scale = token_weights.to(wide) * counted
        labels = labels.where(counted, 0)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[part] @ head.T).to(wide)
            target = labels[part].unsqueeze(-1)
            log_p = torch.log_softmax(logits, -1, out=logits)
            loss -= (log_p.gather(-1, target).squeeze(-1) * scale[part]).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_p.exp_()
            grad.scatter_add_(-1, target, grad.new_full(target.shape, -1.0))
            grad = grad.mul_(scale[part].unsqueeze(-1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
