"""A decoding step: one token a row goes in, the scores of the next come out."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.generation.cache import LatentCache
from ds_lightning.generation.native import NativeSteps
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate


def steps_of(model: DeepSeek) -> "NativeSteps | TorchSteps":
    """Return the form that is fastest for a model where it is."""
    return NativeSteps.of(model) or TorchSteps(model)


class TorchSteps:
    """The steps of a model with the weights that it has now, by its modules: on any device and in any precision.

    Attributes:
        dtype: Of the cache.
    """

    def __init__(self, model: DeepSeek) -> None:
        self.model = model
        self._blocks: list[Any] = list(model.layers)
        self._absorbed = [block.self_attn.absorb() for block in self._blocks]
        self.dtype = self._absorbed[0].key.dtype

    def __call__(
        self, tokens: Int[Tensor, " rows"], cache: LatentCache
    ) -> tuple[Float[Tensor, "rows vocab"], Int[Tensor, "rows moe_layers topk"] | None]:
        """Feed a token a row, writing its latents behind what the row has in the cache.

        Returns:
            The scores of the next token, and the experts that were chosen, as int16; none where there are no experts.
        """
        model, positions, gates = self.model, cache.lengths, list[Gate]()
        caches, bias = cache.seen()
        cos, sin = (table[positions] for table in model.rope_tables(cache.longest + 1, tokens.device))
        x = model.embed_tokens(tokens)
        for block, latents, absorbed in zip(self._blocks, caches, self._absorbed, strict=True):
            x, gate = block.decode(x, cos, sin, latents, positions, bias, absorbed)
            gates += [] if gate is None else [gate]
        chosen = torch.stack([gate.indices for gate in gates], 1).to(torch.int16) if gates else None
        return model.logits(model.norm(x)), chosen
