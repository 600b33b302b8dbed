"""Oracles: bytes and FLOPs of a step written out by hand for shapes whose parts are counted there."""

from __future__ import annotations

from typing import Any

import pytest

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.memory import Layout, activation_bytes, memory_per_device, routed_params, trained_params
from ds_lightning.cost.prices import known_hardware
from ds_lightning.cost.roofline import StepBound, muon_flops, step_bound
from ds_lightning.flops import train_flops_per_token
from tests.cost.shapes import SMALL, V3

H800 = known_hardware("h800")


def bound(layout: Layout, config: DeepSeekConfig = SMALL, **changes: Any) -> StepBound:
    options: dict[str, Any] = {
        "tokens_per_step": 8192,
        "seq_len": 256,
        "micro_batches": 2,
        "mixed": True,
        "optimizer": "adamw",
    }
    return step_bound(config, layout, H800, **{**options, **changes})


def test_arithmetic_is_the_closed_form_over_the_peak_and_recomputation_a_third_more() -> None:
    seconds = 8192 * train_flops_per_token(SMALL, 256) / 989.5e12
    assert bound(Layout(num_devices=1)).compute == pytest.approx(seconds)
    assert bound(Layout(num_devices=1, recompute=True)).compute == pytest.approx(seconds * 4 / 3)
    assert bound(Layout(num_devices=4)).compute == pytest.approx(seconds / 4)


def test_memory_carries_weights_thrice_a_micro_batch_and_activations_twice() -> None:
    moved = 3 * 2 * trained_params(SMALL) * 2 + 2 * activation_bytes(SMALL, 8192, mixed=True, recompute=False)
    assert bound(Layout(num_devices=1)).memory == pytest.approx(moved / 3.35e12)


def test_adamw_carries_28_bytes_a_parameter_and_zero_divides_them() -> None:
    """Weight, gradient and two moments read, weight and two moments written, 4 bytes each."""
    whole = 7 * 4 * trained_params(SMALL) / 3.35e12
    assert bound(Layout(num_devices=8)).optimizer == pytest.approx(whole)
    assert bound(Layout(num_devices=8, zero_stage=1)).optimizer == pytest.approx(whole / 8)
    tables = 2 * 512 * 128 + 3 * 8 * 128
    muon = (5 * 4 * (trained_params(SMALL) - tables) + 7 * 4 * tables) / 3.35e12 + muon_flops(SMALL) / 989.5e12
    assert bound(Layout(num_devices=1), optimizer="muon").optimizer == pytest.approx(muon)


@pytest.mark.parametrize(("stage", "bytes_a_parameter"), [(0, 4 + 4), (1, 4 + 2), (2, 4 + 2), (3, 2 * (4 + 2 + 2))])
def test_zero_sends_what_its_paper_says(stage: int, bytes_a_parameter: float) -> None:
    """Gradients scattered and weights gathered once a step; at stage 3 both for each of two micro-batches."""
    expected = 7 / 8 * trained_params(SMALL) * bytes_a_parameter / 160e9
    assert bound(Layout(num_devices=8, zero_stage=stage)).data_parallel == pytest.approx(expected)


def test_between_nodes_the_network_is_the_link() -> None:
    inside, across = bound(Layout(num_devices=8)).data_parallel, bound(Layout(num_devices=16)).data_parallel
    assert across / inside == pytest.approx(15 / 16 / (7 / 8) * 160 / 50)


def test_tokens_cross_to_four_nodes_there_and_back_in_both_directions() -> None:
    """DeepSeek-V3 over 64 devices: 59 layers, 4 copies of 7,168 numbers of 2 bytes, dispatch and combine, twice."""
    layout = Layout(num_devices=2048, zero_stage=1, expert_parallel=64, pipeline_parallel=16)
    seconds = bound(layout, V3, seq_len=4096, tokens_per_step=2048 * 4096).expert_parallel
    assert seconds == pytest.approx(4096 * 59 * 4 * 7168 * 2 * 2 * 2 * 63 / 64 / 50e9)
    assert bound(Layout(num_devices=2048), V3, seq_len=4096, tokens_per_step=2048 * 4096).expert_parallel == 0


def test_communication_hides_behind_arithmetic_and_the_optimizer_follows() -> None:
    step = StepBound(compute=3, memory=1, optimizer=0.5, data_parallel=2, expert_parallel=0.5)
    assert (step.total, step.bound_by) == (3.5, "compute")
    step = StepBound(compute=3, memory=1, optimizer=0.5, data_parallel=2, expert_parallel=2)
    assert (step.total, step.bound_by) == (4.5, "communication")


def test_the_workspace_is_the_larger_of_logits_and_an_expert_layer() -> None:
    def workspace(rows: int, **division: Any) -> float:
        layout = Layout(num_devices=8, **division)
        return memory_per_device(SMALL, layout, micro_rows=rows, seq_len=256, mixed=True, optimizer="adamw").workspace

    logits = 512 * (256 * (2 + 4 + 2) + 2 * 128)  # as products give them, in fp32, as a gradient; the head's gradient
    rows = 256 * 3 + 8 * 32
    layer = 2 * (rows * (2 * 128 + 7 * 96) + 8 * 3 * 128 * 96)
    assert workspace(1) == max(logits, layer)
    assert workspace(1, expert_parallel=8) == max(logits, 2 * (rows * (2 * 128 + 7 * 96) + 3 * 128 * 96))
    experts = routed_params(SMALL) // 3
    assert workspace(1, zero_stage=3) - workspace(1) == pytest.approx(2 * experts, rel=0.4)  # and attention
