"""Definition of the log-probabilities of chosen tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return ``log softmax(hidden weight^T / temperature)[target]`` and the entropy of that softmax, in nats.

    A target of -100 has a log-probability of 0. The entropy carries no gradient.
    """
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    log_p = logits.log_softmax(-1)
    counted = targets != -100
    chosen = log_p.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(counted, 0), -(log_p.exp() * log_p).sum(-1).detach()
