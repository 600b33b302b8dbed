"""Oracles: names and shapes of the weights by hand, torch's AdamW, and what a step without gradient leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from ds_lightning.models import DeepSeek
from ds_lightning.optim import build_optimizer, muon_groups, weight_decay_groups
from tests.training.toy_pretraining import CONFIG

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.5}


def names_by_decay(model: nn.Module, groups: list[dict[str, Any]]) -> dict[float, set[str]]:
    """Return the names of the parameters by weight decay; each stands in one group once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(group["weight_decay"], names.pop(id(parameter))) for group in groups for parameter in group["params"]]
    return {decay: {name for at, name in found if at == decay} for decay, _ in found}


def is_kept(name: str) -> bool:
    """Gains of norms and rows of the embedding: everything else is multiplied as a matrix."""
    return name.endswith(("norm.weight", "layernorm.weight")) or name == "embed_tokens.weight"


@pytest.mark.parametrize("grouping", [weight_decay_groups, muon_groups])
def test_only_matrices_of_products_decay(grouping: Any) -> None:
    model = DeepSeek(CONFIG)
    names = {name for name, _ in model.named_parameters()}
    kept = {name for name in names if is_kept(name)}
    assert len(kept) == 1 + 1 + 3 * 3 + 2 * (3 + 3), "embedding; final norm; three a layer; three more a module"
    assert names_by_decay(model, grouping(model, 0.1)) == {0.1: names - kept, 0.0: kept}


@pytest.mark.parametrize("grouping", [weight_decay_groups, muon_groups])
def test_an_embedding_that_is_the_head_too_keeps_its_scale(grouping: Any) -> None:
    model = DeepSeek(replace(CONFIG, tie_word_embeddings=True))
    groups = names_by_decay(model, grouping(model, 0.1))
    assert "embed_tokens.weight" in groups[0.0]
    assert "lm_head.weight" not in groups[0.1]


def test_an_embedding_under_any_name_keeps_its_scale_and_biases_do() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "line": nn.Linear(2, 2)})
    assert names_by_decay(model, weight_decay_groups(model, 0.1)) == {
        0.1: {"line.weight"},
        0.0: {"table.weight", "line.bias"},
    }


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert names_by_decay(model, weight_decay_groups(model, 0.1)) == {0.1: {"1.weight"}, 0.0: {"1.bias"}}
    model[1].bias.requires_grad_(False)
    assert [group["weight_decay"] for group in weight_decay_groups(model, 0.1)] == [0.1]
    hidden = DeepSeek(CONFIG).requires_grad_(False)
    assert muon_groups(hidden, 0.1) == []


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_on_zero_gradients_shrinks_what_decays_and_nothing_else(kind: Literal["adamw", "muon"]) -> None:
    model = DeepSeek(CONFIG)
    optimizer = build_optimizer(model, kind, **SETTINGS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if is_kept(name) else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=name)


def test_adamw_is_torchs_with_the_settings() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    ours = build_optimizer(model, "adamw", **SETTINGS)
    assert type(ours) is torch.optim.AdamW
    plain = [{"params": [other.weight], "weight_decay": 0.5}, {"params": [other.bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(plain, lr=0.1, betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False)
    for _ in range(3):
        gradient = torch.randn(2, 3)
        for line, optimizer in ((model, ours), (other, theirs)):
            line.weight.grad, line.bias.grad = gradient.clone(), gradient[:, 0].clone()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.bias, other.bias, rtol=1e-6, atol=0)
    assert all(group["fused"] for group in ours.param_groups)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_has_a_learning_rate_of_its_own(kind: Literal["adamw", "muon"], tied: bool) -> None:
    model = DeepSeek(replace(CONFIG, tie_word_embeddings=tied))
    optimizer = build_optimizer(model, kind, **SETTINGS, embedding_lr=0.7)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates == {name: 0.7 if name == "embed_tokens.weight" else 0.1 for name in names.values()}
    assert optimizer.param_groups[0]["lr"] == 0.1, "the first group's is the one that is logged"
    assert names_by_decay(model, optimizer.param_groups) == names_by_decay(model, weight_decay_groups(model, 0.5))
