"""Parameters and FLOPs of a DeepSeek model in closed form; standard library only.

Counters that watch a running model miss grouped matmuls and Triton kernels, and need the model to exist. These
formulas need only a config. A multiply and an add are two FLOPs; training is three times the forward (the backward
is two matmuls for each one); recomputation is not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_lightning.config import DeepSeekConfig


def param_count(config: DeepSeekConfig, *, include_mtp: bool = False) -> int:
    """Return the parameters of the whole model, selection biases included.

    DeepSeek-V3's shape has 671,026,419,200, the "671B" of arXiv:2412.19437 once rounded.

    Args:
        config: Shape of the model.
        include_mtp: Count the multi-token prediction modules too. They share embedding and head with the model.
            Published sizes leave them out.
    """
    count = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    count += sum(_block_params(config, layer) for layer in range(config.num_hidden_layers))
    if include_mtp:
        count += sum(_mtp_params(config, layer) for layer in _mtp_layers(config))
    return count


def active_param_count(
    config: DeepSeekConfig, *, include_embedding: bool = True, include_head: bool = True, include_mtp: bool = False
) -> int:
    """Return the parameters that one token passes through: all but the routed experts it does not visit.

    DeepSeek-V3's shape: 37.55 billion with embedding and head, 36.63 with the head only, 35.70 with neither.

    Args:
        config: Shape of the model.
        include_embedding: Count the embedding table, of which a token reads one row.
        include_head: Count the output head. With tied weights the shared matrix counts once if either is asked for.
        include_mtp: Count the multi-token prediction modules too.
    """
    unused_experts = (config.n_routed_experts - config.num_experts_per_tok) * _mlp_params(
        config, config.moe_intermediate_size
    )
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if include_mtp else 0)
    count = param_count(config, include_mtp=include_mtp)
    count -= sum(unused_experts for layer in range(layers) if config.is_moe_layer(layer))
    table = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        return count if include_embedding or include_head else count - table
    return count - table * (not include_embedding) - table * (not include_head)


def forward_flops_per_token(
    config: DeepSeekConfig, seq_len: int, *, causal: bool = True, include_mtp: bool = True
) -> int:
    """Return the FLOPs of one forward pass per token: every matmul, nothing else.

    Counted: all linear layers of the experts a token visits, the router, the output head and attention. Not counted:
    the embedding lookup, norms, softmax, rotary embedding. Keys and values are expanded from the latent, as in
    training and prefill; decoding with absorbed projections costs something else.

    Args:
        config: Shape of the model.
        seq_len: Tokens a sequence.
        causal: Count the half of the attention square that a causal kernel computes; otherwise all of it.
        include_mtp: Count the config's multi-token prediction modules, each with one more pass of the head.

    Raises:
        ValueError: If ``seq_len`` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}, expected at least 1")
    hidden = config.hidden_size
    head = 2 * hidden * config.vocab_size
    scores_and_mix = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len
    attention = scores_and_mix // 2 if causal else scores_and_mix
    flops = head
    for layer in range(config.num_hidden_layers):
        flops += 2 * _linear_params_of_token(config, layer) + attention
    if include_mtp:
        for layer in _mtp_layers(config):
            eh_proj = 2 * (2 * hidden) * hidden
            flops += eh_proj + 2 * _linear_params_of_token(config, layer) + attention + head
    return flops


def train_flops_per_token(
    config: DeepSeekConfig, seq_len: int, *, causal: bool = True, include_mtp: bool = True
) -> int:
    """Return the FLOPs of one forward and backward pass per token: three times the forward.

    DeepSeek-V3's shape at 4,096 tokens, causal: 250.45e9 without multi-token prediction, 260.64e9 with one module.
    Unlike :func:`param_count` this counts the config's multi-token prediction modules unless told not to: they are
    no part of a model's published size, but they are part of the work of training it.

    Args:
        config: Shape of the model.
        seq_len: Tokens a sequence.
        causal: Count half of the attention square.
        include_mtp: Count the config's multi-token prediction modules.

    Raises:
        ValueError: If ``seq_len`` is not positive.
    """
    return 3 * forward_flops_per_token(config, seq_len, causal=causal, include_mtp=include_mtp)


def _mtp_layers(config: DeepSeekConfig) -> range:
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def _mtp_params(config: DeepSeekConfig, layer: int) -> int:
    """Eh_proj, enorm, hnorm, the norm before the shared head, and one block."""
    hidden = config.hidden_size
    return 2 * hidden * hidden + 3 * hidden + _block_params(config, layer)


def _block_params(config: DeepSeekConfig, layer: int) -> int:
    norms = 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)
    count = _attention_linear_params(config) + norms
    if not config.is_moe_layer(layer):
        return count + _mlp_params(config, config.intermediate_size)
    count += config.n_routed_experts * _mlp_params(config, config.moe_intermediate_size)
    count += _mlp_params(config, config.n_shared_experts * config.moe_intermediate_size)
    count += config.n_routed_experts * config.hidden_size
    return count + (config.n_routed_experts if config.topk_method == "noaux_tc" else 0)


def _linear_params_of_token(config: DeepSeekConfig, layer: int) -> int:
    """Weights of the matmuls of one block that one token passes through."""
    count = _attention_linear_params(config)
    if not config.is_moe_layer(layer):
        return count + _mlp_params(config, config.intermediate_size)
    experts = config.num_experts_per_tok + config.n_shared_experts
    return (
        count
        + experts * _mlp_params(config, config.moe_intermediate_size)
        + config.n_routed_experts * (config.hidden_size)
    )


def _attention_linear_params(config: DeepSeekConfig) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        query = hidden * heads * config.qk_head_dim
    else:
        query = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    kv_a = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    kv_b = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + kv_a + kv_b + heads * config.v_head_dim * hidden


def _mlp_params(config: DeepSeekConfig, width: int) -> int:
    """Gate, up and down projection."""
    return 3 * config.hidden_size * width
