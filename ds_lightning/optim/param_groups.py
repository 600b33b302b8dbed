"""AdamW with weight decay on matrices alone."""

from typing import Any

import torch
from torch import nn


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay and those that do not.

    Decay pulls the weights of matrix products; gains of norms and rows of the embedding, which are looked up and not
    multiplied, keep their scale.

    Args:
        model: Any module.
        weight_decay: Decay of the first group.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, kept = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return torch's fused AdamW over :func:`weight_decay_groups`."""
    groups = [group for group in weight_decay_groups(model, weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
