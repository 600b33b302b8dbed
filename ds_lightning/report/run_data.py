"""What the folder of a run or of a recipe says of it, read for a page; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lightning.cost.ledger_report import ledger_report
from ds_lightning.cost.run_config import read_yaml
from ds_lightning.cost.stored_plan import read_plan
from ds_lightning.summary import REPORT, read_report

RECIPE, CONFIG = "recipe.yaml", "config.yaml"

PAGE = "report.html"
"""Name of the page in a run folder."""


@dataclass(frozen=True)
class StageData:
    """One fit: a run, or a stage of a recipe."""

    name: str
    what: str
    start: str | None
    """Stage whose weights it started from."""
    figures: dict[str, Any]
    """Its part of ``report.json``; empty while it is not finished."""
    spent: dict[str, Any]
    """Sums of its ledger."""
    plan: dict[str, Any] | None
    """What :func:`~ds_lightning.cost.stored_plan.read_plan` returns."""
    curves: dict[str, list[tuple[float, float]]]
    """Dollars of the stage and value, by metric."""

    page: str | None = None
    """Path of its own page from that of the recipe; none where there is none."""

    @property
    def usd(self) -> float:
        """Dollars spent."""
        return float(self.spent["usd"])

    def last(self, curve: str) -> float | None:
        """Return the last value of a curve; none where it was not logged."""
        points = self.curves.get(curve)
        return points[-1][1] if points else None


@dataclass(frozen=True)
class RunData:
    """A run, or a recipe with its stages."""

    folder: Path
    recipe: bool
    seed: Any
    stages: tuple[StageData, ...]
    """In the order in which they ran; of a run that is no recipe, the run."""
    ledger: dict[str, Any]
    """Sums of all ledgers."""
    config: str
    """Text of the resolved config."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def usd(self) -> float:
        """Dollars spent, between the stages too."""
        return float(self.ledger["usd"])

    @property
    def device_hours(self) -> float:
        """Device-hours, between the stages too."""
        return float(self.ledger["device_hours"])

    def stage(self, name: str | None) -> StageData | None:
        """Return a stage by its name; none where there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run_data(folder: str | Path) -> RunData:
    """Read a run's folder; what it does not hold yet is left out.

    Raises:
        ValueError: If there is no ledger, or a file is damaged.
    """
    folder = Path(folder)
    ledger = ledger_report(folder)
    recipe = (folder / RECIPE).is_file()
    path = folder / (RECIPE if recipe else CONFIG)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    content = read_yaml(path) if text else {}
    if recipe:
        settings: dict[str, Any] = content.get("stages", {})
        spent = ledger.get("stages", {})
        names = [name for name in settings if name in spent]
        stages = [_stage(folder / name, name, settings[name], spent[name]) for name in names]
    else:
        stages = [_stage(folder, folder.resolve().name, {}, ledger)]
    seed = content.get("seed" if recipe else "seed_everything")
    return RunData(folder=folder, recipe=recipe, seed=seed, stages=tuple(stages), ledger=ledger, config=text)


def _stage(folder: Path, name: str, settings: dict[str, Any], spent: dict[str, Any]) -> StageData:
    figures: dict[str, Any] = read_report(folder)["stages"][0] if (folder / REPORT).is_file() else {}
    return StageData(
        name=name,
        what=str(settings.get("what", "")),
        start=settings.get("from") or (settings.get("sample") or {}).get("from"),
        figures=figures,
        spent=spent,
        plan=read_plan(folder),
        curves=_curves(folder, figures),
        page=f"{name}/{PAGE}" if settings and (folder / PAGE).is_file() else None,
    )


def _curves(folder: Path, figures: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the curves that a finished run left in its report, else what it has logged so far."""
    if "curves" in figures:
        return {name: [(x, y) for x, y in points] for name, points in figures["curves"].items()}
    if not (folder / "tensorboard").is_dir():
        return {}
    from ds_lightning.report.curves import read_curves  # TensorBoard takes a second to import

    return read_curves(folder)
