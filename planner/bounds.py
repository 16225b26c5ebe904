"""What no plan can beat: a proven lower bound on the step time under the cost model.

Let C be the time of the last rank to finish, ``step_fixed_s`` aside, in any plan whose groups have the table's shapes.

- A sequence alone on a shape takes ``marginal_s + fixed_s``; in company it takes no less. So every sequence runs on a
  shape where that is at most C, and C is at least the longest sequence's best time (the critical path).
- The ranks are busy for at most num_ranks * C rank seconds in all. A group's fixed time is paid once and its memory is
  finite, so a sequence that takes the share ``load / capacity`` of a group owes at least that share of it:
  sum over sequences of min over shapes allowed at C of degree * (marginal_s + fixed_s * load / capacity)
  <= num_ranks * C.
- A rank that works at all pays at least one ``fixed_s``, so without the shares:
  sum of min degree * marginal_s <= num_ranks * (C - min fixed_s).

A smaller C allows fewer shapes, so both left sides fall as C grows: the smallest C that meets all three is found by
bisection over the times where the allowed shapes change. Nothing here depends on rounds or orders: it bounds every
strategy that forms these shapes. All coefficients must be at least 0.
"""

from __future__ import annotations

import numpy as np

from planner.shapes import FloatArray, IntArray, PriceTable


def makespan_bound_s(table: PriceTable, num_ranks: int) -> float:
    """Proven lower bound (seconds) on the time of the last rank to finish the table's sequences.

    Every row must fit at least one shape.
    """
    if not table.num_rows:
        return 0.0
    alone_s = _alone_s(table)
    with_shares = _smallest_makespan(alone_s, _rank_seconds(table), num_ranks, offset_s=0.0)
    without_shares = table.degrees * table.marginal_s
    return max(with_shares, _smallest_makespan(alone_s, without_shares, num_ranks, offset_s=float(table.fixed_s.min())))


def cheapest_columns(table: PriceTable, makespan_s: float) -> IntArray:
    """Per sequence the shape with the fewest rank seconds among those that run it within ``makespan_s``.

    Where none does, the quickest one.
    """
    alone_s = _alone_s(table)
    limit_s = np.maximum(makespan_s * (1 + 1e-9), alone_s.min(axis=1))
    allowed = table.fits & (alone_s <= limit_s[:, None])
    columns: IntArray = np.argmin(np.where(allowed, _rank_seconds(table), np.inf), axis=1)
    return columns


def _alone_s(table: PriceTable) -> FloatArray:
    times: FloatArray = np.where(table.fits, table.marginal_s + table.fixed_s, np.inf)
    return times


def _rank_seconds(table: PriceTable) -> FloatArray:
    shares = table.fixed_s * table.load_tokens / np.maximum(table.capacity_tokens, 1)
    seconds: FloatArray = table.degrees * (table.marginal_s + shares)
    return seconds


def _smallest_makespan(alone_s: FloatArray, rank_seconds: FloatArray, num_ranks: int, *, offset_s: float) -> float:
    """Smallest C with ``alone_s.min(axis=1) <= C`` and work(C) <= num_ranks * (C - offset_s)."""
    critical_s = float(alone_s.min(axis=1).max())

    def needed_s(makespan_s: float) -> float:
        work = np.where(alone_s <= makespan_s, rank_seconds, np.inf).min(axis=1).sum()
        return float(work) / num_ranks + offset_s

    steps = np.unique(alone_s[np.isfinite(alone_s) & (alone_s > critical_s)])
    low, high = 0, len(steps)  # the answer lies below steps[high] (if any) and at or above steps[low - 1]
    while low < high:
        middle = (low + high) // 2
        if needed_s(steps[middle]) <= steps[middle]:
            high = middle
        else:
            low = middle + 1
    start_s = float(steps[low - 1]) if low else critical_s
    found_s = max(start_s, needed_s(start_s))
    return min(found_s, float(steps[low])) if low < len(steps) else found_s
