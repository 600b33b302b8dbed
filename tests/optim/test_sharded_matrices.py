"""Muon on flat tensors that ranks share, against Muon on the whole parameters in one process.

Ranks are threads here, whose sum over ranks waits until all have come. The batches of the products are others, so fp32
may round differently: 1e-7 of an update, of which the smallest singular values grow by at most 78 in each of two steps.
Where matrices lie is checked against a row of numbered elements.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models import DeepSeek
from ds_lightning.optim import Muon, muon_groups
from ds_lightning.optim.muon import orthogonalise
from ds_lightning.optim.sharded_matrices import Cut, Sharding, Stretch, find_matrices, gather
from ds_lightning.training.shards import cuts

ROOT = Path(__file__).parents[2]
SHAPES = {"experts": (3, 8, 5), "matrix": (6, 7), "wide": (4, 10)}


def tensors(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def muon(parameters: list[Tensor]) -> Muon:
    return Muon([{"params": parameters, "muon": True, "weight_decay": 0.1, "parts": 2}], lr=0.01)


def on_ranks(ranks: int, function: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Call a function on threads that take each other for the ranks of a run; return what they return."""
    barrier, given, results = threading.Barrier(ranks, timeout=20), dict[int, Tensor](), dict[int, Any]()

    def all_reduce(tensor: Tensor) -> None:
        given[threading.get_ident()] = tensor.clone()
        barrier.wait()
        total = torch.stack(list(given.values())).sum(dim=0)
        barrier.wait()
        tensor.copy_(total)

    def call(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException:
            barrier.abort()
            raise

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == ranks
    return [results[rank] for rank in range(ranks)]


def flatten(values: dict[str, Tensor], cut: dict[str, Cut], size: int, rank: int) -> Tensor:
    flat = torch.zeros(size)
    for name, value in values.items():
        here = cut[name].on(rank)
        flat[here.at : here.at + here.last - here.first] = value.flatten()[here.first : here.last]
    return flat


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_steps_on_shards_are_those_on_whole_parameters(stage: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: nn.Parameter(value) for name, value in tensors(0).items()}
    optimizer = muon(list(whole.values()))
    for seed in (1, 2):
        for name, gradient in tensors(seed).items():
            whole[name].grad = gradient
        optimizer.step()

    [cut] = cuts([{name: torch.Size(shape) for name, shape in SHAPES.items()}], stage, ranks)
    size = sum(one.shard for one in cut.values()) if stage == 3 else cut["wide"].shard
    contents = [(cut[name], SHAPES[name]) for name in SHAPES]

    def train(rank: int) -> Tensor:
        flat = nn.Parameter(flatten(tensors(0), cut, size, rank))
        optimizer = muon([flat])
        optimizer.sharding = Sharding({flat: contents}, rank, ranks, torch.device("cpu"))
        for seed in (1, 2):
            flat.grad = flatten(tensors(seed), cut, size, rank)
            optimizer.step()
        return flat.detach()

    for rank, flat in enumerate(on_ranks(ranks, train, monkeypatch)):
        expected = flatten({name: parameter.detach() for name, parameter in whole.items()}, cut, size, rank)
        torch.testing.assert_close(flat, expected, rtol=0, atol=1e-6)


def test_cuts_in_a_row_are_a_row_cut_into_even_shards() -> None:
    shapes = {"a": torch.Size((3, 5)), "b": torch.Size((4,)), "c": torch.Size((2, 3))}
    row = [(name, element) for name, shape in shapes.items() for element in range(shape.numel())]
    [cut] = cuts([shapes], 1, ranks=3)
    shard = 10  # of 25 elements, and even
    for name, shape in shapes.items():
        for rank in range(3):
            here, mine = cut[name].on(rank), row[rank * shard : (rank + 1) * shard]
            elements = [element for owner, element in mine if owner == name]
            assert list(range(here.first, here.last)) == elements
            assert not elements or mine[here.at] == (name, elements[0])
        assert [cut[name].rank_of(x) for x in range(shape.numel())] == [
            place // shard for place, (owner, _) in enumerate(row) if owner == name
        ]


def test_cuts_of_each_parameter_lie_one_after_the_other() -> None:
    [cut] = cuts([{"a": torch.Size((3, 5)), "b": torch.Size((4,))}], 3, ranks=4)
    assert [cut["a"].on(rank) for rank in range(4)] == [(0, 4, 0), (4, 8, 0), (8, 12, 0), (12, 15, 0)]
    assert [cut["b"].on(rank)[:2] for rank in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert {cut["b"].on(rank).at for rank in range(4)} == {4}


def test_what_a_rank_has_nothing_of_is_an_empty_stretch() -> None:
    cut = Cut(numel=6, origin=4, shard=5, base=0)
    assert [cut.on(rank) for rank in (0, 1)] == [Stretch(0, 1, 4), Stretch(1, 6, 0)]
    nothing = cut.on(2)
    assert nothing.first == nothing.last


def test_matrices_in_one_piece_are_one_stretch_and_the_others_are_shared_in_one_order() -> None:
    cut = Cut(numel=60, origin=3, shard=16, base=0)  # five matrices of 12 elements, after 3 others
    first, second = (find_matrices([(cut, (5, 3, 4))], 1, rank)[3, 4] for rank in (0, 1))
    assert first.whole == [slice(3, 15)]
    assert second.whole == []
    assert first.shared == [(slice(15, 16), 0), (slice(0, 0), 0), (slice(0, 0), 0)]
    assert second.shared == [(slice(0, 11), 1), (slice(11, 16), 0), (slice(0, 0), 0)]


def test_shared_matrices_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(24.0).view(4, 6)
    parts = [[(row[:2], 0) for row in whole], [(row[2:], 2) for row in whole]]

    def dealt(rank: int) -> Tensor:
        return gather(parts[rank], (2, 3), Sharding({}, rank, 2, torch.device("cpu")), torch.float32)

    first, second = on_ranks(2, dealt, monkeypatch)
    assert torch.equal(first, whole[::2].view(-1, 2, 3))
    assert torch.equal(second, whole[1::2].view(-1, 2, 3))


def test_no_matrix_is_orthogonalised_to_none() -> None:
    assert orthogonalise(torch.zeros(0, 4, 3)).shape == (0, 4, 3)


@pytest.mark.parametrize(("stage", "matrices", "percent"), [(2, 7, 0.15), (3, 189, 5.8)])
def test_eight_ranks_share_few_of_v2_lites_matrices(stage: int, matrices: int, percent: float) -> None:
    """What docs/cluster.md says of them."""
    fields = yaml.safe_load((ROOT / "configs/model/v2_lite.yaml").read_text())
    with torch.device("meta"):
        model = DeepSeek(DeepSeekConfig(**{**fields, "rope_scaling": None}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    count = shared = total = 0
    for group in muon_groups(model, 0.1):
        if group["muon"]:
            shapes = {names[id(parameter)]: parameter.shape for parameter in group["params"]}
            [cut] = cuts([shapes], stage, ranks=8)
            contents = [(cut[name], tuple(shape)) for name, shape in shapes.items()]
            for (rows, columns), found in find_matrices(contents, group["parts"], rank=0).items():
                count += len(found.shared)
                shared += len(found.shared) * rows * columns
            total += sum(shape.numel() for shape in shapes.values())
    assert count == matrices
    assert 100 * shared / total == pytest.approx(percent, rel=0.05)
