"""One step as groups over a line of ranks: from a target time to a legal schedule, in milliseconds.

A rank works off its microbatches without waiting for anybody outside them: what is built here is what
``planner.pricing.simulate`` plays. Sequences that need several ranks come first, the largest groups first; all others
run on single ranks. Two ways:

- *spread* (time is scarce): a shared sequence joins the fullest group of its shape that still ends within the target,
  else opens a group where the fewest rank seconds are lost waiting. Groups whose ranks are left with less time than a
  microbatch of their own is worth take single sequences in.
- *packed* (memory is scarce, so microbatches and their fixed times count): groups are packed first, then placed whole.

Single sequences go longest first to the rank that ends first (Graham's LPT rule); then ranks exchange some
(``planner.strategies.adaptive.balance``).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from planner.strategies.adaptive.balance import balance_ranks
from planner.strategies.adaptive.priced_step import Batch, PricedStep, fullest_with_room
from planner.strategies.search.bounds import cheapest_columns
from planner.strategies.search.shapes import FloatArray


@dataclass(frozen=True, slots=True)
class Draft:
    """Batches in global order, and when the last rank ends (``step_fixed_s`` not included)."""

    batches: tuple[Batch, ...]
    makespan_s: float


def build_draft(step: PricedStep, target_s: float, *, packed: bool, alone_s: float | None = None) -> Draft:
    """Schedule all rows of the step so that they end by ``target_s``, as far as that is possible, in one of the two
    ways. A sequence's shape is the cheapest that runs it alone within ``alone_s`` (None: the target)."""
    return _Builder(step, target_s, packed, target_s if alone_s is None else alone_s).run()


class _Builder:
    """The state of one build."""

    def __init__(self, step: PricedStep, target_s: float, packed: bool, alone_s: float) -> None:
        self.step, self.alone_s = step, alone_s
        self.target_s, self.packed = target_s, packed
        self.limit_s = target_s * (1 + 1e-9)
        self.free_s: FloatArray = np.zeros(step.num_ranks)
        self.last: list[Batch | None] = [None] * step.num_ranks
        self.groups: dict[int, list[Batch]] = {}  # by column
        self.batches: list[Batch] = []

    def run(self) -> Draft:
        step = self.step
        columns = cheapest_columns(step.long, self.alone_s).tolist()
        chosen = list(enumerate(columns, step.num_local))
        shared = [(row, column) for row, column in chosen if step.degree[column] > 1]
        singles = [*range(step.num_local), *(row for row, column in chosen if step.degree[column] == 1)]
        shared.sort(key=lambda item: (-step.degree[item[1]], -step.marginal_s(*item), item[0]))
        for row, column in shared:
            self.add_shared(row, column)
        if self.packed:
            groups = [batch for batches in self.groups.values() for batch in batches]
            for batch in sorted(groups, key=lambda batch: (-batch.degree, -batch.seconds, batch.rows[0])):
                self.put(batch, *self.best_start(batch.column, batch.seconds))
        else:
            self.fill_up(singles)
        stacks: list[list[Batch]] = [[] for _ in range(step.num_ranks)]
        self.deal(singles[::-1], stacks)
        balance_ranks(step, stacks, self.free_s)
        depth = max(len(stack) for stack in stacks)
        self.batches += [stack[i] for i in range(depth) for stack in stacks if i < len(stack)]
        return Draft(tuple(self.batches), float(self.free_s.max()))

    def add_shared(self, row: int, column: int) -> None:
        """To the group of its shape that ends last of those that take it in time; else to a new one, or where it ends
        first."""
        step = self.step
        load, marginal_s = step.load(row, column), step.marginal_s(row, column)
        found = [
            batch for batch in self.groups.get(column, ())
            if batch.is_last and load <= step.room(batch) and batch.end_s + marginal_s <= self.limit_s
        ]
        if found:
            self.join(max(found, key=lambda batch: batch.end_s), row)
        elif self.packed:
            self.open(row, column)
        else:
            total_s = marginal_s + step.fixed[column]
            first, begin_s = self.best_start(column, total_s)
            if begin_s + total_s <= self.limit_s:
                self.put(self.open(row, column), first, begin_s)
            else:
                self.add_late(row, column)

    def add_late(self, row: int, column: int) -> None:
        """Nothing takes it in time: to any group, or a new one of its shape or its quickest, where it ends first."""
        step, long, place = self.step, self.step.long, row - self.step.num_local
        alone_s = np.where(long.fits[place], long.marginal_s[place] + long.fixed_s, np.inf)
        joined = [
            (batch.end_s + step.marginal_s(row, batch.column), batch) for batch in self.batches
            if batch.is_last and step.load(row, batch.column) <= step.room(batch)
        ]
        opened = []
        for new in (column, int(np.argmin(alone_s))):
            first, begin_s = self.best_start(new, float(alone_s[new]))
            opened.append((begin_s + float(alone_s[new]), new, first, begin_s))
        end_s, new, first, begin_s = min(opened)
        best_s, batch = min(joined, key=lambda item: item[0], default=(np.inf, None))
        if batch is not None and best_s <= end_s:
            self.join(batch, row)
        else:
            self.put(self.open(row, new), first, begin_s)

    def best_start(self, column: int, total_s: float) -> tuple[int, float]:
        """First rank and begin of a new group: in time with the fewest rank seconds lost waiting, else the earliest."""
        firsts, ranks = self.step.places(self.step.degree[column])
        free_s = self.free_s[ranks]
        begins_s = free_s.max(axis=1)
        in_time = begins_s + total_s <= self.limit_s
        if in_time.any():
            lost_s = np.where(in_time, begins_s * ranks.shape[1] - free_s.sum(axis=1), np.inf)
            place = int(np.lexsort((firsts, -begins_s, lost_s.round(9)))[0])
        else:
            place = int(np.argmin(begins_s))
        return int(firsts[place]), float(begins_s[place])

    def open(self, row: int, column: int) -> Batch:
        """A new group of this row, on no ranks yet."""
        batch = Batch(column, self.step.degree[column], self.step.fixed[column])
        batch.add(row, self.step.load(row, column), self.step.marginal_s(row, column))
        self.groups.setdefault(column, []).append(batch)
        return batch

    def put(self, batch: Batch, first: int, begin_s: float) -> None:
        batch.first_rank, batch.begin_s = first, begin_s
        for rank in range(first, first + batch.degree):
            before = self.last[rank]
            if before is not None:
                before.is_last = False
            self.last[rank] = batch
        self.free_s[first : first + batch.degree] = batch.end_s
        self.batches.append(batch)

    def join(self, batch: Batch, row: int) -> None:
        batch.add(row, self.step.load(row, batch.column), self.step.marginal_s(row, batch.column))
        if batch.first_rank >= 0:
            self.free_s[batch.first_rank : batch.first_rank + batch.degree] = batch.end_s

    def fill_up(self, singles: list[int]) -> None:
        """Move single sequences into groups whose ranks have too little time left for a microbatch of their own to be
        worth its fixed time.

        With r seconds left on d ranks, local microbatches do r - fixed_s of local work a rank; the group itself does r
        times its efficiency (local over shared rank seconds).
        """
        step = self.step
        if not step.has_local or not singles:
            return
        mean = sum(step.lengths[row] for row in singles) / len(singles)
        local_s = step.shapes[0].fit.sequence_s(mean)
        for batch in self.batches:
            shape = step.shapes[batch.column]
            shared_s = shape.fit.sequence_s(mean)
            efficiency = local_s / (batch.degree * shared_s) if shared_s > 0 else 1.0
            left_s = self.target_s - batch.end_s
            if not batch.is_last or left_s * (1 - efficiency) >= step.fixed[0]:
                continue
            while (place := self.longest_for(batch, singles)) >= 0:
                self.join(batch, singles.pop(place))

    def longest_for(self, batch: Batch, rows: list[int]) -> int:
        """The place of the longest of these rows that the group takes within the target; -1 where there is none."""
        step, column = self.step, batch.column
        in_time = bisect_right(rows, self.target_s - batch.end_s, key=lambda row: step.marginal_s(row, column))
        place = bisect_right(rows, step.room(batch), hi=in_time, key=lambda row: step.load(row, column)) - 1
        # The loads of longer rows may be smaller, so what was found is looked at once more.
        return place if place >= 0 and step.load(rows[place], column) <= step.room(batch) else -1

    def deal(self, rows: list[int], stacks: list[list[Batch]]) -> None:
        """Each row to the rank that ends first, into the fullest of that rank's local microbatches with room."""
        step = self.step
        heap = [(free_s, rank) for rank, free_s in enumerate(self.free_s.tolist())]
        heapq.heapify(heap)
        for row in rows:
            free_s, rank = heap[0]
            load, marginal_s = step.local_load[row], step.local_s[row]
            batch = fullest_with_room(stacks[rank], step.shapes[0].capacity_tokens - load)
            if batch is None:
                batch = Batch(0, 1, step.fixed[0], first_rank=rank)
                stacks[rank].append(batch)
                free_s += step.fixed[0]
            batch.add(row, load, marginal_s)
            heapq.heapreplace(heap, (free_s + marginal_s, rank))
        for end_s, rank in heap:
            self.free_s[rank] = end_s
