"""A budget: what of it is spent, and what is kept back for the end of a run. Loads no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_lightning.cost.ledger import FLUSH_SECONDS
from ds_lightning.cost.records import GRADIENT_PHASES, Totals, iter_ledger

MARGIN = 0.005
"""Share of a budget that a run aims to leave: half of the percent within which it ends."""

MARGIN_SECONDS = FLUSH_SECONDS / 2
"""The same for budgets so small that the ledger's own resolution is more than a percent of them."""


@dataclass(frozen=True)
class Limit:
    """One limit of a run, and where the run stands."""

    name: str
    """``usd`` or ``hours``: the unit of the other fields."""
    total: float
    spent: float
    per_second: float
    """What a second of wall-clock costs at the present price and number of devices."""

    @property
    def margin(self) -> float:
        """Seconds that the run aims to leave."""
        return max(MARGIN * self.total / self.per_second, MARGIN_SECONDS) if self.per_second else 0.0

    def progress(self, reserve: float) -> float:
        """Return the share that is spent of what is not kept back: spent / (total - reserve).

        Args:
            reserve: Seconds kept back.
        """
        training = self.total - reserve * self.per_second
        return self.spent / training if training > 0 else float("inf")


def limits(
    usd: float | None, hours: float | None, *, spent_usd: float, spent_hours: float, devices: int, price: float
) -> list[Limit]:
    """Return where a run stands against each limit that it has.

    Args:
        usd: Dollars that the run may cost; none: no limit.
        hours: Device-hours that it may take; none: no limit.
        spent_usd: Dollars that all attempts have cost.
        spent_hours: Device-hours that they have taken.
        devices: Devices held from now on.
        price: Dollars for an hour of one of them.
    """
    found = []
    if usd is not None:
        found.append(Limit("usd", usd, spent_usd, devices * price / 3600))
    if hours is not None:
        found.append(Limit("hours", hours, spent_hours, devices / 3600))
    return found


def shortest_start(ledger: Path) -> float:
    """Return the seconds that the start of an attempt took at least, by a ledger's records.

    Raises:
        ValueError: If the ledger was tampered with.
    """
    seconds: dict[int, float] = {}
    for record in iter_ledger(ledger):
        seconds[record["attempt"]] = seconds.get(record["attempt"], 0.0) + record["seconds"].get("startup", 0.0)
    return min(seconds.values(), default=0.0)


@dataclass
class Pace:
    """What the parts of a run take, in seconds, as measured in it; 0: not yet."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """The latest optimizer steps, with their data and rollouts."""
    batch: float = 0.0
    """A validation batch."""
    answers: float = 0.0
    """What callbacks add at the end of a validation."""
    samples: float = 0.0
    """A round of samples."""
    save: float = 0.0
    """A checkpoint."""

    @property
    def step(self) -> float:
        """The second longest of the latest steps: one with a rollout counts, a single hiccup does not."""
        return sorted(self.steps)[-2:][0] if self.steps else 0.0

    def validation(self, batches: int, growth: float = 1.0) -> float:
        """Return the seconds of a validation; before any was measured a batch counts as a step.

        Args:
            batches: Batches that it reads.
            growth: How much more is answered at its end than was measured.
        """
        return batches * (self.batch or self.step) + growth * self.answers

    def closing(self, batches: int, growth: float = 1.0) -> float:
        """Return the seconds from the last step to the end of the process.

        closing = samples + checkpoint + export + validation, where an export, which writes less, counts as a
        checkpoint, and a checkpoint that was not measured as a step.

        Args:
            batches: Batches of the last validation.
            growth: As in :meth:`validation`.
        """
        return self.samples + 2 * (self.save or self.step) + self.validation(batches, growth)

    def state(self) -> dict[str, Any]:
        """Return the fields; JSON-ready."""
        return {**vars(self), "steps": list(self.steps)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` returned."""
        vars(self).update({**state, "steps": deque(state["steps"], maxlen=self.steps.maxlen)})


@dataclass(frozen=True)
class Mark:
    """Seconds booked up to a moment, by what they were for."""

    working: float = 0.0
    validate: float = 0.0
    checkpoint: float = 0.0

    @classmethod
    def of(cls, totals: Totals) -> Mark:
        """Read the sums of a ledger."""
        seconds = totals.seconds
        working = sum(seconds.get(phase, 0.0) for phase in GRADIENT_PHASES)
        return cls(working, seconds.get("validate", 0.0), seconds.get("checkpoint", 0.0))


def tightest(found: Sequence[Limit]) -> Limit:
    """Return the limit of which the largest share is spent."""
    return max(found, key=lambda limit: limit.spent / limit.total)
