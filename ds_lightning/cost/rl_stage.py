"""What a stage of reinforcement learning will need: generation, scoring and training apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.efficiency import choose_efficiency
from ds_lightning.cost.memory import USABLE, kv_cache_bytes, routed_params
from ds_lightning.cost.prices import Hardware, find_price, known_hardware
from ds_lightning.flops import active_param_count, forward_flops_per_token, param_count, train_flops_per_token

DECODE_EFFICIENCY = 0.23
"""Part of the memory bandwidth that decoding reaches: vLLM, Qwen3-4B in bfloat16 (8.04 GB) at batch 32 on a B200, 7,224
tokens a second against 8 TB/s (unslothai/unsloth#5108, as read in November 2026)."""


@dataclass(frozen=True, kw_only=True)
class RLStage:
    """A stage of reinforcement learning from group-relative advantages.

    Raises:
        ValueError: If a number is out of range.
    """

    steps: int
    """Optimizer steps."""
    prompts_per_step: int
    """Prompts that a step's batch holds."""
    group_size: int
    """Responses a prompt."""
    prompt_tokens: float
    """Mean tokens of a prompt."""
    response_tokens: float
    """Mean tokens of a response."""
    longest_response: float
    """Tokens of the longest response of a rollout: all devices wait for it."""
    rollout_samples: int | None = None
    """Responses generated at once; none: those of one step."""
    scoring_passes: float = 2.0
    """Forward passes over each sample beside training: of the old policy and of the reference."""
    tokens_per_pass: float = 1.0
    """Tokens that a decoding pass yields; more than 1 with speculative decoding."""
    weight_bytes: float = 2.0
    """Bytes a weight in generation."""
    cache_bytes: int = 2
    """Bytes a number of the latent cache."""
    devices_per_replica: int = 1
    """Devices that share the routed experts of one copy of the model; the other weights each has whole."""
    reward_seconds: float = 0.0
    """Seconds a rollout in which devices wait for rewards."""

    def __post_init__(self) -> None:
        """Refuse what could not be run."""
        at_least_one = ("steps", "prompts_per_step", "group_size", "devices_per_replica", "response_tokens")
        for name in (*at_least_one, "tokens_per_pass"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"RL stage: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("prompt_tokens", "scoring_passes", "reward_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"RL stage: {name} is {getattr(self, name)}, expected at least 0")
        for name in ("weight_bytes", "cache_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"RL stage: {name} is {getattr(self, name)}, expected more than 0")
        if self.longest_response < self.response_tokens:
            raise ValueError(
                f"RL stage: longest_response is {self.longest_response}, expected at least response_tokens "
                f"({self.response_tokens})"
            )

    @property
    def samples_per_step(self) -> int:
        """Responses that one optimizer step learns from."""
        return self.prompts_per_step * self.group_size


def plan_rl_stage(
    config: DeepSeekConfig,
    stage: RLStage,
    *,
    device: str,
    num_devices: int,
    usd_per_device_hour: float | None = None,
    efficiency: str | float | None = None,
    decode_efficiency: float = DECODE_EFFICIENCY,
) -> dict[str, Any]:
    """Return time and dollars of a stage in which the same devices generate, score and train in turn.

    Generation reads, for every token of the longest response, all weights that are not routed, the experts that any
    sequence of the replica visits, and the latent cache; or computes, if that takes longer. As short responses end,
    fewer sequences share the same reads: the tail costs nearly as much a pass as the start.

    Args:
        config: Shape of the policy.
        stage: The stage.
        device: Device in the price list.
        num_devices: Devices, a multiple of those of a replica.
        usd_per_device_hour: Your own price in US dollars; none: the price list's.
        efficiency: Of training and scoring; see :func:`ds_lightning.cost.plan`.
        decode_efficiency: Part of the bandwidth or the peak that decoding reaches.

    Raises:
        ValueError: If something is unknown or out of range, or model and cache do not fit.
    """
    hardware = known_hardware(device)
    price = find_price(hardware.device, usd_per_device_hour=usd_per_device_hour)
    if num_devices < 1 or num_devices % stage.devices_per_replica:
        raise ValueError(
            f"num_devices is {num_devices}, expected a multiple of devices_per_replica ({stage.devices_per_replica})"
        )
    if not 0 < decode_efficiency <= 1:
        raise ValueError(f"decode_efficiency is {decode_efficiency}, expected above 0 and at most 1")
    samples = stage.rollout_samples or stage.samples_per_step
    rollouts = stage.steps * stage.samples_per_step / samples
    decoding = _decoding(config, stage, hardware, samples / num_devices)
    value = choose_efficiency(hardware, active_param_count(config, include_embedding=False), efficiency)[0].value
    rate = hardware.bf16_tflops * 1e12 * value * num_devices
    seconds = _rollout_seconds(config, stage, samples, decoding.seconds / decode_efficiency, rate)
    hours = {name: each * rollouts * num_devices / 3600 for name, each in seconds.items()}
    phases = {
        name: {"seconds": seconds[name] * rollouts, "device_hours": each, "usd": each * price.usd_per_device_hour}
        for name, each in hours.items()
    }
    return {
        "device": hardware.device,
        "num_devices": num_devices,
        "rollouts": rollouts,
        "phases": phases,
        **_totals(stage, phases),
        "read_gb_per_pass": decoding.read / 1e9,
        "generation_memory_gb": decoding.held / 1e9,
        "assumption": (
            f"decoding reaches {decode_efficiency:.0%} of the memory's bandwidth, and the longest response of a "
            f"rollout has {stage.longest_response:,.0f} tokens at a mean of {stage.response_tokens:,.0f}"
        ),
    }


def _totals(stage: RLStage, phases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the sums over phases, and what they are a sample."""
    samples = stage.steps * stage.samples_per_step
    seconds, hours, usd = (sum(row[key] for row in phases.values()) for key in ("seconds", "device_hours", "usd"))
    return {
        "samples": samples,
        "wall_seconds": seconds,
        "device_hours": hours,
        "usd": usd,
        "usd_per_sample": usd / samples,
        "generation_share": phases["rollout"]["seconds"] / seconds,
        "tail_utilisation": stage.response_tokens / stage.longest_response,
        "tokens_per_second": samples * stage.response_tokens / phases["rollout"]["seconds"],
    }


def _rollout_seconds(
    config: DeepSeekConfig, stage: RLStage, samples: int, pass_seconds: float, rate: float
) -> dict[str, float]:
    """Return the seconds of each phase of one rollout and of the steps that learn from it; ``rate`` in FLOP/s."""
    length = max(1, round(stage.prompt_tokens + stage.response_tokens))
    forward = forward_flops_per_token(config, length, include_mtp=False)
    passes = stage.longest_response / stage.tokens_per_pass
    prefilled = samples / stage.group_size * stage.prompt_tokens
    computed = prefilled + samples * stage.response_tokens  # a prompt once for all of its responses, in training too
    return {
        "rollout": passes * pass_seconds + prefilled * forward / rate,
        "reward": stage.reward_seconds,
        "logprob": stage.scoring_passes * computed * forward / rate,
        "train": computed * train_flops_per_token(config, length, include_mtp=False) / rate,
    }


@dataclass(frozen=True)
class _Decoding:
    """One pass of generation on a device."""

    seconds: float
    """At the limits of memory and arithmetic."""
    read: float
    """Bytes read."""
    held: float
    """Bytes of weights and of the cache when all responses have their mean length."""


def _decoding(config: DeepSeekConfig, stage: RLStage, hardware: Hardware, share: float) -> _Decoding:
    """Return a pass with the mean number of sequences that are not at their end.

    Args:
        config: Shape of the policy.
        stage: The stage.
        hardware: The device.
        share: Sequences a device at the start.

    Raises:
        ValueError: If weights and cache do not fit.
    """
    routed, replica = _routed_of_main(config), stage.devices_per_replica
    whole = param_count(config) - routed
    running = share * stage.response_tokens / stage.longest_response
    touched = 0.0
    if routed:
        missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** (running * replica)
        touched = routed * (1 - missed) / replica
    length = stage.prompt_tokens + stage.response_tokens / 2
    read = stage.weight_bytes * (whole + touched)
    read += kv_cache_bytes(config, running * length, width=stage.cache_bytes)
    flops = running * forward_flops_per_token(config, max(1, round(length)), include_mtp=False)
    held = stage.weight_bytes * (whole + routed / replica)
    held += kv_cache_bytes(config, share * (stage.prompt_tokens + stage.response_tokens), width=stage.cache_bytes)
    if held > USABLE * hardware.links.memory_gb * 1e9:
        raise ValueError(
            f"generation does not fit: weights and cache need {held / 1e9:.4g} GB a device, {hardware.device} has "
            f"{hardware.links.memory_gb:g}: raise devices_per_replica ({replica}) or the number of devices, or halve "
            f"weight_bytes ({stage.weight_bytes:g})"
        )
    seconds = max(read / (hardware.links.memory_gb_per_s * 1e9), flops / (hardware.bf16_tflops * 1e12))
    return _Decoding(seconds, read, held)


def _routed_of_main(config: DeepSeekConfig) -> float:
    """Weights of the routed experts without those of multi-token prediction."""
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    return routed_params(config) * layers / config.num_moe_layers if config.num_moe_layers else 0.0
