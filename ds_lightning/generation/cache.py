"""The latent cache: all that decoding keeps of the tokens before."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.config import DeepSeekConfig

BLOCK = 32
"""Positions that the cache grows by, and that attention over it is rounded up to."""


def cache_bytes(config: DeepSeekConfig, dtype: torch.dtype) -> int:
    """Return the bytes that one token takes in one layer: 1,152 in bf16 in the shape of DeepSeek-V3."""
    return (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


class LatentCache:
    """Normalised latent and rotated key of every token of every row, in preallocated memory.

    Rows in use are the first ones. What lies behind a row's end is finite, so that weight zero makes it nothing.

    Attributes:
        latents: [layers rows positions kv_rank+rope].
        lengths: Tokens of each row in use.
        longest: The largest of ``lengths``, known without asking the device.
    """

    def __init__(self, config: DeepSeekConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.latents = torch.zeros(config.num_hidden_layers, rows, 0, width, dtype=dtype, device=device)
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.longest = 0

    def seen(self) -> tuple[Float[Tensor, "layers rows seq latent"], Float[Tensor, "rows seq"]]:
        """Make room for one token more a row; return the cache with it, and the bias that hides what lies behind it."""
        seq = self.make_room()
        positions = torch.arange(seq, device=self.lengths.device)
        hidden = positions > self.lengths[:, None]
        return self.latents[:, : len(self.lengths), :seq], torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(
            hidden, -torch.inf
        )

    def make_room(self) -> int:
        """Make room for one token more a row; return the positions that attention then reads."""
        return self._reserve(self.longest + 1)

    def advance(self) -> None:
        """Count the token that every row has been given."""
        self.lengths += 1
        self.longest += 1

    def admit(self, latents: Float[Tensor, "layers seq latent"], rows: int) -> None:
        """Append rows that all start with the latents of one prompt."""
        used, seq = len(self.lengths), latents.shape[1]
        self._reserve(seq)
        self.latents[:, used : used + rows, :seq] = latents[:, None]
        self.lengths = torch.cat((self.lengths, self.lengths.new_full((rows,), seq)))
        self.longest = max(self.longest, seq)

    def keep(self, order: Int[Tensor, " kept"]) -> None:
        """Make row ``order[i]`` row i and forget the others; only rows that move are copied."""
        kept = len(order)
        moved = (order != torch.arange(kept, device=order.device)).nonzero()[:, 0]
        if len(moved):
            self.latents[:, moved, : self.longest] = self.latents[:, order[moved], : self.longest]
        self.lengths = self.lengths[order]
        self.longest = int(self.lengths.max()) if kept else 0

    def _reserve(self, positions: int) -> int:
        """Make room for positions, and return them rounded up to whole blocks."""
        layers, rows, capacity, width = self.latents.shape
        seq = -(-positions // BLOCK) * BLOCK
        if seq > capacity:
            more = self.latents.new_zeros(layers, rows, max(seq, capacity * 3 // 2 // BLOCK * BLOCK), width)
            more[:, :, :capacity] = self.latents
            self.latents = more
        return seq
