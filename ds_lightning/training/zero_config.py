"""What DeepSpeed is told: defaults that suit training here, and the user's own keys, checked."""

import difflib
from typing import Any

import torch
from torch import nn

_ELSEWHERE = {
    "train_batch_size": "data.init_args.batch_size",
    "train_micro_batch_size_per_gpu": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "optimizer": "model.init_args.optimizer",
    "scheduler": "model.init_args.lr_schedule",
    "zero_optimization.stage": "the strategy's stage",
    "zero_optimization.offload_optimizer": "the strategy's offload_optimizer",
    "zero_optimization.elastic_checkpoint": "nothing (any number of ranks goes on from any checkpoint)",
    "zero_optimization.mics_shard_size": "stage 3 (over all ranks)",
    "zero_optimization.parameter_alignment": "nothing (no gaps between parameters)",
}
"""Keys of DeepSpeed's config that have another place in ours, or none: ``shards.cuts`` knows how the rest lies."""

_KNOWN = (
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "compile",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)
"""Keys of DeepSpeed's config that fit what is done here; it has no list of its own and ignores others."""


def deepspeed_config(stage: int, more: dict[str, Any], *, offload_optimizer: bool) -> dict[str, Any]:
    """Return what DeepSpeed is to be told, but for what the trainer adds.

    Args:
        stage: What is sharded.
        more: The user's own keys.
        offload_optimizer: Keep the optimizer's states in the host's memory.

    Raises:
        ValueError: If a key of the user's is none that DeepSpeed reads, or one that is set elsewhere.
    """
    _check_keys(more)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on a CPU as fast, and needs no compiler
        "data_types": {"grad_accum_dtype": "fp32"},
        "train_micro_batch_size_per_gpu": 1,  # of DeepSpeed's own count of samples, which nothing reads
        "zero_optimization": zero,
    }
    for key, value in more.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    return config


def _check_keys(config: dict[str, Any]) -> None:
    """Refuse keys that DeepSpeed would ignore, or that say what the trainer and this strategy say."""
    from deepspeed import __version__
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    zero = sorted({*fields, *(field.alias for field in fields.values() if field.alias)})
    for section, keys, known in (("", config, _KNOWN), ("zero_optimization.", config.get("zero_optimization"), zero)):
        if keys is not None and not isinstance(keys, dict):
            raise ValueError(f"ZeRO: config.{section[:-1]} is {keys!r}, expected its settings by name")
        for key, value in (keys or {}).items():
            if section + key in _ELSEWHERE:
                raise ValueError(
                    f"ZeRO: config.{section}{key} is {value!r}, expected {_ELSEWHERE[section + key]} instead"
                )
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"ZeRO: config.{section}{key}: no such key of DeepSpeed {__version__}{meant}")


def fit_buckets(config: dict[str, Any], model: nn.Module) -> None:
    """Keep buckets no larger than the model: DeepSpeed allocates them in full, and wants even numbers."""
    size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        config["zero_optimization"].setdefault(name, min(size + size % 2, 200_000_000))
