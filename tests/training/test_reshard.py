"""Shards put together anew, against parameters cut as they are to be in the first place.

How DeepSpeed cuts is tested by the runs of several ranks, marked *soak*, which resume from what others wrote.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lightning.optim.sharded_matrices import Cut
from ds_lightning.training.reshard import _check, reshard
from ds_lightning.training.shards import cuts

SHAPES = [
    {"a": torch.Size((3, 5)), "b": torch.Size((4,)), "c": torch.Size((2, 7))},
    {"d": torch.Size((1,)), "e": torch.Size((6, 6))},
]
LAYOUTS = list(product((2, 3), (1, 2, 4, 7)))  # stage (1 cuts as 2 does), ranks


def written(stage: int, ranks: int) -> tuple[list[dict[str, Cut]], list[list[dict[str, Any]]]]:
    """Return how all parameters are cut, and the contents of each rank: elements have numbers of their own."""
    layout, first = cuts(SHAPES, stage, ranks), 1.0
    contents = [[_flat(group, stage) for group in layout] for _ in range(ranks)]
    for index, group in enumerate(layout):
        for cut in group.values():
            numbers = torch.arange(first, first + cut.numel)
            first += cut.numel
            for rank in range(ranks):
                here = cut.on(rank)
                for key, sign in (("weights", 1), ("momentum", -1)):
                    flat = contents[rank][index][key]
                    flat[here.at : here.at + here.last - here.first] = sign * numbers[here.first : here.last]
    return layout, contents


def _flat(group: dict[str, Cut], stage: int) -> dict[str, Any]:
    shards = [cut.shard for cut in group.values()]
    size = sum(shards) if stage == 3 else shards[0]
    return {"weights": torch.zeros(size), "momentum": torch.zeros(size), "step": torch.tensor(5.0)}


@pytest.mark.parametrize("before", LAYOUTS)
def test_what_some_ranks_wrote_becomes_what_others_would_have_had(before: tuple[int, int]) -> None:
    old, theirs = written(*before)
    for after in LAYOUTS:
        new, expected = written(*after)
        for rank in range(after[1]):
            sizes = [len(content["weights"]) for content in expected[rank]]
            found = reshard(theirs, old, new, sizes, rank)
            for content, wanted in zip(found, expected[rank], strict=True):
                assert content.keys() == wanted.keys()
                assert all(torch.equal(content[key], value) for key, value in wanted.items())


def test_groups_in_other_flat_tensors_are_found_by_name() -> None:
    """Stage 3 divides large groups: parts of a group are then flat tensors of their own."""
    old, theirs = written(3, 2)
    new = cuts([{"a": SHAPES[0]["a"]}, {"b": SHAPES[0]["b"], "c": SHAPES[0]["c"]}, SHAPES[1]], 3, 2)
    found = reshard(theirs, old, new, [8, 9, 19], rank=1)
    joined = torch.cat([content["weights"] for content in found[:2]])
    assert torch.equal(joined, theirs[1][0]["weights"])
    assert torch.equal(found[2]["weights"], theirs[1][1]["weights"])


def test_padding_is_zero_and_scalars_are_copies() -> None:
    old, theirs = written(2, 1)
    theirs[0][1]["weights"][37:] = 7.0
    [*_, content] = reshard(theirs, old, cuts(SHAPES, 3, 4), [9, 10], rank=3)
    assert content["weights"][1:].tolist() == list(range(62, 71))
    assert content["weights"][0] == 0, "of the parameter with one element, the last rank has padding alone"
    content["step"] += 1
    assert theirs[0][1]["step"] == 5


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        (
            [{"a": torch.Size((3, 4))}],
            [{"lr"}],
            r"holds a of shape \(3, 5\), the model has it of shape \(3, 4\)",
        ),
        ([{"z": torch.Size((3, 5))}], [{"lr"}], r"holds a of shape \(3, 5\), the model has it of shape None"),
        ([{"a": torch.Size((3, 5))}], [{"lr", "muon"}], "step-1 holds the states .* 1 parameter groups, not .* with 1"),
        ([{"a": torch.Size((3, 5))}], [{"lr"}, {"lr"}], "optimizer with 1 parameter groups, not of this one with 2"),
    ],
)
def test_what_belongs_to_another_run_is_refused(shapes: Any, groups: Any, message: str) -> None:
    theirs: list[dict[str, torch.Size]] = [{"a": torch.Size((3, 5))}]
    with pytest.raises(ValueError, match=message):
        _check(Path("step-1") / "state.ckpt", theirs, shapes, [{"lr"}], groups)
    _check(Path("step-1") / "state.ckpt", theirs, theirs, [{"lr"}], [{"lr"}])
