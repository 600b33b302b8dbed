"""The architecture of a DeepSeek-V3-style model: every number that shapes a weight or a FLOP.

Field names are those of the ``config.json`` that DeepSeek released, so that a config can be compared with a
published model line by line. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN context extension (arXiv:2309.00071), in the field names of DeepSeek's ``rope_scaling``."""

    factor: float
    """Ratio of the extended context to the original one, s in the paper. 40 in DeepSeek-V3."""
    original_max_position_embeddings: int
    """Context length that the model was pretrained with."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left as it is."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is fully interpolated."""
    mscale: float = 1.0
    """Attention temperature of the rotary part; see ``mscale_all_dim``."""
    mscale_all_dim: float = 1.0
    """Attention temperature of the whole head: the softmax scale grows by (0.1 * this * ln(factor) + 1) squared."""

    def __post_init__(self) -> None:
        """Refuse values with which YaRN's ramp is not defined."""
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}, expected at least 1")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                "rope_scaling.original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}, expected at least 1"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rope_scaling.beta_slow is {self.beta_slow}, expected between 0 and beta_fast ({self.beta_fast})"
            )


@dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """Shape of a DeepSeek-V3 model (arXiv:2412.19437, section 2.1) or of a V2 one (arXiv:2405.04434).

    A layer with index below ``first_k_dense_replace`` has a dense feed-forward; all others have experts. A model
    without experts has ``n_routed_experts`` 0.

    Raises:
        ValueError: If the fields contradict each other; the message names them and their values.
    """

    vocab_size: int
    """Rows of the embedding and of the output head."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Transformer blocks, without multi-token prediction modules."""
    intermediate_size: int
    """Width of a dense feed-forward."""

    num_attention_heads: int
    """Attention heads; MLA gives each its own keys and values."""
    kv_lora_rank: int
    """Width of the compressed latent that keys and values are made from: what a KV cache holds."""
    qk_nope_head_dim: int
    """Query and key channels a head without position."""
    qk_rope_head_dim: int
    """Query and key channels a head with rotary position; the key part is shared by all heads. Even."""
    v_head_dim: int
    """Value channels a head."""
    q_lora_rank: int | None = None
    """Width of the compressed queries; none: queries are projected directly, as in V2-Lite."""

    n_routed_experts: int = 0
    """Routed experts a layer; 0: every layer is dense."""
    n_shared_experts: int = 0
    """Experts that every token visits, computed as one feed-forward of this many times the expert width."""
    num_experts_per_tok: int = 0
    """Routed experts that a token visits."""
    moe_intermediate_size: int = 0
    """Width of one expert."""
    first_k_dense_replace: int = 0
    """Leading layers that keep a dense feed-forward."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity of a token to an expert: sigmoid in V3, softmax in V2."""
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    """Choice of experts: ``noaux_tc`` adds a selection bias (V3); the others do not (V2)."""
    n_group: int = 1
    """Groups of experts, one a node in DeepSeek's deployment."""
    topk_group: int = 1
    """Groups that one token may draw its experts from."""
    norm_topk_prob: bool = True
    """Divide the gate values of a token's experts by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the gate values. 2.5 in V3."""

    num_nextn_predict_layers: int = 0
    """Depth D of multi-token prediction: module k predicts the token k + 1 positions ahead."""

    max_position_embeddings: int = 4096
    """Longest sequence that the rotary tables are built for."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Context extension; none: plain rotary embedding."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights. 0.006 in V3."""
    tie_word_embeddings: bool = False
    """Share the weights of the embedding and of the output head."""

    def __post_init__(self) -> None:
        """Check that the shape can exist."""
        self._check_sizes()
        if self.n_routed_experts:
            self._check_experts()
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func is {self.scoring_func!r}, expected 'sigmoid' or 'softmax'")
        if self.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
            raise ValueError(
                f"topk_method is {self.topk_method!r}, expected 'noaux_tc', 'greedy' or 'group_limited_greedy'"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}, expected more than 1")
        for name in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")

    def _check_sizes(self) -> None:
        positive = (
            "vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads kv_lora_rank "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_routed_experts", "n_shared_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}, expected at least 1 or null")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, expected an even number")

    def _check_experts(self) -> None:
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1 in a model with experts")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts ({self.n_routed_experts}) is not divisible by n_group ({self.n_group})")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) is larger than n_group ({self.n_group})")
        allowed = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > allowed:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is larger than the {allowed} experts that "
                f"topk_group ({self.topk_group}) of n_group ({self.n_group}) groups allow"
            )
        if self.topk_method == "noaux_tc" and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_group ({self.n_group}) leaves {self.n_routed_experts // self.n_group} expert a group, "
                "expected at least 2: a group is scored by its two best"
            )

    @property
    def qk_head_dim(self) -> int:
        """Query and key channels a head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Tell whether the block with this index (MTP modules count on from the last block) has experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """Blocks with experts, those of the MTP modules included."""
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        return sum(self.is_moe_layer(layer) for layer in range(layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values that :meth:`from_dict` reads back, YaRN with its ``type``."""
        values = asdict(self)
        if self.rope_scaling is not None:
            values["rope_scaling"]["type"] = "yarn"
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeepSeekConfig:
        """Build a config from the keys of a released ``config.json``; keys that shape nothing are ignored.

        Raises:
            ValueError: If a required key is missing or of a wrong type, the values contradict each other, or they
                describe a shape that DeepSeek's own models do not have.
        """
        for key, only in _FIXED.items():
            if values.get(key, only) != only:
                raise ValueError(f"{key} is {values[key]!r}, expected {only!r}: no DeepSeek model has another")
        absent_means = _V2_DEFAULTS if values.get("model_type") == "deepseek_v2" else {}
        chosen = {**absent_means, **{key: value for key, value in values.items() if value is not None}}
        chosen.setdefault("n_routed_experts", 0)
        chosen.setdefault("n_shared_experts", 0)
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
        if rope.get("rope_theta") is not None:
            chosen["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("yarn", "default"):
            raise ValueError(f"rope type is {kind!r}, expected 'yarn' or 'default'")
        chosen.pop("rope_scaling", None)
        if kind == "yarn":
            released = {"mscale": 1.0, "mscale_all_dim": 0.0} | rope  # what a missing key means in released code
            chosen["rope_scaling"] = RopeScaling(**_typed_fields(RopeScaling, released, "rope_scaling."))
        return cls(**_typed_fields(cls, chosen, ""))

    @classmethod
    def from_json(cls, path: str | Path) -> DeepSeekConfig:
        """Read a released ``config.json``.

        Raises:
            ValueError: If the file is not a JSON object, or as :meth:`from_dict`.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a JSON {type(values).__name__}, expected an object with the model's keys")
        return cls.from_dict(values)


_FIXED = {"hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1, "rope_interleave": True}
_V2_DEFAULTS = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "int | None": (int,)}


def _typed_fields(cls: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Pick the fields of a dataclass out of parsed JSON, checked against their annotations."""
    chosen = {}
    for field in fields(cls):
        if field.name not in values:
            if field.default is MISSING:
                raise ValueError(f"config.json lacks the key {prefix}{field.name}")
            continue
        value, kind = values[field.name], str(field.type)
        wrong_bool = isinstance(value, bool) and kind != "bool"
        if kind in _KINDS and (wrong_bool or not isinstance(value, _KINDS[kind])):
            raise ValueError(f"{prefix}{field.name} is {value!r}, expected {kind}")
        chosen[field.name] = float(value) if kind == "float" else value
    return chosen
