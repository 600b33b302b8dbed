"""What a sum of money buys: the model, tokens and schedule that published laws make best, and the YAML to run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.efficiency import choose_efficiency
from ds_lightning.cost.fitting import Division
from ds_lightning.cost.planner import Terms, plan_run
from ds_lightning.cost.prices import Hardware, Market, Price, find_price, known_hardware
from ds_lightning.cost.run_config import run_of
from ds_lightning.flops import active_param_count, train_flops_per_token

TRAINED_SHARE = 0.95
"""Part of the money that is planned for training: the rest pays the start, validation, checkpoints and export."""

MOST_DAYS = 60
"""Wall-clock up to which fewer devices are preferred, where their number is not given."""

LEAST_STEPS = 100
"""Optimizer steps below which nothing is called trained."""

HIDDEN = tuple(range(128, 1024, 64)) + tuple(range(1024, 7168 + 1, 128))
"""Widths that are considered."""

SOURCES = {
    "size": "non-embedding FLOPs a token M = 0.1715 C^0.5243 (DeepSeek LLM, arXiv:2401.02954, equation 4; dense "
    "models, fitted from 1e17 to 3e20 FLOPs)",
    "tokens": "what the money leaves at that size; the same law's D = 5.8316 C^0.4757",
    "learning rate": "0.3118 C^-0.1250 (arXiv:2401.02954, equation 1)",
    "batch": "0.2920 C^0.3271 tokens (arXiv:2401.02954, equation 1)",
    "schedule": "a short rise, constant, and a cosine fall to a tenth over the last 0.3 (DeepSeek-V3, "
    "arXiv:2412.19437, section 4.2)",
    "experts": "experts of a fifth of the width (granularity 10, within the best range of 8 to 12) and as small an "
    "activation ratio as fits in memory (Ling, arXiv:2507.17702)",
    "depth": "61 layers (width / 7168)^0.6, which passes through DeepSeek-V3 and V2-Lite",
}
"""Where each choice comes from."""


def plan_budget(
    budget_usd: float,
    *,
    device: str,
    num_devices: int | None = None,
    usd_per_device_hour: float | None = None,
    market: Market | None = None,
    prices_file: str | Path | None = None,
    efficiency: str | float | None = None,
) -> dict[str, Any]:
    """Return the plan of the run that a sum of money is best spent on, with its config under ``yaml``.

    The model is a mixture of experts, sized by a law of dense models: the coefficients of laws of mixtures are not
    relied on here.

    Args:
        budget_usd: Dollars to spend.
        device: Device in the price list.
        num_devices: Devices; none: as many as end the run within two months.
        usd_per_device_hour: Your own price in US dollars; none: the price list's.
        market: ``on-demand`` or ``spot``.
        prices_file: Price list to read instead of the newest one that ships with the package.
        efficiency: Name of a published speed, or your own share of the dense bfloat16 peak.

    Raises:
        ValueError: If the budget is not positive or too small for the smallest model, or something is unknown.
    """
    if not (math.isfinite(budget_usd) and budget_usd > 0):
        raise ValueError(f"budget_usd is {budget_usd}, expected more than 0")
    hardware = known_hardware(device)
    price = find_price(
        hardware.device, market=market or "on-demand", usd_per_device_hour=usd_per_device_hour, file=prices_file
    )
    if not price.usd_per_device_hour:
        raise ValueError(f"{hardware.device} costs 0 dollars, expected a price to divide the budget by")
    hours = budget_usd / price.usd_per_device_hour
    count = _num_devices(hours, hardware) if num_devices is None else num_devices
    if count < 1:
        raise ValueError(f"num_devices is {count}, expected at least 1")
    purse = _Purse(hardware=hardware, num_devices=count, price=price, usd=budget_usd)
    found = _best(purse, efficiency)
    if found is None:
        raise ValueError(
            f"budget_usd is {budget_usd:g}: {hours * 3600:.3g} s of one {hardware.device} train nothing, expected "
            f"enough for {LEAST_STEPS} steps of the smallest model that fits"
        )
    content, report, compute = found
    return {
        **report,
        "budget_usd": budget_usd,
        "law": SOURCES,
        "law_tokens": 5.8316 * compute**0.4757,
        "law_flops_per_token": 0.1715 * compute**0.5243,
        "notes": [*_notes(content, compute), *report["notes"]],
        "yaml": yaml.safe_dump(content, sort_keys=False, width=110),
    }


def _notes(content: dict[str, Any], compute: float) -> list[str]:
    beyond = "" if 1e17 <= compute <= 3e20 else f"; {compute:.1e} FLOPs are outside the range that it was fitted on"
    notes = [
        f"the size follows a law of dense models, which knows nothing of experts{beyond}",
        f"{1 - TRAINED_SHARE:.0%} of the money are left for what is not training",
    ]
    if content["model"]["init_args"]["config"]["hidden_size"] == HIDDEN[-1]:
        notes.append(f"the money asks for a wider model than {HIDDEN[-1]}, DeepSeek-V3's width, where the choice ends")
    return notes


@dataclass(frozen=True, kw_only=True)
class _Purse:
    """Devices and the money to hold them."""

    hardware: Hardware
    num_devices: int
    price: Price
    usd: float


def _num_devices(hours: float, hardware: Hardware) -> int:
    """Return the fewest devices, doubling, that end in time; a CPU trains alone."""
    count = 1
    while hardware.device != "cpu" and hours / count > MOST_DAYS * 24:
        count *= 2
    return count


def _best(purse: _Purse, efficiency: str | float | None) -> tuple[dict[str, Any], dict[str, Any], float] | None:
    """Return config, plan and FLOPs of the run whose size is nearest to the law's for the FLOPs that it can spend."""
    seconds = TRAINED_SHARE * purse.usd / purse.price.usd_per_device_hour * 3600
    sizes = []
    for hidden in HIDDEN:
        config, seq_len = shape(hidden)
        active = active_param_count(config, include_embedding=False)
        value = choose_efficiency(purse.hardware, active, efficiency)[0].value
        tokens = seconds * purse.hardware.bf16_tflops * 1e12 * value / train_flops_per_token(config, seq_len)
        size = train_flops_per_token(config, seq_len) - 6 * config.vocab_size * config.hidden_size
        sizes.append((abs(math.log(size / (0.1715 * (size * tokens) ** 0.5243))), hidden, tokens, size * tokens))
    for _, hidden, tokens, compute in sorted(sizes):
        config, seq_len = shape(hidden)
        found = _with_most_experts(purse, config, seq_len, int(tokens), compute, efficiency)
        if found is not None:
            return *found, compute
    return None


def shape(hidden: int) -> tuple[DeepSeekConfig, int]:
    """Return a model of a width in DeepSeek-V3's proportions, with the fewest experts, and its length of rows."""
    large, small = hidden >= 1024, hidden < 512
    head = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    if not large:
        narrow = max(hidden // 4, 32)
        head = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": narrow}
    seq_len = 4096 if large else 512 if small else 2048
    expert = max(32, round(hidden / 5 / 32) * 32)
    config = DeepSeekConfig(
        vocab_size=102400 if hidden >= 2048 else 8192 if small else 32768,
        hidden_size=hidden,
        num_hidden_layers=max(3, round(61 * (hidden / 7168) ** 0.6)),
        intermediate_size=9 * expert,
        num_attention_heads=hidden // (128 if large else 64),
        q_lora_rank=1536 if hidden >= 5120 else None,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=expert,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
        max_position_embeddings=seq_len,
        qk_nope_head_dim=head["qk_nope_head_dim"],
        qk_rope_head_dim=head["qk_rope_head_dim"],
        v_head_dim=head["v_head_dim"],
        kv_lora_rank=head["kv_lora_rank"],
    )
    return config, seq_len


def _with_most_experts(
    purse: _Purse, config: DeepSeekConfig, seq_len: int, tokens: int, compute: float, efficiency: str | float | None
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the run with the most experts that fits, without ZeRO if any does; none: too few tokens, or too large.

    A run that waits for its links or its memory is left out: fewer experts, or a smaller model, use the money better.
    """
    count = purse.num_devices
    rows = count * 2 ** max(0, round(math.log2(0.2920 * compute**0.3271 / seq_len / count)))
    if tokens < LEAST_STEPS * rows * seq_len:
        return None
    for stage in (0, None):
        for experts in (256, 128, 64, 32, 16):
            grouped = experts >= 64 and config.hidden_size >= 4096  # over nodes, as in DeepSeek-V3
            groups, within = (8, 4) if grouped else (1, 1)
            wider = replace(config, n_routed_experts=experts, n_group=groups, topk_group=within)
            for power in range(int(math.log2(rows / count)) + 1):
                content = _content(purse, wider, seq_len, tokens, rows, 2**power, compute)
                try:
                    report = plan_run(
                        run_of(content, ("the config below",)),
                        Terms(num_devices=count),
                        efficiency=efficiency,
                        division=Division(zero_stage=stage),
                    )
                except ValueError:  # a smaller micro-batch, fewer experts or another stage fits
                    continue
                if report["tokens"] >= 0.99 * tokens:
                    return content, report
                break
    return None


def _content(
    purse: _Purse, config: DeepSeekConfig, seq_len: int, tokens: int, rows: int, accumulate: int, compute: float
) -> dict[str, Any]:
    """Return the config file of a run."""
    hardware, price, count = purse.hardware, purse.price, purse.num_devices
    cpu = hardware.device == "cpu"
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    cost = {
        "device": hardware.device,
        "market": price.market,
        "usd_per_device_hour": float(price.usd_per_device_hour),
    }
    inside = hardware.links.node_devices
    devices = {"devices": min(count, inside), "num_nodes": -(-count // inside)} if not cpu else {"devices": 1}
    return {
        "model": {
            "class_path": "ds_lightning.training.PretrainModule",
            "init_args": {
                "config": fields,
                "total_tokens": tokens,
                "lr": float(f"{0.3118 * compute**-0.1250:.3g}"),
                "lr_schedule": {
                    "class_path": "ds_lightning.optim.WarmupStableDecay",
                    "init_args": {"warmup": 0.01, "decay": 0.3, "final": 0.1, "shape": "cosine"},
                },
                "recompute": not cpu and config.hidden_size >= 2048,
            },
        },
        "data": {
            "class_path": "ds_lightning.data.TokenDataModule",
            "init_args": {
                "sources": ["corpus/**/*.jsonl"],
                "folder": "data/corpus",
                "vocab_size": config.vocab_size,
                "seq_len": seq_len,
                "batch_size": rows,
                "val_fraction": 0.01,
            },
        },
        "trainer": {
            "accelerator": "cpu" if cpu else "gpu",
            **devices,
            "precision": "32-true" if cpu else "bf16-mixed",
            "gradient_clip_val": 1.0,
            "accumulate_grad_batches": accumulate,
            "val_check_interval": 1000 * accumulate,
            "limit_val_batches": 50,
        },
        "cost": cost,
        "budget": {"usd": float(purse.usd)},
        "checkpoints": {"every_n_seconds": 600},
    }
