"""Definition of the head and its cross-entropy."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Return the weighted sum over tokens of ``-log softmax(hidden weight^T)[label]``; labels of -100 count nothing."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    nll = cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return (nll * token_weights).sum()
