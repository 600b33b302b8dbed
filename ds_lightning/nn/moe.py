"""DeepSeekMoE: a router, many small routed experts, and shared experts that every token visits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from ds_lightning.config import DeepSeekConfig
from ds_lightning.nn.mlp import MLP
from ds_lightning.ops.experts import few_tokens, routed_experts
from ds_lightning.ops.topk_gate import Gate, topk_gate


class Router(nn.Module):
    """Choose the experts of each token.

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) with ``topk_method`` "noaux_tc": a selection bias
    ``e_score_correction_bias`` that no gradient reaches; the training loop moves it. DeepSeek-V2 otherwise.

    Numerics: fp32, whatever the precision around it.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Float[Tensor, "tokens hidden"], replay: Int[Tensor, "tokens topk"] | None = None) -> Gate:
        """Return gate values and experts of each token; of those in ``replay`` that are not -1, the gate values."""
        config = self.config
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return topk_gate(
                linear(x.to(wide), self.weight.to(wide)),
                self.e_score_correction_bias,
                topk=config.num_experts_per_tok,
                n_group=1 if config.topk_method == "greedy" else config.n_group,
                topk_group=config.topk_group,
                scoring_func=config.scoring_func,
                norm_topk_prob=config.norm_topk_prob,
                routed_scaling_factor=config.routed_scaling_factor,
                replay=replay,
            )


class RoutedExperts(nn.Module):
    """Weights of all routed experts of a layer, gate and up projections side by side."""

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        experts, hidden, ffn = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(
        self, x: Float[Tensor, "tokens hidden"], gate: Gate, *, decoding: bool = False
    ) -> Float[Tensor, "tokens hidden"]:
        """Return the gated sum of each token's experts; ``decoding``: without gradient, in the form for few tokens."""
        form = few_tokens if decoding else routed_experts
        return form(x, gate.indices, gate.weights, self.gate_up_proj, self.down_proj)


class DeepSeekMoE(nn.Module):
    """Feed-forward of a layer with experts (arXiv:2401.06066, section 3)."""

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        routing: Int[Tensor, "batch seq topk"] | None = None,
        *,
        decoding: bool = False,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Gate]:
        """Return the sum of routed and shared experts, and what the router decided.

        Args:
            x: Normalised input.
            routing: Experts to take instead of the router's choice; -1: its choice.
            decoding: Compute in the form for few tokens and no gradient.
        """
        tokens = x.flatten(0, 1)
        gate: Gate = self.gate(tokens, None if routing is None else routing.flatten(0, 1))
        out = self.experts(tokens, gate, decoding=decoding).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, gate
