"""Oracle: DeepSeek-V3's update by plain Python, on routing that is computed again from the weights of the step.

Each way in which other codebases have got the update wrong has a test that would see it: a move for every micro-batch,
loads counted twice under recomputation, routing of evaluation, a layer without a bias that ends the update of later
ones, and routers of prediction modules left out. The balance loss under recomputation is in tests/training, what a
common shift of all biases does in tests/ops.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ds_lightning.callbacks import RoutingBias
from ds_lightning.models import DeepSeek
from ds_lightning.nn.moe import Router
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Stairs
from tests.training.toy_pretraining import CONFIG, ROWS, SEQ, Rows, build, draw_step, fit, split, trainer

LAYERS, EXPERTS, GAMMA = 4, CONFIG.n_routed_experts, 0.125  # a gamma that sums without rounding
TOKENS = ROWS * SEQ * CONFIG.num_experts_per_tok

Loads = list[list[int]]
Biases = list[list[float]]


def routers(model: DeepSeek) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def biases(model: DeepSeek) -> Biases:
    found = [router.e_score_correction_bias for router in routers(model)]
    return [[] if bias is None else bias.tolist() for bias in found]


def count(model: DeepSeek, batch: dict[str, Any]) -> Loads:
    """Return the tokens that each expert of each layer gets, by counting the choices of the weights as they are."""
    gates: list[Gate] = []
    with torch.no_grad():
        hidden = model(batch["input_ids"], gates=gates)
        model.mtp_hidden(batch["input_ids"], hidden, gates=gates)
    counters = [Counter(gate.indices.flatten().tolist()) for gate in gates]
    return [[counter[expert] for expert in range(EXPERTS)] for counter in counters]


def add(loads: list[Loads]) -> Loads:
    return [[sum(counts) for counts in zip(*layers, strict=True)] for layers in zip(*loads, strict=True)]


def moved(before: Biases, loads: Loads, gamma: float) -> Biases:
    """b_i falls by gamma where load_i is above the mean, rises by it where below, and stays where it is the mean."""
    after = []
    for layer, load in zip(before, loads, strict=True):
        mean = sum(load) / len(load)
        after.append([b + gamma * ((n < mean) - (n > mean)) for b, n in zip(layer, load, strict=bool(layer))])
    return after


class Witness(Callback):
    """Counts the load of every micro-batch for itself, and keeps the biases after it; stands after RoutingBias."""

    def __init__(self) -> None:
        self.loads: list[Loads] = []
        self.before: list[Biases] = []
        self.after: list[Biases] = []
        self.noted: list[Loads | None] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = copy.deepcopy(pl_module.model)
        self.before.append(biases(model))
        self.loads.append(count(model, batch))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.after.append(biases(pl_module.model))
        load = pl_module.last_expert_load
        self.noted.append(None if load is None else load.int().tolist())


@pytest.mark.parametrize("recompute", [False, True])
def test_the_bias_moves_once_a_step_on_the_sum_of_its_micro_batches(*, recompute: bool) -> None:
    module, witness = build(bias_update_speed=GAMMA, recompute=recompute, lr=0.05), Witness()
    fit(module, [draw_step(0), draw_step(1), draw_step(2)], RoutingBias(), witness, accumulate=2)
    assert all(len(loads) == LAYERS for loads in witness.loads), "two layers and two prediction modules"
    expected = [[0.0] * EXPERTS] * LAYERS
    several = []
    for first in (0, 2, 4):
        assert witness.after[first] == witness.before[first] == expected, "not after the first micro-batch"
        pair = witness.loads[first : first + 2]
        several.append(moved(moved(expected, pair[0], GAMMA), pair[1], GAMMA))
        expected = moved(expected, add(pair), GAMMA)
        assert witness.after[first + 1] == expected
        assert witness.noted[first + 1] == add(pair)
        assert sum(map(sum, add(pair))) == LAYERS * TOKENS
        assert several[-1] != expected, "a move for every micro-batch would differ"
    assert all(any(layer) for layer in expected), "every router has moved"


def test_evaluation_moves_no_bias_and_counts_for_none() -> None:
    steps, runs = [draw_step(0), draw_step(1)], []
    for evaluate in (False, True):
        module, witness = build(bias_update_speed=GAMMA), Witness()
        rows = Rows([micro for step in steps for micro in split(step, 2)], [draw_step(9)] if evaluate else [])
        options = {"val_check_interval": 1, "num_sanity_val_steps": 1} if evaluate else {}
        trainer(RoutingBias(), witness, accumulate=2, **options).fit(module, rows)  # validates in mid-step too
        runs.append((witness.noted, witness.after, biases(module.model)))  # type: ignore[arg-type]
        trainer(RoutingBias()).validate(module, rows, verbose=False)
        assert biases(module.model) == runs[-1][2]  # type: ignore[arg-type]
    assert runs[0] == runs[1]


def test_the_load_is_summed_over_ranks() -> None:
    module = build(bias_update_speed=GAMMA)
    assert module.model is not None
    mine, other = (count(module.model, part) for part in split(draw_step(0), 2))
    module.expert_load = torch.tensor(mine, dtype=torch.float32)
    strategy = Mock()
    strategy.reduce = lambda load, reduce_op: load + torch.tensor(other) if reduce_op == "sum" else None
    module._trainer = Mock(spec=Trainer, strategy=strategy)
    module.step_routing_bias()
    expected = moved([[0.0] * EXPERTS] * LAYERS, add([mine, other]), GAMMA)
    assert biases(module.model) == expected
    assert expected != moved([[0.0] * EXPERTS] * LAYERS, mine, GAMMA)
    assert module.last_expert_load is not None
    assert module.last_expert_load.int().tolist() == add([mine, other])
    assert module.expert_load is None


def test_a_layer_without_a_bias_ends_no_other_layers_update() -> None:
    module, witness = build(bias_update_speed=GAMMA), Witness()
    assert module.model is not None
    routers(module.model)[1].e_score_correction_bias = None
    fit(module, [draw_step(0)], RoutingBias(), witness)
    expected = moved([[0.0] * EXPERTS, [], [0.0] * EXPERTS, [0.0] * EXPERTS], witness.loads[0], GAMMA)
    assert biases(module.model) == expected
    assert all(any(layer) for layer in expected if layer)


def test_the_speed_follows_progress_and_zero_stands_still() -> None:
    step, witness = draw_step(0), Witness()
    module = build(4 * step["step_tokens"], bias_update_speed=Stairs([GAMMA, 0.0], [0.7]))
    fit(module, [step] * 4, RoutingBias(), witness)
    first, second, third, fourth = witness.after
    assert second != first
    assert fourth == third == second, "after three of four steps, 0.75 of the run, the speed is zero"
    assert all(noted is not None for noted in witness.noted), "the load is measured all the same"


def test_a_resumed_run_waits_for_its_next_step() -> None:
    callback, module = RoutingBias(), Mock()
    module.named_buffers.return_value = []
    run: Any = Mock(spec=Trainer, global_step=7)
    callback.on_train_start(run, module)
    callback.on_train_batch_end(run, module, None, None, 14)
    module.step_routing_bias.assert_not_called()
    run.global_step = 8
    callback.on_train_batch_end(run, module, None, None, 15)
    callback.on_train_batch_end(run, module, None, None, 16)
    module.step_routing_bias.assert_called_once_with()


def test_no_gradient_and_no_optimizer_reaches_the_bias() -> None:
    module = build(bias_update_speed=0.0)
    fit(module, [draw_step(0)], RoutingBias())
    assert module.model is not None
    assert biases(module.model) == [[0.0] * EXPERTS] * LAYERS
    assert not any("e_score_correction_bias" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("64-true", "float64")])
def test_a_precision_that_rounds_the_biases_is_refused(precision: Any, dtype: str, tmp_path: Path) -> None:
    message = (
        rf"^trainer\.precision is {precision}, which makes model\.layers\.1\.mlp\.gate\.e_score_correction_bias "
        rf"torch\.{dtype}, expected torch\.float32: use bf16-mixed or 32-true$"
    )
    with pytest.raises(ValueError, match=message):
        fit(build(), [draw_step(0)], RoutingBias(), precision=precision)
