"""Memory of one device in closed form: what training keeps, as this package's model and losses keep it.

Model states follow ZeRO (arXiv:1910.02054, section 5): stage 1 divides the optimizer's states over the devices that
hold the same weights, stage 2 the gradients too, stage 3 the weights too. Activations are the tensors that the
backward pass of ``models``, ``nn`` and ``ops`` reads; a test counts them in a running model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_lightning.config import DeepSeekConfig
from ds_lightning.flops import param_count

ALIGN = 64
"""Rows that an expert's part is rounded up to (``ops.experts``)."""

CHUNK_TOKENS = 512
"""Rows of logits that exist at once (``ops.cross_entropy``)."""

USABLE = 0.92
"""Part of a device's memory that a plan may fill: the rest is the driver's, the allocator's and communication's."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How training is divided over devices."""

    num_devices: int
    zero_stage: int = 0
    offload: bool = False
    """Keep the optimizer's states in the memory of the host; needs stage 1 or more."""
    recompute: bool = False
    """Keep only the inputs of blocks."""
    expert_parallel: int = 1
    """Devices that share the routed experts of a layer."""
    pipeline_parallel: int = 1
    """Devices that share the layers."""

    @property
    def data_parallel(self) -> int:
        """Devices that hold the same layers."""
        return self.num_devices // self.pipeline_parallel

    @property
    def runs_today(self) -> bool:
        """Whether this package trains in this layout."""
        return not self.zero_stage and not self.offload and self.expert_parallel == 1 and self.pipeline_parallel == 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    weights: float
    gradients: float
    optimizer: float
    """States of the optimizer and, in mixed precision, its fp32 weights."""
    activations: float
    """What the forward pass keeps of one micro-batch."""
    workspace: float
    """The largest of what exists only for a moment: logits, gradients within an expert layer, gathered weights."""
    host: float
    """In the host's memory, a device."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace

    def to_dict(self) -> dict[str, float]:
        """Return the parts and their sum in GB (1e9 bytes)."""
        return {name: value / 1e9 for name, value in {**vars(self), "total": self.total}.items()}


def routed_params(config: DeepSeekConfig) -> int:
    """Return the weights of all routed experts, those of multi-token prediction included."""
    return config.num_moe_layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size


def trained_params(config: DeepSeekConfig) -> int:
    """Return the parameters that have a gradient: all but the selection biases."""
    biases = config.n_routed_experts * config.num_moe_layers if config.topk_method == "noaux_tc" else 0
    return param_count(config, include_mtp=True) - biases


def adamw_only_params(config: DeepSeekConfig) -> int:
    """Return the parameters that Muon leaves to AdamW: embedding, head, routers; norms are too few to count."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return tables + config.num_moe_layers * config.n_routed_experts * config.hidden_size


def memory_per_device(
    config: DeepSeekConfig,
    layout: Layout,
    *,
    micro_rows: int,
    seq_len: int,
    mixed: bool,
    optimizer: str,
    on_cpu: bool = False,
) -> Memory:
    """Return the bytes of one device in training.

    Args:
        config: Shape of the model.
        layout: How it is divided.
        micro_rows: Rows of a micro-batch on a device.
        seq_len: Tokens a row.
        mixed: Products in 16 bits over fp32 weights; otherwise all in fp32.
        optimizer: ``adamw`` or ``muon``.
        on_cpu: Whether the device is a CPU.
    """
    total, routed = trained_params(config), routed_params(config)
    pipeline, stage = layout.pipeline_parallel, layout.zero_stage
    parts = (
        ((total - routed) / pipeline, layout.data_parallel),
        (routed / pipeline / layout.expert_parallel, layout.data_parallel // layout.expert_parallel),
    )
    moments = 8.0
    if optimizer == "muon":
        moments = 4 + 4 * adamw_only_params(config) / total
    states = moments + (4 if mixed else 0)
    # Lightning's DDP copies gradients into buckets of their own
    gradient = 8 if stage == 0 and layout.data_parallel > 1 else 4
    weights = sum((2 if mixed else 4) * count / (over if stage >= 3 else 1) for count, over in parts)
    if mixed and not stage and layout.recompute:  # copies that autocast keeps of a forward, or one block's anew
        block = max(_block_params(config, layer) for layer in _layers(config))
        weights = 2.0 * max(total - routed, block) / pipeline
    gradients = sum(gradient * count / (over if stage >= 2 else 1) for count, over in parts)
    kept = sum(states * count / (over if stage >= 1 else 1) for count, over in parts)
    tokens = micro_rows * seq_len
    width = 2 if mixed else 4
    gathered = 0.0
    if stage >= 3:
        gathered = width * max(_block_params(config, layer) for layer in _layers(config)) / layout.expert_parallel
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=0.0 if layout.offload else kept,
        activations=activation_bytes(config, tokens, mixed=mixed, recompute=layout.recompute, on_cpu=on_cpu),
        workspace=max(
            _logit_bytes(config, tokens, width),
            _expert_workspace(config, layout, tokens, width, kernels=on_cpu and not mixed),
        )
        + gathered,
        host=kept if layout.offload else 0.0,
    )


def activation_bytes(
    config: DeepSeekConfig, tokens: int, *, mixed: bool, recompute: bool, on_cpu: bool = False
) -> float:
    """Return the bytes that the backward pass of one micro-batch reads, weights and their copies aside.

    In a pipeline the first stage holds as many micro-batches as there are stages, of its share of the layers each: in
    sum those of the whole model once (1F1B, arXiv:2006.09503).

    Args:
        config: Shape of the model.
        tokens: Tokens of the micro-batch.
        mixed: Products in 16 bits.
        recompute: Keep only the inputs of blocks, and one block's tensors at a time.
        on_cpu: Count what the forms for a CPU keep, in fp32 its kernels. A GPU pads values to the width of the keys,
            and keeps them with the output.
    """
    width, hidden = 2 if mixed else 4, config.hidden_size
    blocks = [block_bytes(config, layer, tokens, width=width, on_cpu=on_cpu) for layer in _layers(config)]
    depth = config.num_nextn_predict_layers
    kept = sum(blocks)
    if recompute:
        kept = len(blocks) * 4.0 * tokens * hidden + max(blocks)
    ends = (1 + depth) * (_norm(hidden) + 2 * width * hidden)  # last norm; hidden state and its gradient
    prediction = depth * (2 * _norm(hidden) + 2 * width * hidden)  # two norms, and both side by side
    if on_cpu and not mixed:
        prediction -= depth * 4 * hidden  # what comes into the second norm is a hidden state that is kept anyway
    head_gradients = (1 + depth) * 4.0 * config.vocab_size * hidden
    return kept + tokens * (ends + prediction + 8) + head_gradients


def block_bytes(config: DeepSeekConfig, layer: int, tokens: int, *, width: int, on_cpu: bool = False) -> float:
    """Return the bytes that the backward pass of one block reads."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    token = 2 * (_norm(hidden) + width * hidden)  # both norms with their outputs
    token += _norm(config.kv_lora_rank) + width * config.kv_lora_rank
    if rank is not None:
        token += _norm(rank) + width * rank
    kernels, rope = on_cpu and width == 4, config.qk_rope_head_dim
    if kernels:  # queries, keys and values as they were projected, the output, and a log-sum-exp
        token += 4 * heads * (config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim + 1)
        token += 4 * rope  # what the latent was split from; the latent's norm, counted above, keeps the rest of it
    else:
        token += 2 * width * heads * config.qk_head_dim  # queries and keys
        if on_cpu:
            token += width * heads * config.v_head_dim
        else:
            token += heads * (2 * width * max(config.qk_head_dim, config.v_head_dim) + 4)  # value, output, log-sum-exp
        token += width * heads * config.v_head_dim  # input of the output projection
        if width < 4:  # what is turned by position, in fp32; without a copy it keeps all that it is a part of
            token += 4 * rope * (heads + 1)
        else:
            token += 4 * (heads * config.qk_head_dim + config.kv_lora_rank + rope)
    if not config.is_moe_layer(layer):
        return tokens * (token + 4.0 * width * config.intermediate_size)
    topk, ffn = config.num_experts_per_tok, config.moe_intermediate_size
    token += 4 * width * config.n_shared_experts * ffn
    token += 4 * config.n_routed_experts + 4 * hidden * (width < 4)  # affinities, fp32 input of the router
    token += topk * (8 + 8 + 4 + 4) + 4  # indices, places, gate values before and after their sum
    if kernels:
        return tokens * (token + topk * (8 + 8.0 * ffn))  # and the order of slots; gate and up outputs
    row = width * (hidden + 2 * ffn + 1) + 8
    return tokens * float(token) + _rows(config, tokens) * row


def kv_cache_bytes(config: DeepSeekConfig, tokens: float, *, width: int = 2) -> float:
    """Return the bytes of the latent cache of generation: one latent and one rotary key a token and layer."""
    return tokens * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * width


def _norm(size: int) -> int:
    """The normalised input in fp32 and its scale."""
    return 4 * size + 4


def _layers(config: DeepSeekConfig) -> range:
    return range(config.num_hidden_layers + config.num_nextn_predict_layers)


def _rows(config: DeepSeekConfig, tokens: int) -> float:
    """Rows of all experts, with half of the alignment lost in the mean."""
    return tokens * config.num_experts_per_tok + config.n_routed_experts * ALIGN / 2


def _block_params(config: DeepSeekConfig, layer: int) -> int:
    one = replace(config, num_hidden_layers=layer + 1, num_nextn_predict_layers=0)
    if layer == 0:
        return param_count(one) - config.hidden_size * (config.vocab_size * (2 - config.tie_word_embeddings) + 1)
    return param_count(one) - param_count(replace(one, num_hidden_layers=layer))


def _logit_bytes(config: DeepSeekConfig, tokens: int, width: int) -> float:
    """A chunk of logits, as products give them, in fp32 and as a gradient, and the head's gradient by one chunk."""
    chunk = min(tokens, CHUNK_TOKENS)
    return config.vocab_size * (chunk * (4.0 + 2 * width) + width * config.hidden_size)


def _expert_workspace(config: DeepSeekConfig, layout: Layout, tokens: int, width: int, *, kernels: bool) -> float:
    """Gradients and recomputed tensors within the backward pass of one expert layer, and its weights' gradients."""
    if not config.num_moe_layers:
        return 3.0 * width * tokens * config.intermediate_size
    hidden, ffn = config.hidden_size, config.moe_intermediate_size
    experts = config.n_routed_experts / layout.expert_parallel
    if kernels:  # an input's gradient, by slot and by token; the rest is of a few rows
        return width * (tokens * (config.num_experts_per_tok + 1) * hidden + experts * 3.0 * hidden * ffn)
    return width * (_rows(config, tokens) * (2 * hidden + 7 * ffn) + experts * 3.0 * hidden * ffn)
