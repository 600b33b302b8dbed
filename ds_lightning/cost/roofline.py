"""The least time that an optimizer step can take: arithmetic, memory traffic and communication of one device.

A published efficiency holds what it was measured on together with its communication; this bound tells where a plan
asks for what the links or the memory cannot give.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.memory import (
    Layout,
    activation_bytes,
    adamw_only_params,
    routed_params,
    trained_params,
)
from ds_lightning.cost.prices import Hardware
from ds_lightning.flops import train_flops_per_token

NEWTON_SCHULZ_STEPS = 5
"""Iterations of Muon's orthogonalisation (``optim.muon``)."""


@dataclass(frozen=True, kw_only=True)
class StepBound:
    """Seconds of one optimizer step on each device, were each part alone and at its peak."""

    compute: float
    """Products at the dense bfloat16 peak."""
    memory: float
    """Weights and activations to and from memory."""
    optimizer: float
    """States of the optimizer to and from memory; Muon's products too."""
    data_parallel: float
    """Gradients and weights between devices that hold the same."""
    expert_parallel: float
    """Tokens to their experts and back."""

    @property
    def total(self) -> float:
        """Communication hidden behind arithmetic as far as it goes, the optimizer after both."""
        return max(self.compute, self.memory, self.data_parallel + self.expert_parallel) + self.optimizer

    @property
    def bound_by(self) -> str:
        """The part that the rest of a step waits for."""
        parts = {
            "compute": self.compute,
            "memory": self.memory,
            "communication": self.data_parallel + self.expert_parallel,
        }
        return max(parts, key=lambda name: parts[name])

    def to_dict(self) -> dict[str, float | str]:
        """Return the parts in seconds, their sum and what bounds it."""
        return {**vars(self), "total": self.total, "bound_by": self.bound_by}


def muon_flops(config: DeepSeekConfig) -> float:
    """Return the FLOPs of one orthogonalisation of all matrices of hidden layers.

    An iteration on a matrix of r rows and c columns, r the fewer, is 4 r^2 c + 2 r^3.
    """
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    matrices = [
        (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        (config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        (heads * config.v_head_dim, hidden),
    ]
    query = heads * config.qk_head_dim
    matrices += [(hidden, query)] if rank is None else [(hidden, rank), (rank, query)]
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    flops = layers * sum(_orthogonal(*matrix) for matrix in matrices)
    flops += (layers - config.num_moe_layers) * 3 * _orthogonal(config.intermediate_size, hidden)
    experts = config.n_routed_experts * _orthogonal(config.moe_intermediate_size, hidden)
    shared = _orthogonal(config.n_shared_experts * config.moe_intermediate_size, hidden)
    flops += config.num_moe_layers * 3 * (experts + shared)
    return flops + config.num_nextn_predict_layers * _orthogonal(hidden, 2 * hidden)


def _orthogonal(rows: int, columns: int) -> float:
    few, many = min(rows, columns), max(rows, columns)
    return NEWTON_SCHULZ_STEPS * (4.0 * few**2 * many + 2.0 * few**3)


def step_bound(
    config: DeepSeekConfig,
    layout: Layout,
    hardware: Hardware,
    *,
    tokens_per_step: float,
    seq_len: int,
    micro_batches: float,
    mixed: bool,
    optimizer: str,
) -> StepBound:
    """Return the least seconds of an optimizer step.

    Args:
        config: Shape of the model.
        layout: How it is divided.
        hardware: The devices.
        tokens_per_step: Tokens of the whole step, over all devices.
        seq_len: Tokens a row.
        micro_batches: Micro-batches that each device runs in a step.
        mixed: Products in 16 bits over fp32 weights.
        optimizer: ``adamw`` or ``muon``.
    """
    links, width = hardware.links, 2 if mixed else 4
    peak = hardware.bf16_tflops * 1e12
    tokens = tokens_per_step / layout.num_devices
    total, routed = trained_params(config), routed_params(config)
    here = (total - routed) / layout.pipeline_parallel + routed / (layout.pipeline_parallel * layout.expert_parallel)
    flops = tokens * train_flops_per_token(config, seq_len) * (4 / 3 if layout.recompute else 1)
    kept = activation_bytes(config, max(int(tokens), 1), mixed=mixed, recompute=False)
    traffic = 3 * width * here * micro_batches + 2 * kept  # weights in forward and twice in backward; written and read
    owned = here
    if layout.zero_stage:  # of each parameter its share of the devices that hold it, which all layouts use up
        owned = total / layout.num_devices
    update = owned * (28.0 if optimizer == "adamw" else _muon_traffic(config)) / (links.memory_gb_per_s * 1e9)
    if optimizer == "muon":
        update += muon_flops(config) * owned / total / peak
    return StepBound(
        compute=flops / peak,
        memory=traffic / (links.memory_gb_per_s * 1e9),
        optimizer=update,
        data_parallel=_data_parallel_seconds(layout, hardware, total - routed, routed, micro_batches, width),
        expert_parallel=_expert_parallel_seconds(config, layout, hardware, tokens, width),
    )


def _muon_traffic(config: DeepSeekConfig) -> float:
    """Bytes a parameter: momentum, gradient and weight read, momentum and weight written; AdamW for the rest."""
    share = adamw_only_params(config) / trained_params(config)
    return 20.0 * (1 - share) + 28.0 * share


def _link(hardware: Hardware, devices: int) -> float:
    """Bytes a second of the slowest link among devices that are placed node by node."""
    links = hardware.links
    return 1e9 * (links.node_gb_per_s if devices <= links.node_devices else links.network_gb_per_s)


def _data_parallel_seconds(
    layout: Layout, hardware: Hardware, dense: float, routed: float, micro_batches: float, width: int
) -> float:
    """Ring traffic of gradients and weights (arXiv:1910.02054, section 7): 2 parts without ZeRO-3, 3 with it."""
    seconds = 0.0
    for count, over in (
        (dense / layout.pipeline_parallel, layout.data_parallel),
        (
            routed / layout.pipeline_parallel / layout.expert_parallel,
            layout.data_parallel // layout.expert_parallel,
        ),
    ):
        if over < 2:
            continue
        ring = (over - 1) / over * count / _link(hardware, layout.num_devices // layout.pipeline_parallel)
        if layout.zero_stage >= 3:
            seconds += ring * (2 * width + 4) * micro_batches  # weights gathered twice, gradients scattered once
        elif layout.zero_stage >= 1:
            seconds += ring * (width + 4)
        else:
            seconds += ring * 2 * 4
    return seconds


def _expert_parallel_seconds(
    config: DeepSeekConfig, layout: Layout, hardware: Hardware, tokens: float, width: int
) -> float:
    """Dispatch and combine of every routed layer, forward and backward.

    Where experts are grouped by node a token's copies cross to ``topk_group`` nodes at most (arXiv:2412.19437, section
    2.1.2, "Node-Limited Routing").
    """
    if layout.expert_parallel == 1:
        return 0.0
    nodes = -(-layout.expert_parallel // hardware.links.node_devices)
    limit = config.topk_group if config.n_group > 1 else config.num_experts_per_tok
    copies = config.num_experts_per_tok if nodes == 1 else min(config.num_experts_per_tok, limit, nodes)
    crossing = tokens * config.num_moe_layers * copies * config.hidden_size * 2 * width * 2
    return crossing * (layout.expert_parallel - 1) / layout.expert_parallel / _link(hardware, layout.expert_parallel)
