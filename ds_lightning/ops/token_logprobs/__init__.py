"""Output head and log-probabilities in one, a slice of tokens at a time: the logits of a batch never exist at once."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.token_logprobs import reference

__all__ = ["reference", "token_logprobs"]

CHUNK_TOKENS = 512


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return what :func:`reference.token_logprobs` defines, in memory for ``CHUNK_TOKENS`` rows of logits.

    The backward pass computes the logits again: unlike that of a cross-entropy, the gradient of every token arrives
    only then.

    Args:
        hidden: Final hidden states at the positions that predict ``targets``.
        weight: Output head.
        targets: Tokens; -100 has a log-probability of 0 and passes no gradient.
        temperature: Divides the logits, as the sampler did; > 0.

    Returns:
        Log-probabilities in nats, and the entropy of each distribution in nats, which carries no gradient.

    Numerics: products run in the autocast dtype where autocast is on; the rest, and the sum of weight gradients, in
    fp32 or wider.
    """
    assert temperature > 0
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(hidden.to(dtype or hidden.dtype), weight, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        counted = targets != -100
        index = targets.where(counted, 0).unsqueeze(-1)
        log_z, chosen, entropy = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[part] @ head.T).to(wide).div_(temperature)
            normaliser = logits.logsumexp(-1, keepdim=True)
            log_z[part] = normaliser.squeeze(-1)
            log_p = logits.sub_(normaliser)
            chosen[part] = log_p.gather(-1, index[part]).squeeze(-1)
            entropy[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen.where(counted, 0), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if needs_weight else None
        counted = targets != -100
        index = targets.where(counted, 0).unsqueeze(-1)
        scale = (grads[0] * counted / ctx.temperature).unsqueeze(-1)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[part] @ head.T).to(log_z.dtype).div_(ctx.temperature)
            grad = logits.sub_(log_z[part].unsqueeze(-1)).exp_().neg_()  # minus the softmax
            grad.scatter_add_(-1, index[part], torch.ones_like(scale[part]))
            grad = grad.mul_(scale[part]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
