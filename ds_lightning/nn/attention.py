"""Multi-head latent attention (MLA), the form used in training."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ds_lightning.config import DeepSeekConfig
from ds_lightning.nn.linear import Linear
from ds_lightning.nn.norm import RMSNorm
from ds_lightning.ops.attention import causal_attention
from ds_lightning.ops.rope import apply_rope, yarn_temperature


class MLA(nn.Module):
    """Attention whose keys and values are made from one low-rank latent a token.

    DeepSeek-V2 (arXiv:2405.04434, section 2.1, "Multi-Head Latent Attention"): a token leaves behind a latent of
    ``kv_lora_rank`` channels and one rotary key of ``qk_rope_head_dim`` channels that all heads share; content and
    position parts of queries and keys are kept apart ("Decoupled Rotary Position Embedding"). Names are those of the
    released weights.
    """

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.config = config
        heads, rank = config.num_attention_heads, config.q_lora_rank
        if rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, rank)
            self.q_a_layernorm = RMSNorm(rank)  # released code leaves the latents' eps at 1e-6, whatever rms_norm_eps
            self.q_b_proj = Linear(rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)
        self.scale = config.qk_head_dim**-0.5
        if config.rope_scaling is not None:
            self.scale *= yarn_temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "seq pairs"],
        sin: Float[Tensor, "seq pairs"],
        segment_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Attend from each position to those before it, within its document where ``segment_ids`` are given."""
        config = self.config
        query = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))  # [batch seq heads nope+rope]
        q_nope, q_rope = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, value = key_value.split((config.qk_nope_head_dim, config.v_head_dim), -1)

        q_rope = apply_rope(q_rope, cos, sin)
        k_rope = apply_rope(k_rope.unsqueeze(-2), cos, sin).expand(-1, -1, config.num_attention_heads, -1)
        out = causal_attention(
            torch.cat((q_nope.transpose(1, 2), q_rope.transpose(1, 2)), -1),  # [batch heads seq nope+rope]
            torch.cat((k_nope.transpose(1, 2), k_rope.transpose(1, 2)), -1),
            value.transpose(1, 2),
            scale=self.scale,
            segment_ids=segment_ids,
        )
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return mixed
