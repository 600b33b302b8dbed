"""A sharded checkpoint taken up by other ranks than wrote it: more or fewer, or under another stage of ZeRO.

Weights and the optimizer's states are copied from the shards in which they are to those in which they belong: nothing
is rounded, and no rank holds more than its own shards. The files are mapped into memory, each rank reads its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lightning.optim.sharded_matrices import Cut
from ds_lightning.training import shards

_Shapes = Sequence[Mapping[str, torch.Size]]
_Cuts = Sequence[Mapping[str, Cut]]
_Contents = list[dict[str, Any]]
"""Of each flat tensor of a rank the weights, and under their names the states that the optimizer has for it."""

_WEIGHTS = "weights"


def load_resharded(engine: Any, folder: Path, *, ranks: int, stage: int) -> dict[str, Any]:
    """Read this rank's part of what other ranks wrote, for training to go on, and return the state beside it.

    Args:
        engine: A DeepSpeed engine with an optimizer that has not made a step.
        folder: What ``shards.save`` was given.
        ranks: Those that wrote it.
        stage: Of ZeRO, under which they did.

    Raises:
        ValueError: If it holds other parameters than the engine's model has, or was written by another optimizer.
    """
    optimizer, rank, own_stage = engine.optimizer, engine.global_rank, engine.zero_optimization_stage()
    if own_stage == 3:
        optimizer.checkpoint_event_prologue()
    state, shapes = shards.model_state(folder), engine._get_zero_param_shapes()
    written, groups = zip(*(_read(shards.optimizer_state(folder, each), stage) for each in range(ranks)), strict=True)
    own = optimizer.state_dict()
    weights, base = _places(own_stage)
    _check(folder, state["param_shapes"], shapes, groups[0], own[base]["param_groups"])

    before = shards.cuts(state["param_shapes"], stage, ranks)
    after = shards.cuts(shapes, own_stage, engine.dp_world_size)
    sizes = [len(flat) for flat in shards.flat_tensors(engine)]
    contents = reshard(written, before, after, sizes, rank)
    own[weights] = [content.pop(_WEIGHTS) for content in contents]
    own[base] = {
        "state": {index: content for index, content in enumerate(contents) if content},
        "param_groups": [
            {**theirs, "params": ours["params"]}
            for theirs, ours in zip(groups[0], own[base]["param_groups"], strict=True)
        ],
    }
    optimizer.load_state_dict({rank: own}, load_from_fp32_weights=True)
    if own_stage == 3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    others = range(1, ranks) if stage == 3 else ()
    _load_frozen(engine, [state, *(shards.model_state(folder, each) for each in others)], stage)
    _take_up_the_rest(engine, state)
    return {name: value for name, value in state.items() if name != "module"}


def reshard(written: Sequence[_Contents], before: _Cuts, after: _Cuts, sizes: Sequence[int], rank: int) -> _Contents:
    """Return the flat tensors of a rank, put together from those of the ranks that wrote them.

    Args:
        written: Contents by rank that wrote them; numbers that belong to no element are the same on all.
        before: How parameters were cut into their flat tensors.
        after: How they are to be cut.
        sizes: Elements of each flat tensor to return; an element that is of no parameter is 0.
        rank: Whose they are.
    """
    where = {name: (index, cut) for index, group in enumerate(before) for name, cut in group.items()}
    found: _Contents = []
    for group, size in zip(after, sizes, strict=True):
        source = written[0][where[next(iter(group))][0]]
        content: dict[str, Any] = {}
        for key, value in source.items():
            if _is_flat(value):
                content[key] = torch.zeros(size, dtype=value.dtype)
            else:
                content[key] = value.clone() if isinstance(value, Tensor) else value
        for name, cut in group.items():
            index, old = where[name]
            for rank_before, to, come_from in _moves(old, cut, rank):
                for key, value in content.items():
                    if _is_flat(value):
                        value[to] = written[rank_before][index][key][come_from]
        found.append(content)
    return found


def _is_flat(value: Any) -> bool:
    """Tell what has a number for each element of a flat tensor from what counts for all of it."""
    return isinstance(value, Tensor) and value.dim() == 1


def _moves(old: Cut, new: Cut, rank: int) -> list[tuple[int, slice, slice]]:
    """Return the ranks that had a part of what a rank is to have of a parameter: where it goes, and whence it comes."""
    here = new.on(rank)
    if here.first == here.last:
        return []
    found = []
    for source in range(old.rank_of(here.first), old.rank_of(here.last - 1) + 1):
        there = old.on(source)
        first, last = max(here.first, there.first), min(here.last, there.last)
        found.append((source, here.where(first, last), there.where(first, last)))
    return found


def _places(stage: int) -> tuple[str, str]:
    """Return under which names DeepSpeed keeps the fp32 weights and the state of the optimizer that it wraps."""
    if stage == 3:
        return "fp32_flat_groups", "optimizer_state_dict"
    return "single_partition_of_fp32_groups", "base_optimizer_state"


def _read(state: dict[str, Any], stage: int) -> tuple[_Contents, list[dict[str, Any]]]:
    """Return what a rank wrote of its flat tensors, and the settings of its parameter groups."""
    weights, base = _places(stage)
    contents = [{_WEIGHTS: flat.detach(), **state[base]["state"].get(i, {})} for i, flat in enumerate(state[weights])]
    return contents, state[base]["param_groups"]


def _check(folder: Path, theirs: _Shapes, ours: _Shapes, their_groups: Any, our_groups: Any) -> None:
    found, expected = (
        {name: tuple(shape) for group in shapes for name, shape in group.items()} for shapes in (theirs, ours)
    )
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {folder.parent} holds {name} of shape {found.get(name)}, the model has it of shape "
                f"{expected.get(name)}, expected the model of the run that wrote it"
            )
    kinds = [[set(group) for group in groups] for groups in (their_groups, our_groups)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"checkpoint {folder.parent} holds the states of an optimizer with {len(their_groups)} parameter groups, "
            f"not of this one with {len(our_groups)}, expected the optimizer of the run that wrote it"
        )


@torch.no_grad()
def _load_frozen(engine: Any, written: list[dict[str, Any]], stage: int) -> None:
    """Load parameters that are in no optimizer, such as those of a reference policy.

    Args:
        engine: Of this run.
        written: What the ranks wrote beside their shards; below stage 3 that of rank 0 has all.
        stage: Of ZeRO, under which they did.
    """
    import deepspeed

    optimized = {name for group in engine._get_zero_param_shapes() for name in group}
    sharded = engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.named_parameters():
        if name in optimized:
            continue
        parts = [state["frozen_param_fragments" if stage == 3 else "module"][name].flatten() for state in written]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            parameter.copy_(torch.cat(parts)[: shape.numel()].view(shape))


@torch.no_grad()
def _take_up_the_rest(engine: Any, state: dict[str, Any]) -> None:
    """Load buffers, which every rank has in full, and DeepSpeed's counters."""
    buffers = dict(engine.module.named_buffers())
    for name in state["buffer_names"]:
        buffers[name].copy_(state["module"][name])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, state[name])
