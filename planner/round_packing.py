"""One round without a solver: groups of several degrees side by side, each sequence in one of them.

Multifit (Coffman, Garey, Johnson 1978) with groups of unequal size: for a target makespan every sequence knows its
cheapest shape; longest first, it joins the fullest group that still ends in time and has room, or opens a new group
while ranks are left. The smallest target that works is bisected, then the sequences are dealt again over the same
groups, each to where it ends first.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.bounds import cheapest_columns, makespan_bound_s
from planner.shapes import PriceTable

NUM_BISECTIONS = 8
TARGET_GROWTH = 1.25


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A group of the shape in ``column`` of the round's table and its rows there."""

    column: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoundPacking:
    """Groups that run side by side; ``makespan_s`` is the slowest one's time."""

    groups: tuple[PackedGroup, ...]
    makespan_s: float


def pack_round(table: PriceTable, num_ranks: int) -> RoundPacking | None:
    """Pack all rows of the table into one round, or None where this finds no way to fit them in memory."""
    failed_s, target_s = 0.0, makespan_bound_s(table, num_ranks)
    give_up_s = float(np.where(table.fits, table.marginal_s + table.fixed_s, 0.0).max(axis=1).sum())
    while (best := _pack_within(table, num_ranks, target_s)) is None:
        if target_s >= give_up_s:  # no time limit binds any more: it is memory that does
            return None
        failed_s, target_s = target_s, target_s * TARGET_GROWTH
    for _ in range(NUM_BISECTIONS if failed_s else 0):
        middle_s = (failed_s + min(target_s, best.makespan_s)) / 2
        packing = _pack_within(table, num_ranks, middle_s)
        if packing is None:
            failed_s = middle_s
        else:
            target_s, best = middle_s, min(best, packing, key=lambda each: each.makespan_s)
    return best


def deal_rows(table: PriceTable, columns: SequenceOf[int]) -> RoundPacking | None:
    """Deal all rows over groups of these shapes, longest first, each to where it ends first under memory.

    None where a row finds no room. Groups left empty are dropped.
    """
    shape = np.asarray(columns, dtype=np.int64)
    time_s, load = np.zeros(len(shape)), np.zeros(len(shape), dtype=np.int64)
    rows: list[list[int]] = [[] for _ in columns]
    for row in np.lexsort((table.rows, -table.lengths)).tolist():
        ends_s = time_s + table.marginal_s[row, shape] + table.fixed_s[shape] * (load == 0)
        ends_s[load + table.load_tokens[row, shape] > table.capacity_tokens[shape]] = np.inf
        best = int(np.argmin(ends_s))
        if np.isinf(ends_s[best]):
            return None
        time_s[best] = ends_s[best]
        load[best] += table.load_tokens[row, shape[best]]
        rows[best].append(row)
    return packing_of(table, [(column, members) for column, members in zip(columns, rows, strict=True) if members])


def packing_of(table: PriceTable, groups: SequenceOf[tuple[int, SequenceOf[int]]]) -> RoundPacking:
    """Price groups (column, rows): larger degrees first, longer times first, then by first row."""
    packed = [PackedGroup(column, tuple(sorted(rows))) for column, rows in groups]
    packed.sort(key=lambda group: (-int(table.degrees[group.column]), -group_s(table, group), group.rows))
    return RoundPacking(tuple(packed), max(group_s(table, group) for group in packed))


def group_s(table: PriceTable, group: PackedGroup) -> float:
    """Seconds of a packed group."""
    return float(table.marginal_s[list(group.rows), group.column].sum() + table.fixed_s[group.column])


def _pack_within(table: PriceTable, num_ranks: int, target_s: float) -> RoundPacking | None:
    columns = cheapest_columns(table, target_s)
    rows = np.arange(table.num_rows)
    degrees, alone_s = table.degrees[columns], table.marginal_s[rows, columns] + table.fixed_s[columns]
    limit_s = max(target_s * (1 + 1e-9), float(alone_s.max()))
    shape = np.zeros(num_ranks, dtype=np.int64)
    time_s, load = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    members: list[list[int]] = []
    free_ranks = num_ranks
    for row in np.lexsort((table.rows, -alone_s, -degrees)).tolist():
        opened = shape[: len(members)]
        ends_s = time_s[: len(members)] + table.marginal_s[row, opened]
        loads = load[: len(members)] + table.load_tokens[row, opened]
        ends_s[(ends_s > limit_s) | (loads > table.capacity_tokens[opened])] = -np.inf
        place = int(np.argmax(ends_s)) if members else 0
        if not members or np.isinf(ends_s[place]):
            place = len(members)
            column = int(columns[row])
            free_ranks -= int(table.degrees[column])
            if free_ranks < 0:
                return None
            shape[place], time_s[place] = column, table.fixed_s[column]
            members.append([])
        members[place].append(row)
        time_s[place] += table.marginal_s[row, shape[place]]
        load[place] += table.load_tokens[row, shape[place]]
    used = shape[: len(members)].tolist()
    packed = packing_of(table, list(zip(used, members, strict=True)))
    dealt = deal_rows(table, used)
    return packed if dealt is None or packed.makespan_s <= dealt.makespan_s else dealt
