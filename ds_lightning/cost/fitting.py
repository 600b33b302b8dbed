"""Which division of a model over devices fits into their memory, and what would if none does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_lightning.cost.memory import USABLE, Layout, Memory, memory_per_device
from ds_lightning.cost.prices import Hardware
from ds_lightning.cost.run_config import RunConfig

PUBLISHED: dict[str, Any] = {"expert_parallel": 64, "pipeline_parallel": 16, "zero_stage": 1, "recompute": True}
"""DeepSeek-V3's layout on 2,048 devices (arXiv:2412.19437, section 3.2), with all of a block recomputed."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A layout that fits."""

    layout: Layout
    memory: Memory
    micro_rows: int
    """Rows of a micro-batch on a device."""
    micro_batches: int
    """Micro-batches that a device runs in a step."""
    notes: tuple[str, ...] = ()
    """What was assumed to make it fit."""


@dataclass(frozen=True)
class Division:
    """What a user asks of the layout; none: the lowest ZeRO stage that fits, and experts and layers undivided."""

    zero_stage: int | None = None
    offload: bool = False
    expert_parallel: int | None = None
    pipeline_parallel: int | None = None


UNDIVIDED = Division()


def fit_layout(run: RunConfig, hardware: Hardware, num_devices: int, asked: Division) -> Fit:
    """Return the lowest ZeRO stage that fits, or for many devices the published layout of DeepSeek-V3.

    Args:
        run: What is trained.
        hardware: The devices.
        num_devices: How many of them.
        asked: What the layout has to be.

    Raises:
        ValueError: If nothing fits, with what would; or if the devices or rows cannot be divided so.
    """
    experts, pipeline = asked.expert_parallel or 1, asked.pipeline_parallel or 1
    _check_division(run, num_devices, asked, experts, pipeline)
    layout = Layout(
        num_devices=num_devices,
        offload=asked.offload,
        recompute=run["model.init_args.recompute"],
        expert_parallel=experts,
        pipeline_parallel=pipeline,
    )
    stages = [0, 1, 2, 3] if num_devices > 1 else [0]
    if asked.offload:
        stages = [stage or 1 for stage in stages]
    if asked.zero_stage is not None:
        stages = [asked.zero_stage]
    for stage in stages:
        fit = _sized(run, replace(layout, zero_stage=stage), hardware)
        if _fits(fit, hardware):
            return fit
    if asked == UNDIVIDED:
        published = _published(run, hardware, num_devices)
        if published is not None:
            return published
    raise ValueError(_refusal(run, hardware, replace(layout, zero_stage=stages[-1])))


def _check_division(run: RunConfig, num_devices: int, asked: Division, experts: int, pipeline: int) -> None:
    if asked.zero_stage is not None and not 0 <= asked.zero_stage <= 3:
        raise ValueError(f"zero_stage is {asked.zero_stage}, expected 0 to 3")
    if asked.offload and asked.zero_stage == 0:
        raise ValueError("zero_stage is 0 with offload, expected 1 to 3: ZeRO owns what is kept on the host")
    if experts < 1 or pipeline < 1 or num_devices % (experts * pipeline):
        raise ValueError(
            f"expert_parallel {experts} times pipeline_parallel {pipeline} is no divisor of num_devices ({num_devices})"
        )
    if experts > 1 and (not run.model.n_routed_experts or run.model.n_routed_experts % experts):
        raise ValueError(f"expert_parallel is {experts}, expected a divisor of {run.model.n_routed_experts} experts")
    ranks = num_devices // pipeline
    if run.batch_size < ranks:
        raise ValueError(
            f"data.init_args.batch_size is {run.batch_size} rows, expected at least one for each of {ranks} devices: "
            "plan fewer devices or a larger batch"
        )


def _sized(run: RunConfig, layout: Layout, hardware: Hardware, micro_rows: int | None = None) -> Fit:
    """Compute the memory of a layout, with the run's micro-batch or another."""
    accumulate = run["trainer.accumulate_grad_batches"]
    if micro_rows is None:
        micro_rows = -(-run.batch_size // (layout.data_parallel * accumulate))
    memory = memory_per_device(
        run.model,
        layout,
        micro_rows=micro_rows,
        seq_len=run.seq_len,
        mixed=run.mixed(hardware.device),
        optimizer=run["model.init_args.optimizer"],
        on_cpu=hardware.device == "cpu",
    )
    micro_batches = max(1, round(run.batch_size / (layout.data_parallel * micro_rows)))
    return Fit(layout=layout, memory=memory, micro_rows=micro_rows, micro_batches=micro_batches)


def _fits(fit: Fit, hardware: Hardware) -> bool:
    return fit.memory.total <= USABLE * hardware.links.memory_gb * 1e9


def _published(run: RunConfig, hardware: Hardware, num_devices: int) -> Fit | None:
    """Return DeepSeek-V3's layout where the devices and experts can be divided so and it fits."""
    experts, pipeline = PUBLISHED["expert_parallel"], PUBLISHED["pipeline_parallel"]
    if not run.model.n_routed_experts or num_devices % (experts * pipeline) or run.model.n_routed_experts % experts:
        return None
    fit = _sized(run, Layout(num_devices=num_devices, **PUBLISHED), hardware, micro_rows=1)
    if not _fits(fit, hardware):
        return None
    note = (
        "ZeRO alone does not fit: the layout is that published for DeepSeek-V3 (16 pipeline stages, experts over 64 "
        "devices, ZeRO-1, micro-batches of one row, blocks recomputed), which this package does not run"
    )
    return replace(fit, notes=(note,))


def _refusal(run: RunConfig, hardware: Hardware, layout: Layout) -> str:
    """Say what is missing, and which changes would do."""
    fit = _sized(run, layout, hardware)
    memory, available = fit.memory, hardware.links.memory_gb
    remedies = []
    smaller = _sized(run, layout, hardware, micro_rows=1)
    accumulate = -(-run.batch_size // layout.data_parallel)
    words, changed = [], layout
    if fit.micro_rows > 1:
        words.append(f"trainer.accumulate_grad_batches {accumulate}")
    attempts = [(list(words), changed)] if words else []
    if not changed.recompute:
        changed = replace(changed, recompute=True)
        words.append("model.init_args.recompute true")
        attempts.append((list(words), changed))
    if not changed.offload:
        changed = replace(changed, offload=True, zero_stage=max(changed.zero_stage, 1))
        words.append("offload")
        attempts.append((list(words), changed))
    for said, attempt in attempts:
        if _fits(_sized(run, attempt, hardware, micro_rows=1), hardware):
            remedies.append(" and ".join(said))
            break
    if devices := _enough_devices(run, hardware, layout):
        rows = "" if fit.micro_rows == 1 else " with micro-batches of one row"
        recompute = "" if layout.recompute else " and recompute"
        remedies.append(f"{devices:,} devices at ZeRO-3{rows}{recompute}")
    would = "; or ".join(remedies) if remedies else "a device with more memory, or experts and layers divided"
    return (
        f"the plan does not fit: {layout.num_devices:,} {hardware.device} have {available:g} GB each, {USABLE:.0%} of "
        f"it usable, and ZeRO-{layout.zero_stage} needs {memory.total / 1e9:.4g} GB "
        f"(weights {memory.weights / 1e9:.3g}, gradients {memory.gradients / 1e9:.3g}, optimizer "
        f"{memory.optimizer / 1e9:.3g}, activations {memory.activations / 1e9:.3g}, workspace "
        f"{memory.workspace / 1e9:.3g}; {smaller.memory.total / 1e9:.4g} with micro-batches of one row); "
        f"what would fit: {would}"
    )


def _enough_devices(run: RunConfig, hardware: Hardware, layout: Layout) -> int | None:
    """Return the fewest devices, doubling, that fit at ZeRO-3 with recomputation and one row a micro-batch."""
    devices = layout.num_devices
    while devices * 2 <= run.batch_size:
        devices *= 2
        wider = replace(layout, num_devices=devices, zero_stage=3, recompute=True)
        if _fits(_sized(run, wider, hardware, micro_rows=1), hardware):
            return devices
    return None
