"""Measured times of a step, for each microbatch on each rank.

Times of one rank count from the moment it left the step's parameter gather. All ranks leave that collective at nearly
the same moment (none can leave before the last has entered its last all-gather), so clocks need not be compared, on one
host or across hosts: the error is the flight time of the gather's last message plus the time ranks take to wake up.
Four ranks on two busy cores left 5 ms apart (median of 30 steps, measured by their common clock).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from planner.plan import StepPlan

_DIGITS = 6
"""Rounds to microseconds, which is finer than the clocks are accurate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchTime:
    """One rank's times in one microbatch (its index in the plan). ``middle_s``: end of the forward, start of the
    backward.

    ``forward_wait_s``, ``backward_wait_s``: seconds of waiting for peers' messages that computing did not hide.
    ``away_s``: seconds between forward and backward, in which a pipeline stage runs other microbatches; not stored.
    """

    microbatch: int
    start_s: float
    middle_s: float
    stop_s: float
    forward_wait_s: float
    backward_wait_s: float
    away_s: float = 0.0

    @property
    def wait_s(self) -> float:
        return self.forward_wait_s + self.backward_wait_s

    @property
    def compute_s(self) -> float:
        return self.stop_s - self.start_s - self.wait_s - self.away_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """One rank's step. ``gather_s``: from the step's start to gathered parameters. ``reduce_s``: from the end of its
    last microbatch to reduced gradients, including waiting for slower ranks."""

    gather_s: float
    reduce_s: float
    microbatches: tuple[MicrobatchTime, ...]

    @property
    def finish_s(self) -> float:
        """When the last microbatch ended; 0 without microbatches."""
        return max((each.stop_s for each in self.microbatches), default=0.0)

    @property
    def wait_s(self) -> float:
        return sum(each.wait_s for each in self.microbatches)

    @property
    def compute_s(self) -> float:
        return sum(each.compute_s for each in self.microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """All data ranks of one step, by rank. ``update_s``: seconds after the reduction on rank 0: clipping, optimizer."""

    step: int
    ranks: tuple[RankStep, ...]
    plan_wait_s: float
    update_s: float

    @property
    def span_s(self) -> float:
        """Seconds from gathered parameters to the end of the last microbatch on any rank."""
        return max(rank.finish_s for rank in self.ranks)

    @property
    def fixed_s(self) -> float:
        """Seconds of the step outside microbatches: gather and reduction of the quickest rank, which waited for no
        other, and the update."""
        return min(rank.gather_s for rank in self.ranks) + min(rank.reduce_s for rank in self.ranks) + self.update_s

    def microbatch_s(self) -> dict[int, float]:
        """Seconds of each microbatch by its index in the plan: from the last rank's start to the last rank's end, so
        that waiting for a rank that was still busy elsewhere does not count."""
        times: dict[int, list[MicrobatchTime]] = {}
        for rank in self.ranks:
            for each in rank.microbatches:
                times.setdefault(each.microbatch, []).append(each)
        return {
            index: max(each.stop_s for each in found) - max(each.start_s for each in found)
            for index, found in sorted(times.items())
        }


def microbatch_places(plan: StepPlan) -> tuple[tuple[int, int], ...]:
    """(microbatch, rank) of everything that is timed in a step, in the plan's order; the same list on every rank."""
    return tuple((index, rank) for index, microbatch in enumerate(plan.microbatches) for rank in microbatch.ranks)


def measured_to_plain(step: MeasuredStep) -> dict[str, Any]:
    """One line of ``spans.jsonl``: columns in seconds, because key names would take more space than the numbers."""
    rows = [(rank, each) for rank, times in enumerate(step.ranks) for each in times.microbatches]

    def column(values: SequenceOf[float]) -> list[float]:
        return [round(value, _DIGITS) for value in values]

    return {
        "step": step.step,
        "plan_wait_s": round(step.plan_wait_s, _DIGITS),
        "update_s": round(step.update_s, _DIGITS),
        "gather_s": column([rank.gather_s for rank in step.ranks]),
        "reduce_s": column([rank.reduce_s for rank in step.ranks]),
        "rank": [rank for rank, _ in rows],
        "microbatch": [each.microbatch for _, each in rows],
        "start_s": column([each.start_s for _, each in rows]),
        "middle_s": column([each.middle_s for _, each in rows]),
        "stop_s": column([each.stop_s for _, each in rows]),
        "forward_wait_s": column([each.forward_wait_s for _, each in rows]),
        "backward_wait_s": column([each.backward_wait_s for _, each in rows]),
    }


def measured_from_plain(data: Mapping[str, Any]) -> MeasuredStep:
    """Inverse of ``measured_to_plain``. Raises ValueError for anything else."""
    columns = ("rank", "microbatch", "start_s", "middle_s", "stop_s", "forward_wait_s", "backward_wait_s")
    try:
        by_rank: list[list[MicrobatchTime]] = [[] for _ in data["gather_s"]]
        for rank, index, *times in zip(*(data[name] for name in columns), strict=True):
            start_s, middle_s, stop_s, forward_s, backward_s = map(float, times)
            by_rank[rank].append(MicrobatchTime(
                microbatch=int(index), start_s=start_s, middle_s=middle_s, stop_s=stop_s, forward_wait_s=forward_s,
                backward_wait_s=backward_s,
            ))
        ranks = tuple(
            RankStep(gather_s=float(gather_s), reduce_s=float(reduce_s), microbatches=tuple(found))
            for gather_s, reduce_s, found in zip(data["gather_s"], data["reduce_s"], by_rank, strict=True)
        )
        if not ranks:
            raise ValueError("no ranks")
        return MeasuredStep(
            step=int(data["step"]), ranks=ranks, plan_wait_s=float(data["plan_wait_s"]),
            update_s=float(data["update_s"]),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"not the measured times of a step: {error}") from None


def median_ratio(pairs: SequenceOf[tuple[float, float]]) -> float:
    """Median of measured over predicted. ``pairs``: (predicted, measured), at least one, predictions above 0."""
    return statistics.median(measured / predicted for predicted, measured in pairs)
