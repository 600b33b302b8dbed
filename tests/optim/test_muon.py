"""Muon against the singular value decomposition, a step written out plainly, and torch's AdamW."""

import copy

import pytest
import torch
from torch import nn

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models import DeepSeek
from ds_lightning.optim import Muon, build_optimizer, muon_groups
from ds_lightning.optim.muon import orthogonalise


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def one_group(parameter: nn.Parameter, **settings: object) -> Muon:
    return Muon([{"params": [parameter], "muon": True, "weight_decay": 0.1, **settings}], lr=0.01)


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 16, 16), (2, 1, 8)])
def test_orthogonalise_keeps_the_singular_vectors_and_moves_the_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = matrix(*shape)
    out = orthogonalise(matrices).double()
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    polar = u @ vh
    rotated = u.mT @ out @ vh.mT  # diagonal if the singular vectors are the same
    values = rotated.diagonal(dim1=-2, dim2=-1)
    well = (
        s / torch.linalg.matrix_norm(matrices.double(), keepdim=True).squeeze(-1) > 0.0102
    )  # of a sum of squares of 1
    assert (values[well] - 1).abs().max() < 0.28, "0.2694, and bfloat16"
    assert values.max() < 1.28
    off = rotated - torch.diag_embed(values)
    assert off.abs().max() < 0.05, "bfloat16 keeps about two digits"
    cosine = (out * polar).sum((-2, -1)) / (out.norm(dim=(-2, -1)) * polar.norm(dim=(-2, -1)))
    assert cosine.min() > 0.95


def test_singular_values_from_a_hundredth_to_one_end_within_027_of_one() -> None:
    start = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0105, 0.001])
    start /= start.norm()
    out = orthogonalise(torch.diag(start)[None])[0].diagonal()
    assert (out[start > 0.0102] - 1).abs().max() < 0.28
    assert 0.05 < out[-1] < 78.4 * start[-1], "those below grow too"


def test_two_steps_are_momentum_orthogonalised_scaled_and_decayed() -> None:
    start, gradients = matrix(6, 10), [matrix(6, 10) + 1, matrix(6, 10) - 2]
    parameter = nn.Parameter(start.clone())
    optimizer = one_group(parameter)
    expected, momentum = start.clone(), torch.zeros(6, 10)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        nesterov = 0.05 * gradient + 0.95 * momentum
        update = orthogonalise(nesterov[None])[0]
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 10**0.5 * update
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_an_update_has_the_size_of_one_of_adamw() -> None:
    parameter = nn.Parameter(torch.zeros(64, 96))
    optimizer = one_group(parameter)
    parameter.grad = matrix(64, 96)
    optimizer.step()
    rms = parameter.detach().square().mean().sqrt() / 0.01
    assert 0.15 < rms < 0.25, "0.2 learning rates, as arXiv:2502.16982 section 2.2 says of AdamW"


def test_each_expert_and_each_of_two_joined_projections_is_orthogonal_by_itself() -> None:
    gradient = matrix(3, 8, 10)  # three experts, gate and up of 4 rows each
    joined = nn.Parameter(torch.zeros(3, 8, 10))
    joined.grad = gradient.clone()
    one_group(joined, parts=2).step()
    alone = []
    for expert in range(3):
        halves = []
        for half in range(2):
            single = nn.Parameter(torch.zeros(4, 10))
            single.grad = gradient[expert, 4 * half : 4 * half + 4].clone()
            one_group(single).step()
            halves.append(single.detach())
        alone.append(torch.cat(halves))
    # One batched product and many single ones may round bfloat16 differently.
    torch.testing.assert_close(joined.detach(), torch.stack(alone), rtol=0.03, atol=1e-4)


def test_what_is_no_hidden_matrix_gets_torchs_adamw() -> None:
    values = [matrix(5, 3), matrix(7)]
    ours = [nn.Parameter(value.clone()) for value in values]
    theirs = [nn.Parameter(value.clone()) for value in values]
    muon = Muon([{"params": ours, "muon": False, "weight_decay": 0.1}], lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=True)
    for step in range(3):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = matrix(*left.shape) * (step + 1)
            right.grad = left.grad.clone()
        muon.step()
        adamw.step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_a_restored_optimizer_goes_on_bitwise() -> None:
    parameter = nn.Parameter(matrix(6, 4))
    optimizer = one_group(parameter)
    parameter.grad = matrix(6, 4)
    optimizer.step()
    twin = nn.Parameter(parameter.detach().clone())
    other = one_group(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, chosen in ((parameter, optimizer), (twin, other)):
        one.grad = matrix(6, 4) + 1
        chosen.step()
    assert torch.equal(parameter, twin)


def test_the_count_of_steps_is_restored_to_the_device_of_the_weights() -> None:
    here, there = nn.Parameter(matrix(5)), nn.Parameter(matrix(5).to("meta"))
    here.grad = matrix(5)
    ours, theirs = (Muon([{"params": [p], "muon": False, "weight_decay": 0.1}], lr=0.01) for p in (here, there))
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert {key: value.device.type for key, value in theirs.state[there].items()} == {
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
        "step": "meta",
    }


def test_a_parameter_without_gradient_is_left_alone() -> None:
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = matrix(4, 4)
    Muon([{"params": [still, moved], "muon": True, "weight_decay": 0.1}], lr=0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moved, torch.ones(4, 4))


def test_groups_send_hidden_matrices_to_muon_and_every_parameter_to_one_group() -> None:
    config = DeepSeekConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    model = DeepSeek(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    where = {}
    for group in muon_groups(model, 0.1):
        for parameter in group["params"]:
            assert id(parameter) not in where
            where[id(parameter)] = group
    assert where.keys() == names.keys()
    for key, group in where.items():
        name = names[key]
        adamw = "norm" in name or name.endswith(("lm_head.weight", "embed_tokens.weight", "mlp.gate.weight"))
        assert group["muon"] is not adamw, name
        assert group["parts"] == (2 if name.endswith("gate_up_proj") else 1), name
        assert group["weight_decay"] == (0.0 if "norm" in name or "embed_tokens" in name else 0.1), name
    assert isinstance(build_optimizer(model, "muon", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), Muon)
