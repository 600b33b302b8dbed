"""ZeRO on two ranks against one process, on the same global batches.

The oracle is the run of one process with plain AdamW. Sums run in another order there, so the two agree within fp32
rounding: a gradient, whose clipped norm is at most 0.5, differs by some 1e-7 of it; AdamW's step has a slope of at most
lr / eps = 10 in the gradient; six steps of that are below 3e-6. The norm before clipping, which tells of any factor
that AdamW or clipping would hide, is a sum over all weights: 1e-5 of it. Muon's step is at most lr sqrt(24) / 5 = 0.01
times a matrix whose smallest singular values have grown by at most 78, rounding with them: 1e-7 of that in six steps
is below 1e-6. Lightning's own classes run beside ours where they are known to be wrong, so that a test shows what it is
for.
"""

import json
import math
from itertools import product
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

from ds_lightning.ops.rope import rope_tables
from ds_lightning.training import ZeRO
from ds_lightning.training.shards import _with_stage
from ds_lightning.training.zero_config import fit_buckets
from tests.training.ranks import run_ranks
from tests.training.toy_pretraining import CONFIG
from tests.training.toy_zero import STEPS, settings, train

Result = dict[str, Any]

MUON = {"lr": 1e-2, "eps": 1e-3, "optimizer": "muon"}

RUNS = {
    **{f"{stage} starved": settings(stage=stage, starve=True) for stage in (1, 2, 3)},
    **{f"{stage} accumulating": settings(stage=stage, accumulate=4) for stage in (1, 2, 3)},
    **{f"{stage} muon": settings(stage=stage, accumulate=4, module=MUON) for stage in (1, 2, 3)},
    "offloaded muon": settings(stage=2, offload=True, module=MUON),
    "2 broken": settings(stage=2, nan_at=2),
    "3 broken": settings(stage=3, nan_at=2),
    "offloaded": settings(stage=3, offload=True, module={"lr": 1e-2, "eps": 1e-3, "recompute": True}),
    "bf16": settings(stage=3, precision="bf16-mixed"),
}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[Result]]:
    """All runs, one after the other in the same two processes; a list of what each rank returns."""
    results = run_ranks("tests.training.toy_zero:main", json.dumps(list(RUNS.values())))
    return {name: [rank[index] for rank in results] for index, name in enumerate(RUNS)}


@pytest.fixture(scope="module")
def one() -> dict[bool, Result]:
    """One process, by whether rows starve experts."""
    return {starve: train(settings(starve=starve)) for starve in (False, True)}


def assert_equal(result: Result, expected: Result) -> None:
    assert len(result["points"]) == len(expected["points"]) == STEPS
    for point, wanted in zip(result["points"], expected["points"], strict=True):
        assert point["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-6)
        assert point["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-5)
        assert point["train/lr"] == wanted["train/lr"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=3e-6)
    for biases, wanted in zip(result["biases"], expected["biases"], strict=True):
        assert all(torch.equal(biases[name], bias) for name, bias in wanted.items())


@pytest.mark.soak
def test_the_run_is_one_that_could_differ(one: dict[bool, Result]) -> None:
    points, biases = one[False]["points"], one[False]["biases"]
    assert all(point["train/grad_norm"] > 2 for point in points), "all of them are clipped"
    assert len({point["train/loss"] for point in points}) == STEPS
    assert all(bias.any() for bias in biases[-1].values())


@pytest.mark.soak
@pytest.mark.parametrize("name", ["1 accumulating", "2 accumulating", "3 accumulating", "offloaded"])
def test_two_ranks_equal_one_process(ranks: dict[str, list[Result]], one: dict[bool, Result], name: str) -> None:
    for result in ranks[name]:
        assert_equal(result, one[False])
        assert result["points"][-1]["train/skipped_steps"] == 0


@pytest.mark.soak
def test_two_ranks_equal_one_process_under_muon(ranks: dict[str, list[Result]], one: dict[bool, Result]) -> None:
    expected = train(settings(module=MUON))
    moved = one[False]["weights"]["model.layers.1.self_attn.o_proj.weight"]
    assert not torch.allclose(expected["weights"]["model.layers.1.self_attn.o_proj.weight"], moved, rtol=0, atol=1e-3)
    for name in ("1 muon", "2 muon", "3 muon", "offloaded muon"):
        for result in ranks[name]:
            assert_equal(result, expected)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_they_do_where_experts_get_no_token_on_one_rank(
    ranks: dict[str, list[Result]], one: dict[bool, Result], stage: int
) -> None:
    first, second = ranks[f"{stage} starved"]
    idle = second["loads"][0] == 0
    assert (idle & (first["loads"][0] > 0)).any(dim=1).all(), "in every layer an expert that one rank alone feeds"
    for result in (first, second):
        assert_equal(result, one[True])


@pytest.mark.soak
@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_no_number_is_skipped_and_counted_on_all_ranks(
    ranks: dict[str, list[Result]], one: dict[bool, Result], stage: int
) -> None:
    for result in ranks[f"{stage} broken"]:
        points, biases = result["points"], result["biases"]
        assert [point["train/skipped_steps"] for point in points] == [0, 0, 1, 1, 1, 1]
        assert math.isinf(points[2]["train/grad_norm"])
        assert all(math.isfinite(point["train/loss"]) for point in points[3:])
        assert all(torch.equal(biases[1][name], bias) for name, bias in biases[2].items()), "biases move with weights"
        assert not all(torch.equal(biases[2][name], bias) for name, bias in biases[3].items())
        assert points[1]["train/loss"] == pytest.approx(one[False]["points"][1]["train/loss"], rel=1e-6)


@pytest.mark.soak
def test_buffers_are_exact_where_weights_are_bfloat16(ranks: dict[str, list[Result]]) -> None:
    [first, second] = ranks["bf16"]
    gamma = torch.tensor(0.001)
    ways = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=STEPS)))
    reachable = torch.zeros(len(ways))
    for way in ways.unbind(dim=1):
        reachable = reachable + gamma * way
    for name, bias in first["biases"][-1].items():
        assert bias.dtype == torch.float32, name
        assert torch.isin(bias, reachable).all(), "a sum of steps of a thousandth in fp32"
        assert torch.equal(bias, second["biases"][-1][name])
    exact = rope_tables(CONFIG.qk_rope_head_dim, 12, CONFIG.rope_theta, CONFIG.rope_scaling)
    assert all(torch.equal(table, wanted) for table, wanted in zip(first["rope"], exact, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 4}, "stage is 4, expected 1, 2 or 3"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0, expected more than 0"),
        ({"config": {"elasticity": {}}}, r"config\.elasticity: no such key of DeepSpeed [\d.]+$"),
        (
            {"config": {"zero_optimization": {"overlap_com": True}}},
            r"config\.zero_optimization\.overlap_com: no such key of DeepSpeed [\d.]+; did you mean overlap_comm\?",
        ),
        (
            {"config": {"gradient_clipping": 1.0}},
            r"config\.gradient_clipping is 1\.0, expected trainer\.gradient_clip_val in",
        ),
        (
            {"config": {"zero_optimization": {"stage": 1}}},
            r"zero_optimization\.stage is 1, expected the strategy's stage",
        ),
        ({"config": {"zero_optimization": 2}}, r"config\.zero_optimization is 2, expected its settings by name"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeRO(**arguments)


@pytest.mark.parametrize(("weights", "size"), [(7, 8), (8, 8), (300_000_001, 200_000_000)])
def test_buckets_are_as_large_as_the_model_and_even(weights: int, size: int) -> None:
    config: dict[str, Any] = {"zero_optimization": {}}
    fit_buckets(config, torch.nn.Linear(weights, 1, bias=False, device="meta"))
    assert config["zero_optimization"] == {"reduce_bucket_size": size, "allgather_bucket_size": size}


def test_what_has_no_weights_is_moved_and_what_has_some_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZeRO, "root_device", torch.device("meta"))
    module = torch.nn.ModuleDict({"metric": MeanMetric(), "linear": torch.nn.Linear(2, 2)})
    ZeRO(3)._move_rest(module)
    assert [value.device.type for value in (module["metric"].mean_value, module["linear"].weight)] == ["meta", "cpu"]


def test_a_shard_names_its_stage_also_where_deepspeed_leaves_it_out() -> None:
    of_optimizer: dict[str, Any] = {"optimizer_state_dict": {"partition_count": [1]}}
    of_model: dict[str, Any] = {"module": {}}
    assert _with_stage(of_optimizer, 1)["optimizer_state_dict"]["zero_stage"] == 1
    assert _with_stage({"optimizer_state_dict": {"zero_stage": 2}}, 1)["optimizer_state_dict"]["zero_stage"] == 2
    assert _with_stage(of_model, 1) == {"module": {}}


def test_keys_of_deepspeed_are_passed_on() -> None:
    ours = ZeRO(3, config={"zero_optimization": {"stage3_prefetch_bucket_size": 7}, "communication_data_type": "fp32"})
    assert isinstance(ours.config, dict)
    assert ours.config["communication_data_type"] == "fp32"
    assert ours.config["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert ours.config["zero_optimization"]["stage"] == 3
    assert ours.config["data_types"] == {"grad_accum_dtype": "fp32"}
