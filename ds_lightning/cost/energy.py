"""Energy of the devices of a run, by the counters that NVIDIA's driver keeps (NVML)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 1.0
"""Shortest time between two readings on the way: the counters move some ten times a second."""


class EnergyMeter:
    """Adds up what some devices have taken since the meter was made.

    A counter is of the whole device, of other processes on it too.

    Args:
        counters: One of each device: returns its millijoules since some moment, or raises ``failure``.
        failure: What a counter raises that cannot be read just now; the reading before then holds.

    Attributes:
        num_devices: Devices that are read.
        joules: As of the latest reading.
    """

    def __init__(self, counters: Sequence[Callable[[], int]], failure: type[Exception] = OSError) -> None:
        self._counters = counters
        self._failure = failure
        self._began = self._millijoules()
        self.num_devices = len(counters)
        self.joules = 0.0

    def read(self) -> float:
        """Return the joules up to now; never fewer than before."""
        try:
            self.joules = max(self.joules, (self._millijoules() - self._began) / 1000)
        except self._failure:
            log.debug("a counter of energy cannot be read", exc_info=True)
        return self.joules

    def _millijoules(self) -> int:
        return sum(counter() for counter in self._counters)


def nvml_meter(uuids: Sequence[str]) -> EnergyMeter | None:
    """Return a meter of some GPUs of this machine; none where they cannot be read, which is logged with its reason.

    Args:
        uuids: What torch and ``nvidia-smi -L`` call them, with or without ``GPU-`` before it.
    """
    try:
        import pynvml
    except ImportError:
        log.info("the energy of the GPUs is not booked: it needs pynvml (pip install 'ds-lightning[gpu]')")
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}") for uuid in uuids]
        counters = [lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
        return EnergyMeter(counters, pynvml.NVMLError)
    except pynvml.NVMLError as error:
        log.warning("the energy of the GPUs is not booked: NVML says %s", error)
        return None
