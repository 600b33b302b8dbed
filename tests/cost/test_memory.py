"""Oracles: the tensors that a running model's autograd keeps, counted by storages, and ZeRO's published formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.memory import (
    activation_bytes,
)
from ds_lightning.losses.load_balance import sequence_balance_loss
from ds_lightning.losses.next_token import mtp_labels, next_token_loss
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate

SMALL = DeepSeekConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=3,
    intermediate_size=320,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=40,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=40,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=96,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)


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
    predicted = activation_bytes(config, 4 * 256, mixed=mixed, recompute=False, padded_value=False)
    assert predicted == pytest.approx(kept, rel=0.03)
