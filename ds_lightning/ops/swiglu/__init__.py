"""SwiGLU, the gated activation of dense feed-forwards and experts."""

from ds_lightning.ops.swiglu.reference import swiglu

__all__ = ["swiglu"]
