"""A recipe as data: stages in order, each a fit that starts from the weights of an earlier one. Needs no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lightning.cost.run_config import merged, read_sections, read_yaml

RECIPE = "recipe.yaml"
"""Name of the resolved recipe in the folder of its runs."""

ROLLOUTS = "RolloutDataModule"
"""Data that a model makes itself: nothing is prepared in a folder."""

SAMPLE_OPTIONS = (
    "task",
    "rewards",
    "problems",
    "n",
    "keep",
    "per_problem",
    "temperature",
    "top_p",
    "top_k",
    "max_completion_length",
    "max_batch",
    "chunk",
    "workers",
)
"""What a recipe may say of rejection sampling: parameters of :class:`ds_lightning.recipes.rejection.Rejection`."""

_KEYS = {
    "recipe": ("seed", "cost", "budget", "set", "stages"),
    "stage": ("name", "what", "fit", "from", "set", "sample"),
    "budget": ("usd", "hours", "shares"),
    "cost": ("device", "usd_per_device_hour", "market", "prices_file"),
    "sample": ("from", *SAMPLE_OPTIONS),
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OWNED = ("seed_everything", "out", "cost", "model.init_args.weights", "data.init_args.seed", "data.init_args.folder")


@dataclass(frozen=True)
class Stage:
    """One fit of a recipe."""

    name: str
    what: str
    """A few words for the table."""
    files: tuple[Path, ...]
    """Configs of the fit, later ones over earlier ones."""
    start: str | None
    """Stage whose weights it starts from; none: random weights."""
    options: dict[str, Any]
    """Sections of a config over those of the files."""
    sample: dict[str, Any] | None
    """Settings of the rejection sampling that makes its data: options, and ``from``; none: the data are given."""
    seed: int
    """Of weights, order, problems and sampling."""
    sections: dict[str, Any]
    """Files and options together."""

    @property
    def rolls_out(self) -> bool:
        """Whether its data are rollouts."""
        path = str((self.sections.get("data") or {}).get("class_path", ""))
        return path.rpartition(".")[2] == ROLLOUTS

    @property
    def devices(self) -> int:
        """Devices that it holds; 1 where the trainer takes whatever there is."""
        trainer = self.sections.get("trainer") or {}
        devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
        devices = len(devices) if isinstance(devices, list) else devices
        return devices * nodes if isinstance(devices, int) and devices > 0 else 1

    def settings(self) -> dict[str, Any]:
        """Return what its result depends on, as plain values; what it costs is left out."""
        sections = {key: value for key, value in self.sections.items() if key != "cost"}
        return {"from": self.start, "seed": self.seed, "sample": self.sample, **sections}


@dataclass(frozen=True)
class Shares:
    """What a recipe may cost, and how it is split over stages."""

    limits: dict[str, float]
    """Dollars (``usd``) and device-hours (``hours``) of the whole, sampling and the time between stages included."""
    parts: dict[str, float]
    """Part of each stage, in their order; only ratios count."""

    def of(self, stage: str, spent: dict[str, float]) -> dict[str, float]:
        """Return the budget of a stage: its part, among stages from it on, of what is left.

        So what a stage leaves over goes to those after it, and what the runner spends in between comes off them all.

        Args:
            stage: Name of the stage.
            spent: What everything but this stage has cost, by the keys of ``limits``.

        Raises:
            ValueError: If nothing is left.
        """
        names = list(self.parts)
        share = self.parts[stage] / sum(self.parts[name] for name in names[names.index(stage) :])
        for name, limit in self.limits.items():
            if spent[name] >= limit:
                raise ValueError(
                    f"budget.{name} of the recipe is {limit:.4g}, of which {spent[name]:.4g} are spent before stage "
                    f"{stage}: expected more"
                )
        return {name: share * (limit - spent[name]) for name, limit in self.limits.items()}


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run."""

    path: Path
    seed: int
    cost: dict[str, Any]
    """Settings of the ledger for all stages."""
    stages: tuple[Stage, ...]
    budget: Shares | None = None
    """Of all stages together; none: no limit but what a stage's own config sets."""

    def settings(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values."""
        budget = self.budget and {**self.budget.limits, "shares": self.budget.parts}
        return {
            "seed": self.seed,
            "cost": self.cost,
            "budget": budget,
            "stages": {stage.name: {"what": stage.what, **stage.settings()} for stage in self.stages},
        }


def read_recipe(path: str | Path, seed: int | None = None, limits: dict[str, float] | None = None) -> Recipe:
    """Read and check a recipe, and the configs that it names.

    Args:
        path: YAML with ``stages``, a list of mappings with ``name`` and ``fit`` (config files, relative to the recipe)
            and, as need be, ``what``, ``from`` (an earlier stage), ``set`` (further options by dotted key) and
            ``sample`` (rejection sampling: ``from`` and :data:`SAMPLE_OPTIONS`); at the top level ``seed``, ``cost``
            (settings of the ledger), ``budget`` (``usd``, ``hours``, and ``shares``: a number a stage; these alone set
            no limit) and ``set`` for all stages.
        seed: In place of the recipe's own; stage number i (from 0) has the seed ``100 * seed + i``.
        limits: ``usd`` and ``hours`` of the budget, over the recipe's own.

    Raises:
        ValueError: If the recipe names a key, stage or option that cannot be.
        OSError: If a file cannot be read.
    """
    path = Path(path)
    content = read_yaml(path)
    _check_keys(content, "recipe", str(path))
    stages = content.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"{path}: stages is {stages!r:.80}, expected a list of at least one stage")
    cost = _mapping(content.get("cost"), f"{path}: cost")
    _check_keys(cost, "cost", f"{path}: cost")
    seed = content.get("seed", 0) if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"{path}: seed is {seed!r}, expected a whole number of at least 0")
    common = _options(content.get("set"), f"{path}: set")
    read: list[Stage] = []
    for number, entry in enumerate(stages):
        where = f"{path}: stages[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {entry!r:.80}, expected a mapping with name and fit")
        read.append(_stage(entry, where, path.parent, common, [stage.name for stage in read], 100 * seed + number))
    budget = merged(_mapping(content.get("budget"), f"{path}: budget"), limits or {})
    return Recipe(path, seed, cost, tuple(read), _budget(budget, f"{path}: budget", read))


def _budget(value: dict[str, Any], where: str, stages: list[Stage]) -> Shares | None:
    """Read how money is split; none: there is no limit."""
    if not value:
        return None
    _check_keys(value, "budget", where)
    limits = {name: limit for name, limit in value.items() if name != "shares" and limit is not None}
    parts = _mapping(value.get("shares"), f"{where}.shares")
    names = [stage.name for stage in stages]
    if sorted(parts, key=str) != sorted(names):
        raise ValueError(f"{where}.shares has {', '.join(map(str, parts))}, expected every stage: {', '.join(names)}")
    for key, number in {**limits, **{f"shares.{name}": part for name, part in parts.items()}}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{where}.{key} is {number!r}, expected a number above 0")
    if not limits:
        return None
    for stage in stages:
        if "budget" in stage.options:
            raise ValueError(f"{where} is the recipe's, and stage {stage.name} sets one of its own: leave one out")
    return Shares(limits, {name: parts[name] for name in names})


def _stage(
    entry: dict[str, Any], where: str, folder: Path, common: dict[str, Any], earlier: list[str], seed: int
) -> Stage:
    _check_keys(entry, "stage", where)
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == Path(RECIPE).stem:
        raise ValueError(f"{where}: name is {name!r}, expected lower-case letters, digits and underscores")
    if name in earlier:
        raise ValueError(f"{where}: name is {name!r} again, expected every stage to have its own")
    where = f"{where} ({name})"
    files = entry.get("fit")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{where}: fit is {files!r:.80}, expected a list of config files")
    paths = tuple(folder / file for file in files)
    options = merged(common, _options(entry.get("set"), f"{where}: set"))
    sample = entry.get("sample")
    if sample is not None:
        sample = _mapping(sample, f"{where}: sample")
        _check_keys(sample, "sample", f"{where}: sample")
        _check_source(sample.get("from"), f"{where}: sample.from", earlier)
        for key in ("task", "rewards", "problems"):
            if sample.get(key) is None:
                raise ValueError(f"{where}: sample has no {key}, expected one")
    if entry.get("from") is not None:
        _check_source(entry["from"], f"{where}: from", earlier)
    return Stage(
        name=name,
        what=str(entry.get("what", "")),
        files=paths,
        start=entry.get("from"),
        options=options,
        sample=sample,
        seed=seed,
        sections=merged(read_sections(paths), options),
    )


def _check_source(source: Any, where: str, earlier: list[str]) -> None:
    if source not in earlier:
        known = f"one of the stages before it, {', '.join(earlier)}" if earlier else "none: it is the first stage"
        raise ValueError(f"{where} is {source!r}, expected {known}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.80}, expected a mapping")
    return value or {}


def _options(value: Any, where: str) -> dict[str, Any]:
    """Return the sections that options by dotted key make up."""
    sections: dict[str, Any] = {}
    for key, option in _mapping(value, where).items():
        if any(key == owned or key.startswith(f"{owned}.") for owned in _OWNED):
            raise ValueError(f"{where} has {key}, which the recipe's runner sets: leave it out")
        for part in reversed(key.split(".")):
            option = {part: option}
        sections = merged(sections, option)
    return sections


def _check_keys(found: Iterable[str], kind: str, where: str) -> None:
    for key in found:
        if key not in _KEYS[kind]:
            near = difflib.get_close_matches(str(key), _KEYS[kind], n=1)
            hint = f"; did you mean {near[0]}?" if near else f", expected some of {', '.join(_KEYS[kind])}"
            raise ValueError(f"{where}: {key!r} is no key of a {kind}{hint}")
