"""Pack one round without a solver: groups of several degrees side by side, each sequence in one of them.

Multifit (Coffman, Garey, Johnson 1978) with groups of unequal size. A target makespan determines each sequence's
cheapest shape. Longest first, a sequence joins the fullest group that still ends in time and has room, or opens a group
of its shape while ranks are left. The smallest target that works is bisected. Then the sequences are dealt again over
the same groups, each to the one where it ends first, and the better of the two packings is kept.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right, insort
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.strategies.search.bounds import cheapest_columns, makespan_bound_s
from planner.strategies.search.shapes import PriceTable

NUM_BISECTIONS = 8
LARGE_ROUND = 1_000_000  # sequences times ranks
NUM_LARGE_BISECTIONS = 4
TARGET_GROWTH = 1.25


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A group of the shape in ``column`` of the round's table, and its rows there."""

    column: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoundPacking:
    """Groups that run side by side. ``makespan_s``: seconds of the slowest one."""

    groups: tuple[PackedGroup, ...]
    makespan_s: float


@dataclass(frozen=True, slots=True)
class _Rows:
    """A table as nested lists by row and shape, because single numbers are read faster from lists. ``least_loads``: the
    smallest load of any row, by shape. A group with less room is full."""

    marginal_s: list[list[float]]
    loads: list[list[int]]
    least_loads: list[int]

    @classmethod
    def of(cls, table: PriceTable) -> _Rows:
        return cls(table.marginal_s.tolist(), table.load_tokens.tolist(), table.load_tokens.min(axis=0).tolist())


def pack_round(
    table: PriceTable, num_ranks: int, *, deadline_s: float = math.inf, within_s: float = math.inf
) -> RoundPacking | None:
    """Pack all rows of the table into one round. None where no packing is found that fits in memory and within
    ``within_s`` seconds. After ``deadline_s`` (by ``time.perf_counter``) no further target is tried."""
    failed_s, target_s = 0.0, makespan_bound_s(table, num_ranks)
    give_up_s = float(np.where(table.fits, table.marginal_s + table.fixed_s, 0.0).max(axis=1).sum())
    numbers = _Rows.of(table)
    while (best := _pack_within(table, numbers, num_ranks, target_s)) is None:
        if target_s >= min(give_up_s, within_s) or time.perf_counter() > deadline_s:
            return None  # at ``give_up_s`` time no longer binds, so it is memory that does not suffice
        failed_s, target_s = target_s, min(target_s * TARGET_GROWTH, within_s)
    narrow = table.num_rows * num_ranks > LARGE_ROUND or within_s < math.inf
    num_bisections = NUM_LARGE_BISECTIONS if narrow else NUM_BISECTIONS
    for _ in range(num_bisections if failed_s else 0):
        if time.perf_counter() > deadline_s:
            break
        middle_s = (failed_s + min(target_s, best.makespan_s)) / 2
        packing = _pack_within(table, numbers, num_ranks, middle_s)
        if packing is None:
            failed_s = middle_s
        else:
            target_s, best = middle_s, min(best, packing, key=lambda each: each.makespan_s)
    return best


def deal_rows(table: PriceTable, columns: SequenceOf[int]) -> RoundPacking | None:
    """Deal all rows, longest first, over groups of these shapes: each to the group with room where it ends first.

    None where a row finds no room. Groups that stay empty are dropped.
    """
    return _deal(table, _Rows.of(table), columns)


def _deal(table: PriceTable, numbers: _Rows, columns: SequenceOf[int]) -> RoundPacking | None:
    marginal_s, loads = numbers.marginal_s, numbers.loads
    spare = [int(table.capacity_tokens[column]) for column in columns]
    rows: list[list[int]] = [[] for _ in columns]
    # By shape: (seconds so far, place) of every group with room, ascending.
    queues: dict[int, list[tuple[float, int]]] = {}
    for place, column in enumerate(columns):
        queues.setdefault(column, []).append((float(table.fixed_s[column]), place))
    for row in np.lexsort((table.rows, -table.lengths)).tolist():
        best, best_at = (math.inf, -1), (-1, -1)
        for column, queue in queues.items():
            added_s, load = marginal_s[row][column], loads[row][column]
            for position, (ends_s, place) in enumerate(queue):
                if (ends_s + added_s, place) >= best:
                    break
                if load <= spare[place]:
                    best, best_at = (ends_s + added_s, place), (column, position)
                    break
        ends_s, place = best
        if place < 0:
            return None
        column, position = best_at
        del queues[column][position]
        rows[place].append(row)
        spare[place] -= loads[row][column]
        if spare[place] >= numbers.least_loads[column]:
            insort(queues[column], (ends_s, place))
    return packing_of(table, [(column, members) for column, members in zip(columns, rows, strict=True) if members])


def packing_of(table: PriceTable, groups: SequenceOf[tuple[int, SequenceOf[int]]]) -> RoundPacking:
    """Price groups, given as (column, rows) with no empty one. They are ordered by degree, larger first, then by time,
    longer first, then by rows."""
    packed = [PackedGroup(column, tuple(sorted(rows))) for column, rows in groups]
    rows = np.concatenate([group.rows for group in packed])
    sizes = np.array([len(group.rows) for group in packed])
    columns = np.array([group.column for group in packed])
    starts = np.cumsum(sizes) - sizes
    times_s = np.add.reduceat(table.marginal_s[rows, np.repeat(columns, sizes)], starts) + table.fixed_s[columns]
    keys = zip((-table.degrees[columns]).tolist(), (-times_s).tolist(), packed, strict=True)
    order = sorted(keys, key=lambda key: (key[0], key[1], key[2].rows))
    return RoundPacking(tuple(group for _, _, group in order), float(times_s.max()))


def group_s(table: PriceTable, group: PackedGroup) -> float:
    """Seconds of a packed group."""
    return float(table.marginal_s[list(group.rows), group.column].sum() + table.fixed_s[group.column])


def _pack_within(table: PriceTable, numbers: _Rows, num_ranks: int, target_s: float) -> RoundPacking | None:
    columns = cheapest_columns(table, target_s)
    rows = np.arange(table.num_rows)
    degrees, alone_s = table.degrees[columns], table.marginal_s[rows, columns] + table.fixed_s[columns]
    limit_s = max(target_s * (1 + 1e-9), float(alone_s.max()))
    marginal_s, loads = numbers.marginal_s, numbers.loads
    groups: list[tuple[int, list[int]]] = []
    spare: list[int] = []
    # By shape: (seconds so far, -place) of every group with room, ascending, so that the last of several equal ones is
    # the group opened first.
    queues: dict[int, list[tuple[float, int]]] = {}
    free_ranks = num_ranks
    for row in np.lexsort((table.rows, -alone_s, -degrees)).tolist():
        best, best_at = (-math.inf, 0), (-1, -1)
        for column, queue in queues.items():
            added_s, load = marginal_s[row][column], loads[row][column]
            position = _last_in_time(queue, added_s, limit_s)
            while position >= 0:
                time_s, negated = queue[position]
                if (time_s + added_s, negated) <= best:
                    break
                if load <= spare[-negated]:
                    best, best_at = (time_s + added_s, negated), (column, position)
                    break
                position -= 1
        (time_s, negated), (column, position) = best, best_at
        if column >= 0:
            del queues[column][position]
        else:
            column = int(columns[row])
            free_ranks -= int(table.degrees[column])
            if free_ranks < 0:
                return None
            negated, time_s = -len(groups), float(table.fixed_s[column]) + marginal_s[row][column]
            groups.append((column, []))
            spare.append(int(table.capacity_tokens[column]))
        groups[-negated][1].append(row)
        spare[-negated] -= loads[row][column]
        if spare[-negated] >= numbers.least_loads[column]:
            insort(queues.setdefault(column, []), (time_s, negated))
    packed = packing_of(table, groups)
    dealt = _deal(table, numbers, [column for column, _ in groups])
    return packed if dealt is None or packed.makespan_s <= dealt.makespan_s else dealt


def _last_in_time(queue: list[tuple[float, int]], added_s: float, limit_s: float) -> int:
    """The last place in the queue whose seconds plus ``added_s``, as rounded, are within the limit; -1 if none."""
    place = bisect_right(queue, (limit_s - added_s, 1)) - 1
    while place + 1 < len(queue) and queue[place + 1][0] + added_s <= limit_s:
        place += 1
    while place >= 0 and queue[place][0] + added_s > limit_s:
        place -= 1
    return place
