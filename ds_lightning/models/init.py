"""Initial weights of every kind of layer, in one place."""

import torch
from torch import nn

from ds_lightning.nn.linear import Linear
from ds_lightning.nn.moe import RoutedExperts, Router
from ds_lightning.nn.norm import RMSNorm


@torch.no_grad()
def init_weights(model: nn.Module, std: float) -> None:
    """Draw all weights from a normal distribution of one width; gains start at one, selection biases at zero.

    DeepSeek-V3 (arXiv:2412.19437, section 4.2, "Model Hyper-Parameters") uses one standard deviation for all.

    Args:
        model: Any module built from this package's layers.
        std: Standard deviation, ``initializer_range``.
    """
    for module in model.modules():
        init_layer(module, std)


@torch.no_grad()
def init_layer(module: nn.Module, std: float) -> None:
    """Draw the weights that a module holds itself; nothing in one that only holds others.

    Args:
        module: Any module.
        std: Standard deviation.
    """
    if isinstance(module, RMSNorm):
        module.weight.fill_(1.0)
    elif isinstance(module, Linear | nn.Embedding):
        module.weight.normal_(0.0, std)
    elif isinstance(module, Router):
        module.weight.normal_(0.0, std)
        if module.e_score_correction_bias is not None:
            module.e_score_correction_bias.zero_()
    elif isinstance(module, RoutedExperts):
        module.gate_up_proj.normal_(0.0, std)
        module.down_proj.normal_(0.0, std)
