"""Which parameters decay, which get Muon, and the optimizers over them."""

from typing import Any, Literal

import torch
from torch import nn

from ds_lightning.optim.muon import Muon


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay and those that do not.

    Decay pulls the weights of matrix products; gains of norms and rows of the embedding, which are looked up and not
    multiplied, keep their scale.

    Args:
        model: Any module.
        weight_decay: Decay of the first group.
    """
    embeddings = _embeddings(model)
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = _num_dims(parameter) >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else kept).append(parameter)
    return [
        {"params": group, "weight_decay": decay} for group, decay in ((decayed, weight_decay), (kept, 0.0)) if group
    ]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split further: matrices of hidden layers for Muon, those of head and routers for AdamW.

    Args:
        model: A DeepSeek model; names tell what a matrix is.
        weight_decay: Decay of matrices.
    """
    hidden: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        if _num_dims(parameter) >= 2 and not name.endswith(
            ("lm_head.weight", "mlp.gate.weight", "embed_tokens.weight")
        ):
            hidden[id(parameter)] = 2 if name.endswith("gate_up_proj") else 1
    groups = []
    for group in weight_decay_groups(model, weight_decay):
        for parts in (1, 2, 0):
            chosen = [parameter for parameter in group["params"] if hidden.get(id(parameter), 0) == parts]
            if chosen:
                groups.append({**group, "params": chosen, "muon": parts > 0, "parts": max(parts, 1)})
    return groups


def build_optimizer(
    model: nn.Module,
    kind: Literal["adamw", "muon"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    embedding_lr: float | None = None,
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, or Muon with AdamW for what is no matrix of a hidden layer.

    Args:
        model: The model.
        kind: ``adamw`` or ``muon``.
        lr: Learning rate.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: Decay of matrices.
        embedding_lr: Learning rate of the embedding; none: ``lr``.
    """
    groups = (muon_groups if kind == "muon" else weight_decay_groups)(model, weight_decay)
    if embedding_lr is not None:
        groups = _with_embedding_apart(groups, model, embedding_lr)
    if kind == "muon":
        return Muon(groups, lr=lr, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _with_embedding_apart(groups: list[dict[str, Any]], model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Give the embedding a group and a learning rate of its own, after the others."""
    embeddings = _embeddings(model)
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in embeddings]} for group in groups]
    apart = [{**group, "params": [p for p in group["params"] if id(p) in embeddings], "lr": lr} for group in groups]
    return [group for group in rest + apart if group["params"]]


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _num_dims(parameter: nn.Parameter) -> int:
    """Return the dimensions of a parameter; under ZeRO stage 3 it is empty, and DeepSpeed keeps its shape beside it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
