"""Decoding steps in C++, by ``decode.cpp``: for small models on a CPU, where torch's calls cost more than products."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.flops import active_param_count
from ds_lightning.generation.cache import LatentCache
from ds_lightning.generation.sampling import KERNELS
from ds_lightning.models import DeepSeek
from ds_lightning.nn.moe import DeepSeekMoE
from ds_lightning.ops.compiled import compiled, takes, threads_for

SMALL = 2**26
"""Parameters up to which a model's weights are packed, 256 MiB; in a larger one the products are what takes time."""

_PANEL = 16
"""Columns of a packed panel."""
_POINTER, _FLOATS, _INTEGERS = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [("panels", _POINTER), ("inner", _INTEGERS), ("columns", _INTEGERS)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("input_norm", "post_norm", "query_norm", "latent_norm")],
        *[(name, _Matrix) for name in ("query_a", "query_b", "latent", "absorbed_key", "absorbed_value", "output")],
        *[(name, _Matrix) for name in ("gate_up", "down", "router", "expert_gate_up", "expert_down")],
        ("bias", _POINTER),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *[(name, _POINTER) for name in ("embedding", "norm")],
        ("head", _Matrix),
        *[(name, _INTEGERS) for name in ("num_layers", "hidden", "heads", "kv_rank", "nope", "rope", "v_dim")],
        *[(name, _INTEGERS) for name in ("experts", "topk", "groups", "topk_groups", "softmax", "normalised")],
        *[(name, _FLOATS) for name in ("scale", "eps", "routed_scale")],
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("tokens", "positions", "cache")],
        *[(name, _INTEGERS) for name in ("layer_stride", "row_stride")],
        *[(name, _POINTER) for name in ("cos", "sin", "logits", "chosen")],
    ]


class NativeSteps:
    """The weights of a model as ``decode.cpp`` wants them, and the steps.

    Equals :class:`~ds_lightning.generation.steps.TorchSteps` but for rounding. What a row gets does not depend on what
    else is in the batch, nor on the number of threads. For 128 rows of a model of 1.1 million parameters a step takes
    3.5 ms instead of 15.6 on two cores.

    Attributes:
        dtype: Of the cache.
    """

    dtype = torch.float32

    @classmethod
    def of(cls, model: DeepSeek) -> "NativeSteps | None":
        """Return the steps of a model that they can do: small, whole, in fp32 on a CPU; else, or uncompiled, none."""
        weights = list(model.parameters())
        sizes = [weight.numel() for weight in weights]
        return cls(model) if sum(sizes) <= SMALL and all(sizes) and takes(KERNELS, *weights) else None

    def __init__(self, model: DeepSeek) -> None:
        self._tables = model.rope_tables
        self._kept: list[Any] = []  # what the library has pointers to
        config = model.config
        self._vocab, self._topk = config.vocab_size, config.num_experts_per_tok
        self._active = active_param_count(config)
        self._moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
        blocks: list[Any] = list(model.layers)
        self._model = _Model(
            layers=(_Layer * len(blocks))(*map(self._layer, blocks)),
            embedding=self._pointer(model.embed_tokens.weight),
            norm=self._pointer(model.norm.weight),
            head=self._matrix(model.lm_head.weight),
            num_layers=len(blocks),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_rank=config.kv_lora_rank,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            v_dim=config.v_head_dim,
            experts=config.n_routed_experts,
            topk=config.num_experts_per_tok,
            groups=1 if config.topk_method == "greedy" else config.n_group,
            topk_groups=config.topk_group,
            softmax=config.scoring_func == "softmax",
            normalised=config.norm_topk_prob,
            scale=blocks[0].self_attn.scale,
            eps=config.rms_norm_eps,
            routed_scale=config.routed_scaling_factor,
        )

    def __call__(
        self, tokens: Int[Tensor, " rows"], cache: LatentCache
    ) -> tuple[Float[Tensor, "rows vocab"], Int[Tensor, "rows moe_layers topk"] | None]:
        """Do what :class:`TorchSteps` does."""
        rows = len(tokens)
        cache.make_room()
        cos, sin = self._tables(cache.longest + 1, tokens.device)
        logits = torch.empty(rows, self._vocab)
        chosen = torch.empty(rows, self._moe_layers, self._topk, dtype=torch.int16)
        step = _Step(
            tokens=tokens.data_ptr(),
            positions=cache.lengths.data_ptr(),
            cache=cache.latents.data_ptr(),
            layer_stride=cache.latents.stride(0),
            row_stride=cache.latents.stride(1),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            logits=logits.data_ptr(),
            chosen=chosen.data_ptr(),
        )
        library = compiled(KERNELS)
        assert library is not None, "who makes one asks takes() first"
        library.decode(ctypes.byref(self._model), ctypes.byref(step), _INTEGERS(rows), threads_for(rows * self._active))
        return logits, chosen if self._moe_layers else None

    def _layer(self, block: Any) -> _Layer:
        attention, mlp, absorbed = block.self_attn, block.mlp, block.self_attn.absorb()
        layer = _Layer(
            input_norm=self._pointer(block.input_layernorm.weight),
            post_norm=self._pointer(block.post_attention_layernorm.weight),
            latent_norm=self._pointer(attention.kv_a_layernorm.weight),
            latent=self._matrix(attention.kv_a_proj_with_mqa.weight),
            absorbed_key=self._matrix(absorbed.key.transpose(1, 2)),
            absorbed_value=self._matrix(absorbed.value.transpose(1, 2)),
            output=self._matrix(attention.o_proj.weight),
        )
        if attention.config.q_lora_rank is None:
            layer.query_b = self._matrix(attention.q_proj.weight)
        else:
            layer.query_a = self._matrix(attention.q_a_proj.weight)
            layer.query_norm = self._pointer(attention.q_a_layernorm.weight)
            layer.query_b = self._matrix(attention.q_b_proj.weight)
        dense: Any = mlp
        if isinstance(mlp, DeepSeekMoE):
            layer.router = self._matrix(mlp.gate.weight)
            if mlp.gate.e_score_correction_bias is not None:
                layer.bias = self._pointer(mlp.gate.e_score_correction_bias)
            layer.expert_gate_up = self._matrix(mlp.experts.gate_up_proj)
            layer.expert_down = self._matrix(mlp.experts.down_proj)
            dense = mlp.shared_experts
        if dense is not None:
            layer.gate_up = self._matrix(torch.cat((dense.gate_proj.weight, dense.up_proj.weight)))
            layer.down = self._matrix(dense.down_proj.weight)
        return layer

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return int(self._kept[-1].data_ptr())

    def _matrix(self, weight: Float[Tensor, "*heads out in"]) -> _Matrix:
        """Pack a weight, or one a head or expert: [*heads out/16 in 16], the last panel filled up with zeros."""
        columns, inner = weight.shape[-2:]
        padded = torch.nn.functional.pad(weight.detach(), (0, 0, 0, -columns % _PANEL))
        panels = padded.unflatten(-2, (-1, _PANEL)).transpose(-1, -2)
        return _Matrix(self._pointer(panels), inner, columns)
