"""Validation metrics of a language model."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class LanguageModelMetrics(Metric):
    """Loss a token, perplexity, and bits per byte of text, over all batches and ranks.

    Bits per byte compare models with different tokenizers, and with compressors of files: every token is paid for,
    end-of-text tokens too, while only bytes of text count.

    Numerics: sums in fp64.
    """

    nll: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Float[Tensor, ""], tokens: int, num_bytes: int) -> None:
        """Add a batch.

        Args:
            nll: Sum of the cross-entropy over its counted tokens, in nats.
            tokens: Counted tokens.
            num_bytes: Bytes of text that they stand for.
        """
        self.nll += nll.double()
        self.tokens += tokens
        self.bytes += num_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return ``val/loss``, ``val/ppl`` and ``val/bits_per_byte``."""
        loss = self.nll / self.tokens
        return {
            "val/loss": loss,
            "val/ppl": loss.exp(),
            "val/bits_per_byte": self.nll / math.log(2) / self.bytes,
        }
