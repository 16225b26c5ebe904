"""When layers computed and when copies ran beside them: begin and end, for a trace. Nothing is recorded unless asked.

A tier whose ``timeline`` is set notes its copies there, and the microbatches that use it note their layers. On CPU a
stamp is the host's clock. On CUDA it is an event recorded on the stream that works (the computing one, or a copy's
own), so begin and end are when the device was there; they are read once, at the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from planner.measured.copy_times import LAYERS, WAIT, Interval

MOST_INTERVALS = 4096
"""Of one rank and step; later ones are counted only."""
Stamp = Any
"""A float (CPU) or a recorded ``torch.cuda.Event``."""


class Timeline:
    """Intervals as they end. Threads may add at the same time; ``begin`` and ``end`` are those of what computes.

    ``is_on``: whether anybody is to note anything. ``subject``: whose activations are copied next; tiers name their
    copies by it. ``zero_s``: the host's clock when the times began.
    """

    def __init__(self, *, most_intervals: int = MOST_INTERVALS) -> None:
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
        """All times count from now on, or from ``zero``, a stamp of this kind. What was recorded is forgotten."""
        self._on_cuda = device.type == "cuda"
        self._found, self._open, self.num_left_out = [], None, 0
        self._zero = self.stamp() if zero is None else zero
        self.zero_s = time.perf_counter() if self._on_cuda else float(self._zero)

    def stamp(self, stream: torch.cuda.Stream | None = None) -> Stamp:
        """Now; on CUDA when ``stream`` (the current one) gets there."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event

    def begin(self, name: str) -> None:
        """What computes starts something else."""
        self.end()
        self._open = name, self.stamp()

    def end(self) -> None:
        """What it did is over."""
        if self._open is not None:
            name, start = self._open
            self._open = None
            self.add(LAYERS, name, start)

    def add(self, lane: str, name: str, start: Stamp, num_bytes: int = 0, stop: Stamp | None = None) -> None:
        """Something that ends now, or at ``stop``."""
        if len(self._found) < self._most_intervals:
            self._found.append((lane, name, start, self.stamp() if stop is None else stop, num_bytes))
        else:
            self.num_left_out += 1

    def read(self) -> tuple[Interval, ...]:
        """All that ended, in seconds since ``restart``. On CUDA it waits for the device to be past them."""
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
        return float(self._zero.elapsed_time(stamp)) / 1000  # CUDA tells milliseconds


@contextmanager
def waiting(timeline: Timeline | None, name: str) -> Iterator[None]:
    """The seconds in which what computes stands still for a copy."""
    if timeline is None:
        yield
        return
    start = timeline.stamp()
    yield
    timeline.add(WAIT, name, start)
