"""Oracles: the tensors that a running model's autograd keeps, counted by storages, and ZeRO's published formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.memory import (
    Layout,
    activation_bytes,
    block_bytes,
    kv_cache_bytes,
    memory_per_device,
    routed_params,
    trained_params,
)
from ds_lightning.losses.load_balance import sequence_balance_loss
from ds_lightning.losses.next_token import mtp_labels, next_token_loss
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate
from tests.cost.shapes import SMALL, V3


def kept_bytes(config: DeepSeekConfig, rows: int, seq: int, *, mixed: bool, recompute: bool) -> int:
    """Run the loss of a training step forward, and add up what autograd holds besides weights and their copies."""
    model = DeepSeek(config)
    model.recompute = recompute
    sizes = {tuple(parameter.shape) for parameter in model.parameters()}
    sizes |= {tuple(shape[::-1]) for shape in sizes if len(shape) == 2}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and (not mixed or tuple(tensor.shape) not in sizes):
            held[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(config.vocab_size, (rows, seq))
    gates: list[Gate] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        hidden = model(ids, gates=gates)
        loss = next_token_loss(hidden, model.lm_head.weight, ids)
        states = model.mtp_hidden(ids, hidden, gates=gates)
        for depth, state in enumerate(states, start=1):
            loss = loss + next_token_loss(state, model.lm_head.weight, mtp_labels(ids, depth))
        loss = loss + sum(sequence_balance_loss(gate.scores, 2, seq_len=seq) for gate in gates)
    named = [hidden, *states, *(gate.weights for gate in gates)]
    held.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in named})
    head = (1 + config.num_nextn_predict_layers) * 4 * config.vocab_size * config.hidden_size if mixed else 0
    assert loss.isfinite()
    return (
        sum(storage.nbytes() for storage in held.values()) + head
    )  # in mixed precision left out as of a weight's shape


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, q_lora_rank=None, num_nextn_predict_layers=0), replace(SMALL, n_routed_experts=0)],
    ids=["all", "no query rank", "dense"],
)
def test_activations_are_what_autograd_keeps(config: DeepSeekConfig, mixed: bool) -> None:
    """Within 3 percent: the alignment of experts' rows is a mean, and a few numbers a token are left out."""
    kept = kept_bytes(config, 4, 256, mixed=mixed, recompute=False)
    predicted = activation_bytes(config, 4 * 256, mixed=mixed, recompute=False, on_cpu=True)
    assert predicted == pytest.approx(kept, rel=0.03)


def test_recomputation_keeps_the_inputs_of_blocks_and_one_block() -> None:
    """Without the block that is made again in the backward pass, which the forward pass does not show."""
    kept = kept_bytes(SMALL, 4, 256, mixed=False, recompute=True)
    predicted = activation_bytes(SMALL, 4 * 256, mixed=False, recompute=True, on_cpu=True)
    largest = max(block_bytes(SMALL, layer, 4 * 256, width=4, on_cpu=True) for layer in range(4))
    assert predicted - largest == pytest.approx(kept, rel=0.03)
    assert predicted < 0.6 * activation_bytes(SMALL, 4 * 256, mixed=False, recompute=False, on_cpu=True)


def test_with_recomputation_autocast_copies_the_weights_of_a_block_at_a_time() -> None:
    settings: dict[str, Any] = {"micro_rows": 4, "seq_len": 256, "mixed": True, "optimizer": "adamw"}
    kept, recomputed, sharded = (
        memory_per_device(SMALL, Layout(num_devices=1, **layout), **settings).weights
        for layout in ({}, {"recompute": True}, {"recompute": True, "zero_stage": 1})
    )
    total = trained_params(SMALL)
    assert kept == sharded == 2 * total, "DeepSpeed trains weights of 16 bits"
    # One block anew, or the forward's: all but the routed experts, whose copies live as long as their layer runs.
    assert recomputed == 2 * (total - routed_params(SMALL))
    assert recomputed < kept


def test_states_follow_the_formulas_of_zero() -> None:
    """ZeRO, figure 1, with K = 12 and gradients of 4 bytes instead of 2: (2 + 4 + K) P, divided stage by stage."""
    parameters, devices = trained_params(SMALL), 8

    def states(stage: int, *, num_devices: int = devices, offload: bool = False) -> tuple[float, float]:
        layout = Layout(num_devices=num_devices, zero_stage=stage, offload=offload)
        memory = memory_per_device(SMALL, layout, micro_rows=1, seq_len=64, mixed=True, optimizer="adamw")
        return (memory.weights + memory.gradients + memory.optimizer) / parameters, memory.host / parameters

    assert states(0, num_devices=1) == (2 + 4 + 12, 0)
    assert states(0) == (2 + 8 + 12, 0)  # with the buckets of DDP
    assert states(1) == pytest.approx((2 + 4 + 12 / devices, 0))
    assert states(2) == pytest.approx((2 + (4 + 12) / devices, 0))
    assert states(3) == pytest.approx(((2 + 4 + 12) / devices, 0))
    assert states(2, offload=True) == pytest.approx((2 + 4 / devices, 12 / devices))


def test_fp32_needs_no_second_weights_and_muon_one_moment() -> None:
    def optimizer(kind: str, *, mixed: bool) -> float:
        layout = Layout(num_devices=1)
        return memory_per_device(SMALL, layout, micro_rows=1, seq_len=8, mixed=mixed, optimizer=kind).optimizer

    parameters, tables = trained_params(SMALL), 2 * 512 * 128 + 3 * 8 * 128
    assert optimizer("adamw", mixed=False) == 8 * parameters
    assert optimizer("adamw", mixed=True) == 12 * parameters
    assert optimizer("muon", mixed=False) == pytest.approx(4 * parameters + 4 * tables)


def test_experts_and_layers_are_divided_over_devices() -> None:
    routed, total = routed_params(V3), trained_params(V3)
    layout = Layout(num_devices=2048, zero_stage=1, expert_parallel=64, pipeline_parallel=16)
    memory = memory_per_device(V3, layout, micro_rows=1, seq_len=4096, mixed=True, optimizer="adamw")
    assert memory.weights == pytest.approx(2 * ((total - routed) / 16 + routed / 1024))
    assert memory.optimizer == pytest.approx(12 * total / 2048)
    assert routed == 59 * 256 * 3 * 7168 * 2048


def test_the_latent_cache_is_1152_bytes_a_token_and_layer() -> None:
    """Of DeepSeek-V3 in 16 bits: 512 + 64 numbers."""
    assert kv_cache_bytes(V3, 10) == 10 * 61 * 1152
