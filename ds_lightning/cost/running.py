"""The state of the clock of a run, and what going back to a checkpoint does to what it has booked."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lightning.cost.records import REDONE


@dataclass(frozen=True)
class Running:
    """Replaced as a whole, so that an interrupt between two statements tears nothing."""

    phase: str
    since: int
    """Nanoseconds."""
    unwritten: dict[str, int]
    """Nanoseconds by phase, up to ``since``."""

    def at(self, now: int, phase: str | None = None) -> Running:
        """Book up to now and go on in a phase."""
        unwritten = dict(self.unwritten)
        unwritten[self.phase] = unwritten.get(self.phase, 0) + now - self.since
        return Running(phase or self.phase, now, unwritten)

    def without(self, times: dict[str, int]) -> Running:
        """Drop what has been written."""
        left = {phase: nanoseconds - times.get(phase, 0) for phase, nanoseconds in self.unwritten.items()}
        return Running(self.phase, self.since, left)


def moved_back(base: dict[str, int], known: dict[str, int]) -> dict[str, int]:
    """Return the booking that takes the phases of redone work from ``base`` back to ``known``.

    Seconds that the checkpoint knows but a power cut kept out of the file were spent all the same: they come back
    from ``lost`` as far as there are any, and add to the wall-clock beyond that.
    """
    times = {phase: known.get(phase, 0) - base.get(phase, 0) for phase in REDONE}
    times["lost"] = max(-sum(times.values()), -base.get("lost", 0))
    return {phase: nanoseconds for phase, nanoseconds in times.items() if nanoseconds}
