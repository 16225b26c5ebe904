"""When layers computed and when copies ran beside them: begin and end, for a trace. Nothing is recorded unless asked.

A tier whose ``timeline`` is set notes its copies there, and the microbatches that use the tier note their layers. Host
clock; on CUDA copies run on streams and are not noted (a profiler shows those).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

COMPUTE, STORE, LOAD, WAIT = "compute", "store", "load", "wait"
LANES = (COMPUTE, WAIT, STORE, LOAD)
"""``wait``: the computing thread stood still for a copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Seconds of ``time.perf_counter``. ``num_bytes``: moved, 0 for computing and waiting."""

    lane: str
    name: str
    start_s: float
    stop_s: float
    num_bytes: int = 0


@dataclass(slots=True)
class Timeline:
    """Intervals as they end. Threads may add at the same time; ``begin`` and ``end`` are the computing thread's."""

    intervals: list[Interval] = field(default_factory=list)
    _open: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """The computing thread starts something else."""
        self.end()
        self._open = name, time.perf_counter()

    def end(self) -> None:
        """What the computing thread did is over."""
        if self._open is not None:
            name, start_s = self._open
            self._open = None
            self.add(COMPUTE, name, start_s)

    def add(self, lane: str, name: str, start_s: float, num_bytes: int = 0) -> None:
        """Something that ends now."""
        self.intervals.append(
            Interval(lane=lane, name=name, start_s=start_s, stop_s=time.perf_counter(), num_bytes=num_bytes)
        )

    def hidden_share(self) -> float:
        """Of the seconds in which a copy ran: those in which the computing thread did not wait. 1 without copies."""
        copies = _union((each.start_s, each.stop_s) for each in self.intervals if each.lane in (STORE, LOAD))
        waits = _union((each.start_s, each.stop_s) for each in self.intervals if each.lane == WAIT)
        total_s = sum(stop - start for start, stop in copies)
        seen_s = sum(
            max(0.0, min(stop, other_stop) - max(start, other_start))
            for start, stop in copies for other_start, other_stop in waits
        )
        return 1.0 - seen_s / total_s if total_s else 1.0


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same seconds without overlaps, in order."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged
