"""When layers computed and when copies ran alongside them, for a trace. Nothing is recorded unless requested.

A tier whose ``timeline`` is set records its copies there, and the microbatches that use it record their layers. On CPU
a stamp is the host's clock. On CUDA it is an event recorded on the stream that does the work (the computing stream or a
copy's own), so times are those of the device; they are read once, at the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from planner.measured.copy_times import LAYERS, WAIT, Interval

MAX_INTERVALS = 4096
"""Most intervals recorded per rank and step; further ones are only counted."""
Stamp = Any
"""A float (CPU) or a recorded ``torch.cuda.Event``."""


class Timeline:
    """Collects intervals as they end. Any thread may call ``add``; only the computing thread calls ``begin`` and
    ``end``.

    ``is_on``: whether to record at all. ``subject``: name of the activations that the next copies move; tiers label
    their copies with it. ``zero_s``: the host's clock at time zero.
    """

    def __init__(self, *, most_intervals: int = MAX_INTERVALS) -> None:
        self.is_on = False
        self.subject = ""
        self.zero_s = 0.0
        self._most_intervals = most_intervals
        self._on_cuda = False
        self._zero: Stamp = 0.0
        self._open: tuple[str, Stamp] | None = None
        self._found: list[tuple[str, str, Stamp, Stamp, int]] = []
        self.num_left_out = 0

    def restart(self, device: torch.device, zero: Stamp | None = None) -> None:
        """Discard what was recorded and count times from now, or from ``zero``, a stamp of the same kind."""
        self._on_cuda = device.type == "cuda"
        self._found, self._open, self.num_left_out = [], None, 0
        self._zero = self.stamp() if zero is None else zero
        self.zero_s = time.perf_counter() if self._on_cuda else float(self._zero)

    def stamp(self, stream: torch.cuda.Stream | None = None) -> Stamp:
        """The current time; on CUDA, the time when ``stream`` (default: the current one) reaches this point."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event

    def begin(self, name: str) -> None:
        """The computing thread begins ``name``; what was open ends."""
        self.end()
        self._open = name, self.stamp()

    def end(self) -> None:
        """End the open interval of the computing thread."""
        if self._open is not None:
            name, start = self._open
            self._open = None
            self.add(LAYERS, name, start)

    def add(self, lane: str, name: str, start: Stamp, num_bytes: int = 0, stop: Stamp | None = None) -> None:
        """Record an interval that ends now, or at ``stop``."""
        if len(self._found) < self._most_intervals:
            self._found.append((lane, name, start, self.stamp() if stop is None else stop, num_bytes))
        else:
            self.num_left_out += 1

    def read(self) -> tuple[Interval, ...]:
        """All intervals, in seconds since ``restart``. On CUDA it waits until the device has passed them."""
        return tuple(
            Interval(
                lane=lane, name=name, start_s=self._seconds(start), stop_s=self._seconds(stop), num_bytes=num_bytes
            )
            for lane, name, start, stop, num_bytes in tuple(self._found)
        )

    def _seconds(self, stamp: Stamp) -> float:
        if not self._on_cuda:
            return float(stamp - self._zero)
        stamp.synchronize()
        return float(self._zero.elapsed_time(stamp)) / 1000  # CUDA returns milliseconds


@contextmanager
def waiting(timeline: Timeline | None, name: str) -> Iterator[None]:
    """Record the time in which the computation waits for a copy."""
    if timeline is None:
        yield
        return
    start = timeline.stamp()
    yield
    timeline.add(WAIT, name, start)
