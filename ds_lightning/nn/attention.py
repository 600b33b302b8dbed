"""Multi-head latent attention (MLA): the form used in training, and the absorbed form that decodes from latents."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ds_lightning.config import DeepSeekConfig
from ds_lightning.nn.linear import Linear
from ds_lightning.nn.norm import RMSNorm
from ds_lightning.ops.latent_attention import latent_attention
from ds_lightning.ops.rope import apply_rope, yarn_temperature
from ds_lightning.ops.rotary_attention import rotary_attention
from ds_lightning.ops.shared_prompts import SharedPrompts


class Absorbed(NamedTuple):
    """The two halves of ``kv_b_proj``, as factors of queries and outputs instead of keys and values."""

    key: Float[Tensor, "heads nope kv_rank"]
    value: Float[Tensor, "heads kv_rank v_dim"]


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
        latents: list[Tensor] | None = None,
        shared: SharedPrompts | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Attend from each position to those before it, within its document where ``segment_ids`` are given.

        In a batch of ``shared`` prompts, that is from a completion to its prompt and to what it has itself before.
        Where ``latents`` are given, what :meth:`decode` needs of each position is appended: its normalised latent and
        its rotated key, [batch seq kv_rank+rope].
        """
        config = self.config
        query = self._queries(x)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        latent = self.kv_a_layernorm(latent)
        key_value = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
        if latents is not None:
            latents.append(torch.cat((latent, apply_rope(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)), -1))
        out = rotary_attention(
            query, key_value, k_rope, cos, sin, scale=self.scale, segment_ids=segment_ids, shared=shared
        )
        mixed: Tensor = self.o_proj(out.flatten(-2))
        return mixed

    def absorb(self) -> Absorbed:
        """Return the weights of :meth:`decode` that no module holds in that form.

        They are read off the projection of the identity: exact, in the precision that products run in, and right
        under a strategy that brings a module's weights together only while it runs.
        """
        config, weight = self.config, self.kv_b_proj.weight
        identity = torch.eye(config.kv_lora_rank, dtype=weight.dtype, device=weight.device)
        columns = self.kv_b_proj(identity).unflatten(-1, (config.num_attention_heads, -1))  # [kv_rank heads nope+v_dim]
        key, value = columns.split((config.qk_nope_head_dim, config.v_head_dim), -1)
        return Absorbed(key.permute(1, 2, 0).contiguous(), value.transpose(0, 1).contiguous())

    def decode(
        self,
        x: Float[Tensor, "rows hidden"],
        cos: Float[Tensor, "rows pairs"],
        sin: Float[Tensor, "rows pairs"],
        cache: Float[Tensor, "rows seq latent"],
        positions: Int[Tensor, " rows"],
        bias: Float[Tensor, "rows seq"],
        absorbed: Absorbed,
    ) -> Float[Tensor, "rows hidden"]:
        """Attend from one new token a row to the latents of that row; keys and values are never made.

        DeepSeek-V2 (arXiv:2405.04434, section 2.1.2): the key half of ``kv_b_proj`` is absorbed into the query and its
        value half into the output, so that all heads read one cache of ``kv_lora_rank + qk_rope_head_dim`` numbers a
        token. Equals :meth:`forward` at the row's last position, but for rounding.

        Args:
            x: Normalised input of the new tokens.
            cos: Rotary table at each row's position.
            sin: The same.
            cache: What :meth:`forward` appends to ``latents``; the new token's entry is written at ``positions``.
            positions: Index of the new token in its row.
            bias: Zero where a row may look, minus infinity behind its new token.
            absorbed: From :meth:`absorb`.
        """
        config = self.config
        q_nope, q_rope = self._queries(x).split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        rotary = torch.cat((q_rope, k_rope.unsqueeze(-2)), -2)  # [rows heads+1 rope]
        q_rope, k_rope = apply_rope(rotary[None], cos, sin)[0].split((config.num_attention_heads, 1), -2)
        entry = torch.cat((self.kv_a_layernorm(latent), k_rope.squeeze(-2)), -1)
        cache[torch.arange(len(x), device=x.device), positions] = entry.to(cache.dtype)

        q_latent = torch.bmm(q_nope.transpose(0, 1), absorbed.key).transpose(0, 1)  # [rows heads kv_rank]
        query = torch.cat((q_latent, q_rope.to(q_latent.dtype)), -1)
        mixed = latent_attention(query, cache, bias, kv_rank=config.kv_lora_rank, scale=self.scale)
        out: Tensor = self.o_proj(torch.bmm(mixed.transpose(0, 1), absorbed.value).transpose(0, 1).flatten(-2))
        return out

    def _queries(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... heads qk"]:
        """Return the queries, content part before position part, not rotated."""
        config = self.config
        query = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        by_head: Tensor = query.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        return by_head
