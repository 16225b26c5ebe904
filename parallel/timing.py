"""Where a rank's step goes: gather, microbatches (forward, backward, waiting for peers), reduction.

On CPU a stamp is the host's clock. On CUDA it is an event recorded on the current stream, so nothing blocks; the
seconds between two events are read once per step, after the step's own last synchronisation. Waiting time on CUDA is
the time the stream stood still, not the time of the launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.comm import Exchange, Message, Pending
from planner.measured.step_times import MicrobatchTime, RankStep

Stamp = Any
"""A float (CPU) or a recorded ``torch.cuda.Event``."""


@dataclass(slots=True)
class _Lap:
    microbatch: int
    start: Stamp
    middle: Stamp | None = None
    resumed: Stamp | None = None
    stop: Stamp | None = None
    forward_waits: list[tuple[Stamp, Stamp]] = field(default_factory=list)
    backward_waits: list[tuple[Stamp, Stamp]] = field(default_factory=list)


class StepClock:
    """Call in the order of a step: ``restart, gathered, (begin, turn, resume, end)*, reduced``, then ``read`` once the
    device has passed ``reduced``. Between ``turn`` and ``resume`` of a microbatch, pipeline stages may run others, but
    every microbatch must be resumed. Waiting outside a microbatch is not recorded (calibration runs there).

    ``new_event`` makes a timing event (default on CUDA: CUDA's own); events are reused from step to step.
    """

    def __init__(self, device: torch.device, *, new_event: Callable[[], Any] | None = None) -> None:
        if new_event is None and device.type == "cuda":
            new_event = _cuda_event
        self._new_event = new_event
        self._events: list[Any] = []
        self._num_used = 0
        self._start: Stamp | None = None
        self._gathered: Stamp | None = None
        self._reduced: Stamp | None = None
        self._laps: list[_Lap] = []
        self._turned: dict[int, _Lap] = {}
        self._open: _Lap | None = None

    def restart(self) -> None:
        """Begin a step. Times that were not read are discarded."""
        self._num_used = 0
        self._laps, self._turned, self._open = [], {}, None
        self._gathered = self._reduced = None
        self._start = self._stamp()

    def gathered(self) -> None:
        """Parameters are gathered: time zero of the step."""
        self._gathered = self._stamp()

    @property
    def zero(self) -> Stamp:
        """The stamp of ``gathered``, for other measurements of this step. On CUDA the next step reuses this event."""
        return self._gathered

    def begin(self, microbatch: int) -> None:
        self._open = _Lap(microbatch, self._stamp())

    def turn(self) -> None:
        """The open microbatch's forward has ended."""
        if self._open is not None:
            self._open.middle = self._stamp()
            self._turned[self._open.microbatch] = self._open
            self._open = None

    def resume(self, microbatch: int) -> None:
        """The backward of a microbatch begins."""
        self._open = self._turned.pop(microbatch)
        self._open.resumed = self._stamp()

    def end(self) -> None:
        if self._open is not None:
            self._open.stop = self._stamp()
            self._laps.append(self._open)
            self._open = None

    def reduced(self) -> None:
        """Gradients are reduced."""
        self._reduced = self._stamp()

    def wait(self, pending: Pending) -> None:
        """``pending.wait()``, timed."""
        if self._open is None:
            pending.wait()
            return
        lap = self._open
        start = self._stamp()
        pending.wait()
        (lap.forward_waits if lap.middle is None else lap.backward_waits).append((start, self._stamp()))

    def read(self) -> RankStep:
        """The step's times. On CUDA the device must have passed ``reduced``, e.g. because a value reached the host."""
        zero = self._gathered
        times = tuple(
            MicrobatchTime(
                microbatch=lap.microbatch,
                start_s=self._seconds(zero, lap.start),
                middle_s=self._seconds(zero, lap.middle),
                stop_s=self._seconds(zero, lap.stop),
                forward_wait_s=sum(self._seconds(*wait) for wait in lap.forward_waits),
                backward_wait_s=sum(self._seconds(*wait) for wait in lap.backward_waits),
                away_s=self._seconds(lap.middle, lap.resumed),
            )
            for lap in self._laps
        )
        last = self._laps[-1].stop if self._laps else zero
        return RankStep(
            gather_s=self._seconds(self._start, zero), reduce_s=self._seconds(last, self._reduced), microbatches=times
        )

    def _stamp(self) -> Stamp:
        if self._new_event is None:
            return time.perf_counter()
        if self._num_used == len(self._events):
            self._events.append(self._new_event())
        event = self._events[self._num_used]
        self._num_used += 1
        event.record()
        return event

    def _seconds(self, start: Stamp, stop: Stamp) -> float:
        if self._new_event is None:
            return float(stop - start)
        return float(start.elapsed_time(stop)) / 1000  # CUDA returns milliseconds


def _cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


@dataclass(frozen=True, slots=True)
class _TimedPending:
    inner: Pending
    clock: StepClock

    def wait(self) -> None:
        self.clock.wait(self.inner)


@dataclass(frozen=True, slots=True)
class TimedExchange:
    """An exchange that records waiting time on ``clock``."""

    inner: Exchange
    clock: StepClock

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        return _TimedPending(self.inner.post(sends, receives, what), self.clock)
