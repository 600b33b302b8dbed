"""What a run brought for its money: the figures behind a page."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lightning.cost.records import GRADIENT_PHASES
from ds_lightning.report.run_data import RunData, StageData

NO_GRADIENT = {
    "startup": "start-up",
    "validate": "validation",
    "checkpoint": "checkpoints",
    "export": "export",
    "idle": "idle",
    "lost": "lost and redone",
}
"""The other phases, in words."""

EQUAL_REWARDS = "groups of equal rewards"
BETWEEN = "between stages"

RAW_BITS = 8.0
"""Bits of a byte that nothing is known of."""


@dataclass(frozen=True)
class Result:
    """What a run is judged by."""

    kind: str
    """``pass@1``, ``bits per byte`` or nothing, of a run that is not finished."""
    value: float
    usd_per_unit: float | None
    """Dollars a point of pass@1, or a bit a byte below 8; none without any."""

    @property
    def unit(self) -> str:
        """What a dollar bought."""
        return "point of pass@1" if self.kind == "pass@1" else "bit saved per byte"


def result_of(run: RunData) -> Result | None:
    """Return the result of a run's last stage that has one: pass@1 before bits per byte; none while unfinished."""
    for stage in reversed(run.stages):
        if "pass_at_1" in stage.figures:
            value = float(stage.figures["pass_at_1"])
            return Result("pass@1", value, run.usd / (100 * value) if value else None)
    for stage in reversed(run.stages):
        bits = stage.figures.get("bits_per_byte", {}).get("model")
        if bits is not None:
            saved = RAW_BITS - bits
            return Result("bits per byte", float(bits), run.usd / saved if saved > 0 else None)
    return None


@dataclass(frozen=True)
class Gain:
    """What a stage did to pass@1."""

    before: float | None
    """Pass@1 that it started from: that of the stage it goes on from, else of its first validation."""
    after: float | None
    usd: float

    @property
    def points(self) -> float | None:
        """Points gained; none where a side was not measured."""
        if self.before is None or self.after is None:
            return None
        return 100 * (self.after - self.before)

    @property
    def usd_per_point(self) -> float | None:
        """Dollars a point; none where nothing was gained."""
        return self.usd / self.points if self.points is not None and self.points > 0 else None


def gain_of(run: RunData, stage: StageData) -> Gain:
    """Return what a stage gained over its start; of a recipe's first stage, over nothing solved."""
    after = stage.figures.get("pass_at_1", stage.last("val/pass_at_1"))
    source = run.stage(stage.start)
    if source is not None:
        before = source.figures.get("pass_at_1")
    elif run.recipe:
        before = 0.0 if after is not None else None
    else:
        points = stage.curves.get("val/pass_at_1", [])
        before = points[0][1] if len(points) > 1 else None
    return Gain(before, after, stage.usd)


def equal_reward_share(stage: StageData) -> float | None:
    """Return the mean share of groups whose rewards are all equal; none where it was not logged."""
    points = stage.curves.get("frac_reward_zero_std")
    return sum(value for _, value in points) / len(points) if points else None


def without_gradient(run: RunData) -> dict[str, float]:
    """Return the dollars that bought no gradient, by reason; those that did make up the rest of the bill.

    Of a stage in which a share of groups had equal rewards, that share of its rollouts, their scoring and the training
    on them bought nothing.
    """
    phases = run.ledger["phases"]
    if run.recipe and "between" in run.ledger:
        phases = {}
        for stage in run.stages:
            for phase, row in stage.spent["phases"].items():
                phases.setdefault(phase, {"usd": 0.0})
                phases[phase] = {"usd": phases[phase]["usd"] + row["usd"]}
    reasons = {words: float(phases[phase]["usd"]) for phase, words in NO_GRADIENT.items() if phase in phases}
    equal = 0.0
    for stage in run.stages:
        share = equal_reward_share(stage)
        if share is not None:
            spent = stage.spent["phases"]
            equal += share * sum(spent[phase]["usd"] for phase in GRADIENT_PHASES if phase in spent)
    if equal:
        reasons[EQUAL_REWARDS] = equal
    if run.recipe and "between" in run.ledger:
        reasons[BETWEEN] = float(run.ledger["between"]["usd"])
    return {words: dollars for words, dollars in reasons.items() if dollars > 0}


@dataclass(frozen=True)
class Compared:
    """One line of planned and actual dollars."""

    stage: str
    phase: str
    """Of the ledger; ``total`` for the stage."""
    planned: float | None
    actual: float


def planned_and_actual(stage: StageData) -> list[Compared]:
    """Return a stage's dollars by phase and in total, planned and actual."""
    plan = (stage.plan or {}).get("plan") or {}
    planned = {phase: row["usd"] for phase, row in plan.get("phases", {}).items()}
    spent = {phase: row["usd"] for phase, row in stage.spent["phases"].items()}
    rows = [
        Compared(stage.name, phase, planned.get(phase), spent.get(phase, 0.0))
        for phase in [*spent, *(phase for phase in planned if phase not in spent)]
    ]
    return [*rows, Compared(stage.name, "total", plan.get("usd"), stage.usd)]


def main_curve(run: RunData) -> tuple[str, list[tuple[float, float]]]:
    """Return the curve that shows a run best, in dollars of the whole run; without any, an empty one."""
    for name in ("val/pass_at_1", "val/bits_per_byte", "val/loss", "train/loss"):
        points = [point for part in curve_parts(run, name) for point in part]
        if len(points) > 1:
            return name, points
    return "", []


def curve_parts(run: RunData, name: str) -> list[list[tuple[float, float]]]:
    """Return a curve a stage, over the dollars of all stages up to then."""
    parts, before = [], 0.0
    for stage in run.stages:
        parts.append([(before + x, y) for x, y in stage.curves.get(name, [])])
        before += stage.usd
    return parts
