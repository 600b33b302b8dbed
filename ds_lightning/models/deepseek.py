"""The DeepSeek language model: embedding, blocks, final norm, head, and multi-token prediction modules."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models.init import init_weights
from ds_lightning.nn.attention import MLA, Absorbed
from ds_lightning.nn.linear import Linear
from ds_lightning.nn.mlp import MLP
from ds_lightning.nn.moe import DeepSeekMoE
from ds_lightning.nn.norm import RMSNorm
from ds_lightning.ops.rope import rope_tables
from ds_lightning.ops.shared_prompts import SharedPrompts
from ds_lightning.ops.topk_gate import Gate


class Block(nn.Module):
    """One transformer layer: attention, then a dense or an expert feed-forward, each on a normalised input."""

    def __init__(self, config: DeepSeekConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_moe = config.is_moe_layer(layer)
        self.mlp = DeepSeekMoE(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "seq pairs"],
        sin: Float[Tensor, "seq pairs"],
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        routing: Int[Tensor, "batch seq topk"] | None = None,
        latents: list[Tensor] | None = None,
        shared: SharedPrompts | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Gate | None]:
        """Return the new residual stream, and the router's decisions where the layer has experts."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, segment_ids, latents=latents, shared=shared)
        out, gate = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, DeepSeekMoE):
            out, gate = self.mlp(out, routing)
        else:
            out = self.mlp(out)
        return x + out, gate

    def decode(
        self,
        x: Float[Tensor, "rows hidden"],
        cos: Float[Tensor, "rows pairs"],
        sin: Float[Tensor, "rows pairs"],
        cache: Float[Tensor, "rows seq latent"],
        positions: Int[Tensor, " rows"],
        bias: Float[Tensor, "rows seq"],
        absorbed: Absorbed,
    ) -> tuple[Float[Tensor, "rows hidden"], Gate | None]:
        """Do the same for one new token a row, whose past is in the cache; arguments as :meth:`MLA.decode`."""
        x = x + self.self_attn.decode(self.input_layernorm(x), cos, sin, cache, positions, bias, absorbed)
        out, gate = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, DeepSeekMoE):
            out, gate = self.mlp(out[None], decoding=True)
            out = out[0]
        else:
            out = self.mlp(out)
        return x + out, gate


class MTP(nn.Module):
    """Multi-token prediction module (arXiv:2412.19437, section 2.2); embedding and head are the model's own."""

    def __init__(self, config: DeepSeekConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def combine(
        self, embedding: Float[Tensor, "batch seq hidden"], hidden: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Project the next token's embedding and the previous depth's hidden state to the block's input."""
        combined: Tensor = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), -1))
        return combined


class DeepSeek(nn.Module):
    """DeepSeek-V3 (arXiv:2412.19437) or V2 (arXiv:2405.04434) without a loss: losses own the head.

    Args:
        config: Shape of the model.

    Attributes:
        recompute: Keep only the inputs of blocks in training and compute the rest again in the backward pass.

    Example:
        >>> config = DeepSeekConfig(
        ...     vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        ...     kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        ... )
        >>> model = DeepSeek(config)
        >>> hidden = model(torch.zeros(1, 5, dtype=torch.long))
        >>> model.logits(hidden).shape
        torch.Size([1, 5, 64])
    """

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        layers = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(MTP(config, layers + depth) for depth in range(config.num_nextn_predict_layers))
        self._rope: tuple[Tensor, Tensor] | None = None
        init_weights(self, config.initializer_range)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        gates: list[Gate] | None = None,
        routing: Int[Tensor, "moe_layers batch seq topk"] | None = None,
        latents: list[Tensor] | None = None,
        shared: SharedPrompts | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the normalised hidden state from which the head predicts the next token.

        Args:
            input_ids: Tokens.
            segment_ids: Document of each position, to keep attention within documents.
            gates: Where given, the router's decisions of every expert layer are appended in order.
            routing: Experts that each token takes in every expert layer, as an earlier forward chose them: a choice
                is replayed, its gate values are computed anew. -1: the router chooses.
            latents: Where given, what decoding needs of each position is appended, a tensor a layer; without gradient.
            shared: Where given, the batch has one row, of prompts and completions that lie as this says.

        Raises:
            ValueError: If the sequence is longer than ``max_position_embeddings``, or ``routing`` has another number
                of layers than the model has with experts.
        """
        cos, sin = self.rope_tables(
            input_ids.shape[1] if shared is None else shared.prompt_seq + shared.seq, input_ids.device
        )
        if shared is not None:
            positions = shared.positions()
            cos, sin = cos[positions], sin[positions]
        assert latents is None or not torch.is_grad_enabled()
        replayed = self._replayed(routing)
        x = self.embed_tokens(input_ids)
        for block, chosen in zip(self.layers, replayed, strict=True):
            x = self._run(block, x, cos, sin, segment_ids, gates, chosen, latents, shared)
        normalised: Tensor = self.norm(x)
        return normalised

    def mtp_hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq hidden"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        gates: list[Gate] | None = None,
    ) -> list[Float[Tensor, "batch seq hidden"]]:
        """Return one hidden state a prediction depth: at depth k, position t predicts token t + 1 + k.

        Position t of depth k sees the tokens up to t + k. The last k positions of a row have no such token; they see
        the row's first ones instead and predict nothing that counts.
        """
        cos, sin = self.rope_tables(input_ids.shape[1], input_ids.device)
        states = []
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTP)
            ahead = self.embed_tokens(input_ids.roll(-depth, dims=1))
            hidden = self._run(module.block, module.combine(ahead, hidden), cos, sin, segment_ids, gates)
            hidden = module.norm(hidden)
            states.append(hidden)
        return states

    def logits(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocab"]:
        """Return the head's scores of every token; for sampling and tests, since losses slice the head themselves."""
        scores: Tensor = self.lm_head(hidden)
        return scores

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        segment_ids: Tensor | None,
        gates: list[Gate] | None,
        routing: Tensor | None = None,
        latents: list[Tensor] | None = None,
        shared: SharedPrompts | None = None,
    ) -> Tensor:
        """Run a block and note its routing once, also where the backward pass runs it again."""
        if self.recompute and torch.is_grad_enabled():
            x, gate = checkpoint(block, x, cos, sin, segment_ids, routing, shared=shared, use_reentrant=False)
        else:
            # By name: a strategy that shards weights copies the lists among positional arguments.
            x, gate = block(x, cos, sin, segment_ids, routing, latents=latents, shared=shared)
        if gates is not None and gate is not None:
            gates.append(gate)
        return x

    def _replayed(self, routing: Tensor | None) -> list[Tensor | None]:
        """Return what each block is to replay."""
        with_experts = [self.config.is_moe_layer(layer) for layer in range(len(self.layers))]
        if routing is None:
            return [None] * len(self.layers)
        if len(routing) != sum(with_experts):
            raise ValueError(
                f"routing has {len(routing)} layers, expected {sum(with_experts)}: one for each layer with experts"
            )
        chosen = iter(routing)
        return [next(chosen) if is_moe else None for is_moe in with_experts]

    def rope_tables(
        self, length: int, device: torch.device
    ) -> tuple[Float[Tensor, "seq pairs"], Float[Tensor, "seq pairs"]]:
        """Return exact rotary tables for this length: no buffer, so that no strategy rounds or shards them.

        Raises:
            ValueError: If the length is more than ``max_position_embeddings``.
        """
        config = self.config
        if length > config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_position_embeddings "
                f"({config.max_position_embeddings}): shorten seq_len or extend the context"
            )
        if self._rope is None or self._rope[0].device != device or self._rope[0].shape[0] < length:
            with torch.inference_mode(mode=False):  # training uses them too
                tables = rope_tables(config.qk_rope_head_dim, length, config.rope_theta, config.rope_scaling)
                self._rope = (tables[0].to(device), tables[1].to(device))
        return self._rope[0][:length], self._rope[1][:length]
