"""What measurements against peers share: the model, the turns that sides take, and the table."""

import importlib.util
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from rich.table import Table

from ds_lightning.config import DeepSeekConfig
from ds_lightning.generation.device import Device, check_device
from ds_lightning.models import DeepSeek

CONFIG = DeepSeekConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=4,
    intermediate_size=384,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    max_position_embeddings=256,
    initializer_range=0.1,
)
"""A model of 1.1 million parameters: small enough that overhead counts as much as products."""

BACKENDS = ("grouped_mm", "eager")
"""transformers' implementations of experts that are worth measuring; ``batched_mm`` is slower than both."""

OURS = "ds_lightning"


def check_settings(peer: str, device: Device, **counts: int) -> None:
    """Refuse what cannot be measured.

    Args:
        peer: Package of the other side.
        device: Where both run.
        counts: Settings that must be 1 or more.

    Raises:
        ValueError: If peer or device is not there, or a count is below 1.
    """
    check_device(device)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if importlib.util.find_spec(peer) is None:
        raise ValueError(f"{peer} is not installed, expected it as the peer: pip install 'ds-lightning[dev]'")


def in_turns(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds that every side reports, round by round.

    The side that begins changes with the round, so that none always runs right after the same other one.

    Args:
        contestants: What measures a side once and returns its seconds, ours among them.
        repeats: Measured rounds, after one that is not.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats + 1):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            took = contestants[name]()
            if number:
                seconds[name].append(took)
    return seconds


def now() -> float:
    """Return the seconds on a clock, once a GPU has done all that it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def figures(
    model: DeepSeek, device: Device, seconds: Mapping[str, list[float]], amount: int, unit: str
) -> dict[str, Any]:
    """Return what was measured, ready for JSON.

    Args:
        model: What both sides ran.
        device: Where.
        seconds: Of every side and round.
        amount: Units a round.
        unit: What is counted, in the plural.
    """
    rates = {name: amount / median(times) for name, times in seconds.items()}
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": dict(seconds),
        f"{unit}_per_second": rates,
        "ratio": rates[OURS] / max(rate for name, rate in rates.items() if name != OURS),
    }


def contest_table(measured: Mapping[str, Any], what: str, settings: str, unit: str) -> Table:
    """Return figures for a terminal.

    Args:
        measured: As of :func:`figures`, with ``repeats``.
        what: Name of the measurement.
        settings: A few words for the title.
        unit: What is counted, in the plural.
    """
    where = f"{measured['threads']} threads" if measured["device"] == "cpu" else measured["device"]
    run = f"{measured.get('precision', 'fp32')}, {where}, median of {measured['repeats']}"
    title = f"{measured['parameters']:,} parameters, {settings}, {run}"
    table = Table(title=title, title_justify="left")
    table.add_column(what)
    table.add_column(f"{unit} a second", justify="right")
    for name, rate in measured[f"{unit}_per_second"].items():
        table.add_row(name, f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}")
    table.add_row("ratio to the best peer", f"{measured['ratio']:.2f}")
    return table
