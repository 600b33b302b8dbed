"""Definition of the gated activation of DeepSeek's feed-forwards."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Float[Tensor, "... ffn"], up: Float[Tensor, "... ffn"]) -> Float[Tensor, "... ffn"]:
    """Return ``silu(gate) * up`` (arXiv:2002.05202)."""
    return silu(gate) * up
