"""The attention of MLA on a CPU in fp32, by ``cpu.cpp``: scores of some queries at a time, and no rotated copy."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.compiled import call
from ds_lightning.ops.shared_prompts import SharedPrompts

SOURCE = Path(__file__).with_name("cpu.cpp")

_TENSORS = ("query", "key_value", "k_rope", "cos", "sin", "spans", "groups", "out", "log_sum")
_GRADS = ("grad_out", "grad_query", "grad_key_value", "grad_k_rope")
_SIZES = ("num_groups", "positions", "k_rope_stride", "tokens", "heads", "nope", "rope", "v_dim")


class _Attention(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in (*_TENSORS, *_GRADS)],
        *[(name, ctypes.c_int64) for name in _SIZES],
        ("scale", ctypes.c_float),
    ]


class Layout(NamedTuple):
    """Which tokens attend to which."""

    spans: Int[Tensor, "spans 4"]
    """First token and number of tokens of what a span may see in full, the same of the span itself."""
    groups: Int[Tensor, " groups_and_1"]
    """First span of each group, and the number of spans: no token is in spans of two groups."""


def rotary_attention(
    query: Float[Tensor, "batch seq heads qk"],
    key_value: Float[Tensor, "batch seq heads nope_v"],
    k_rope: Float[Tensor, "batch seq rope"],
    cos: Float[Tensor, "seq pairs"],
    sin: Float[Tensor, "seq pairs"],
    scale: float,
    segment_ids: Int[Tensor, "batch seq"] | None,
    shared: SharedPrompts | None,
) -> Float[Tensor, "batch seq heads v_dim"]:
    """Return what the public function does."""
    batch, seq = query.shape[:2]
    if shared is not None:
        layout = layout_of_prompts(shared)
    elif segment_ids is not None:
        layout = layout_of_segments(segment_ids)
    else:
        begins = torch.arange(0, batch * seq, seq)
        spans = torch.stack((begins, torch.zeros_like(begins), begins, torch.full_like(begins, seq)), 1)
        layout = Layout(spans, torch.arange(batch + 1))
    parts = (part.flatten(0, 1) for part in (query, key_value, k_rope))
    out: Tensor = _RotaryAttention.apply(*parts, cos, sin, layout, scale)  # type: ignore[no-untyped-call]
    return out.view(batch, seq, *out.shape[1:])


def layout_of_prompts(shared: SharedPrompts) -> Layout:
    """Return the layout of prompts and completions: a prompt and its completions are a group."""
    prompts = len(shared.lengths)
    begins = torch.arange(prompts) * shared.prompt_seq
    nothing = torch.zeros_like(begins)
    of_prompts = torch.stack((begins, nothing, begins, shared.lengths), 1)
    completions = prompts * shared.prompt_seq + torch.arange(len(shared.prompt)) * shared.seq
    lengths = torch.full_like(completions, shared.seq)
    of_completions = torch.stack((begins[shared.prompt], shared.lengths[shared.prompt], completions, lengths), 1)
    group = torch.cat((torch.arange(prompts), shared.prompt))
    groups = torch.cat((nothing[:1], group.bincount(minlength=prompts).cumsum(0)))
    return Layout(torch.cat((of_prompts, of_completions))[group.argsort(stable=True)], groups)


def layout_of_segments(segment_ids: Int[Tensor, "batch seq"]) -> Layout:
    """Return the layout of rows of documents that lie in one piece each."""
    batch, seq = segment_ids.shape
    starts = torch.ones(batch, seq, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = starts.flatten().nonzero()[:, 0]
    lengths = torch.diff(begins, append=begins.new_tensor([batch * seq]))
    return Layout(torch.stack((begins, torch.zeros_like(begins), begins, lengths), 1), torch.arange(len(begins) + 1))


def in_pieces(segment_ids: Int[Tensor, "batch seq"]) -> bool:
    """Tell whether a document goes on behind another one, which no layout of spans can say."""
    ordered = segment_ids.sort(-1).values
    changes = [(ids[:, 1:] != ids[:, :-1]).sum() for ids in (segment_ids, ordered)]
    return bool(changes[0] > changes[1])


class _RotaryAttention(torch.autograd.Function):
    """Keeps what came in, what goes out, and the logarithm of each softmax's sum."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        scale: float,
    ) -> Tensor:
        query, key_value = query.contiguous(), key_value.contiguous()
        k_rope = k_rope if k_rope.stride(-1) == 1 else k_rope.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        nope = query.shape[-1] - k_rope.shape[-1]
        out = query.new_zeros(*query.shape[:2], key_value.shape[-1] - nope)  # what no span covers stays zero
        log_sum = query.new_empty(query.shape[:2])
        tensors = (query, key_value, k_rope, cos, sin, *layout, out, log_sum)
        _call("attention_forward", tensors, scale)
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query, key_value, k_rope = saved[:3]
        grad_query, grad_key_value = torch.zeros_like(query), torch.zeros_like(key_value)
        grad_k_rope = query.new_zeros(query.shape[1], *k_rope.shape)  # a head's own
        of_inputs = {"grad_query": grad_query, "grad_key_value": grad_key_value, "grad_k_rope": grad_k_rope}
        _call("attention_backward", saved, ctx.scale, grad_out=grads[0].contiguous(), **of_inputs)
        return grad_query, grad_key_value, grad_k_rope.sum(0), None, None, None, None


def _call(name: str, tensors: Sequence[Tensor], scale: float, **grads: Tensor) -> None:
    query, _, k_rope, cos, _, spans, groups, out, _ = tensors
    pointers = dict(zip(_TENSORS, tensors, strict=True)) | grads
    attention = _Attention(
        **{key: tensor.data_ptr() for key, tensor in pointers.items()},
        num_groups=len(groups) - 1,
        positions=len(cos),
        k_rope_stride=k_rope.stride(0),
        tokens=len(query),
        heads=query.shape[1],
        nope=query.shape[2] - k_rope.shape[1],
        rope=k_rope.shape[1],
        v_dim=out.shape[2],
        scale=scale,
    )
    pairs = int(((spans[:, 1] + spans[:, 3] // 2) * spans[:, 3]).sum())
    call(SOURCE, name, attention, work=2 * pairs * query.shape[1] * query.shape[2])
