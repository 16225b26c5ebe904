"""What is kept of a replay for drawing: spans on lanes of a few ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.replay.work import FloatArray, IntArray

LANES = ("compute", "exchange", "nic", "copy")
MAX_DRAWN_RANKS = 16
MAX_LANE_EVENTS = 10_000
"""Per step. A ring of a thousand ranks has a thousand rounds; later events are left out of the drawing."""


@dataclass(frozen=True, slots=True)
class LaneEvent:
    """``rank`` does ``name`` on ``lane`` (one of LANES) from ``start_s`` to ``stop_s`` after the step's start."""

    rank: int
    lane: str
    name: str
    start_s: float
    stop_s: float


class LaneRecorder:
    """Keeps the events of every n-th rank, at most MAX_LANE_EVENTS."""

    def __init__(self, num_ranks: int) -> None:
        self._is_drawn = np.zeros(num_ranks, dtype=np.bool_)
        self._is_drawn[:: math.ceil(num_ranks / MAX_DRAWN_RANKS)] = True
        self._events: list[LaneEvent] = []

    def __call__(self, lane: str, name: str, ranks: IntArray, start_s: FloatArray, stop_s: FloatArray) -> None:
        if len(self._events) >= MAX_LANE_EVENTS:
            return
        ranks, start_s, stop_s = np.ravel(ranks), np.ravel(start_s), np.ravel(stop_s)
        for place in np.flatnonzero(self._is_drawn[ranks] & (stop_s > start_s)).tolist():
            event = LaneEvent(int(ranks[place]), lane, name, float(start_s[place]), float(stop_s[place]))
            self._events.append(event)

    def events(self) -> tuple[LaneEvent, ...]:
        return tuple(self._events)
