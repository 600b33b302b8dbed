"""Next-token and multi-token prediction losses over hidden states."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.cross_entropy import linear_cross_entropy

IGNORE = -100
"""Label of a position that is not counted."""


def next_token_loss(
    hidden: Float[Tensor, "batch seq hidden"],
    head: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "batch seq"],
    token_weights: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    """Return the sum (not the mean) of the cross-entropy over counted positions, in nats.

    Normalise by the number of counted tokens of the whole global batch, so that every token weighs the same whatever
    micro-batch or rank it falls into.
    """
    weights = hidden.new_ones(labels.numel(), dtype=torch.float32) if token_weights is None else token_weights.flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten(), weights)


def mtp_labels(labels: Int[Tensor, "batch seq"], depth: int) -> Int[Tensor, "batch seq"]:
    """Return the labels of prediction depth k: those of position t + k, none for the last k positions.

    DeepSeek-V3 (arXiv:2412.19437, section 2.2, "MTP Training Objective").
    """
    shifted = labels.roll(-depth, dims=1)
    shifted[:, -depth:] = IGNORE
    return shifted
