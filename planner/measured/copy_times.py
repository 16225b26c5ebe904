"""When the layers of a step computed and when activations were copied alongside, on each rank.

Seconds count from the rank's gathered parameters, as in ``planner.measured.step_times``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from planner.units import MICROSECONDS_PER_S

LAYERS, WAIT, OUT, BACK = "layers", "wait", "out", "back"
LANES = (LAYERS, OUT, BACK, WAIT)
"""``layers``: forward, backward and, within it, recompute. ``out``, ``back``: copies to the tier and from it.
``wait``: time in which the computation waited for a copy."""
_COLUMNS = ("lane", "name", "start_us", "stop_us", "num_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """``num_bytes``: bytes copied; 0 for computing and waiting."""

    lane: str
    name: str
    start_s: float
    stop_s: float
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLanes:
    """One data rank of a step. ``num_left_out``: how many further intervals were not recorded."""

    rank: int
    intervals: tuple[Interval, ...]
    num_left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLanes:
    """The recorded ranks of one step."""

    step: int
    ranks: tuple[RankLanes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySummary:
    """Means per rank and step. ``copy_s``: seconds in which at least one copy ran. ``hidden_s``: those of them in which
    the computation did not wait. ``out_s``, ``back_s``: sums over copies, to compute rates."""

    num_steps: int
    num_ranks: int
    copy_s: float
    hidden_s: float
    wait_s: float
    out_s: float
    back_s: float
    out_bytes: float
    back_bytes: float

    @property
    def hidden_share(self) -> float:
        """Fraction of the copying time that was hidden; 1 without copies."""
        return self.hidden_s / self.copy_s if self.copy_s > 0 else 1.0


def copy_seconds(intervals: Iterable[Interval]) -> tuple[float, float]:
    """Seconds in which at least one copy ran, and those of them in which the computation did not wait."""
    found = tuple(intervals)
    copies = _union((each.start_s, each.stop_s) for each in found if each.lane in (OUT, BACK))
    waits = _union((each.start_s, each.stop_s) for each in found if each.lane == WAIT)
    seen_s, first = 0.0, 0
    for start, stop in copies:
        while first < len(waits) and waits[first][1] <= start:
            first += 1
        for place in range(first, len(waits)):
            if waits[place][0] >= stop:
                break
            seen_s += min(stop, waits[place][1]) - max(start, waits[place][0])
    total_s = sum(stop - start for start, stop in copies)
    return total_s, total_s - seen_s


def summarize_copies(steps: SequenceOf[StepLanes]) -> CopySummary | None:
    """Means over all ranks of all steps; None if no rank was recorded."""
    ranks = [rank for step in steps for rank in step.ranks]
    if not ranks:
        return None
    sums = [copy_seconds(rank.intervals) for rank in ranks]

    def mean(lane: str, *, of_bytes: bool = False) -> float:
        return statistics.fmean(
            sum(each.num_bytes if of_bytes else each.stop_s - each.start_s for each in rank.intervals
                if each.lane == lane)
            for rank in ranks
        )

    return CopySummary(
        num_steps=len(steps), num_ranks=len({rank.rank for rank in ranks}),
        copy_s=statistics.fmean(total_s for total_s, _ in sums),
        hidden_s=statistics.fmean(hidden_s for _, hidden_s in sums), wait_s=mean(WAIT), out_s=mean(OUT),
        back_s=mean(BACK), out_bytes=mean(OUT, of_bytes=True), back_bytes=mean(BACK, of_bytes=True),
    )


def rank_to_plain(lanes: RankLanes) -> dict[str, Any]:
    """Columns in whole microseconds, because key names would take more space than the numbers. Intervals below one
    microsecond that copy nothing are left out."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for each in sorted(lanes.intervals, key=lambda each: (each.start_s, -each.stop_s)):
        start_us, stop_us = (round(seconds * MICROSECONDS_PER_S) for seconds in (each.start_s, each.stop_s))
        if start_us == stop_us and not each.num_bytes:
            continue
        row = (LANES.index(each.lane), each.name, start_us, stop_us, each.num_bytes)
        for name, value in zip(_COLUMNS, row, strict=True):
            columns[name].append(value)
    return {"rank": lanes.rank, "num_left_out": lanes.num_left_out, **columns}


def lanes_to_plain(step: int, ranks: SequenceOf[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the run's file, from the results of ``rank_to_plain``."""
    return {"step": step, "ranks": list(ranks)}


def lanes_from_plain(data: Mapping[str, Any]) -> StepLanes:
    """Inverse of the two functions above, to the microsecond. Raises ValueError for anything else."""
    try:
        return StepLanes(step=int(data["step"]), ranks=tuple(_rank_from_plain(each) for each in data["ranks"]))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"not the memory lanes of a step: {error}") from None


def _rank_from_plain(data: Mapping[str, Any]) -> RankLanes:
    intervals = tuple(
        Interval(
            lane=LANES[int(lane)], name=str(name), start_s=int(start_us) / MICROSECONDS_PER_S,
            stop_s=int(stop_us) / MICROSECONDS_PER_S, num_bytes=int(num_bytes),
        )
        for lane, name, start_us, stop_us, num_bytes in zip(*(data[name] for name in _COLUMNS), strict=True)
    )
    if int(data["rank"]) < 0 or any(each.start_s > each.stop_s or each.num_bytes < 0 for each in intervals):
        raise ValueError("a rank, a duration or a size below 0")
    return RankLanes(rank=int(data["rank"]), intervals=intervals, num_left_out=int(data["num_left_out"]))


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time spans in order, with overlaps merged."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged
