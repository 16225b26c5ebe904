"""One step as a stack of groups over a line of ranks: from a target time to a legal schedule, in milliseconds.

A rank's microbatches pile up without waiting for anybody outside them: what is built here is what
``planner.pricing.simulate`` plays. Sequences that need several ranks come first, the largest groups first; all others
go to single ranks. Two ways:

- *spread* (time is scarce): a shared sequence joins the fullest group of its shape that still ends within the target,
  else opens a group where the fewest rank seconds are lost waiting. Groups whose ranks are left with less time than a
  microbatch is worth are topped up. Single sequences go longest first to the rank that ends first (Graham's LPT).
- *packed* (memory is scarce, so microbatches and their fixed times count): groups are packed first and filled up with
  shorter sequences where that costs less than the memory's share of a fixed time, then placed whole; single sequences
  fill rank after rank (``adaptive_fill``), so that neither its time nor its memory is left over.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from planner.strategies.adaptive.balance import balance_ranks
from planner.strategies.adaptive.fill import fill_groups, fill_ranks, pack_groups
from planner.strategies.adaptive.workshop import Batch, Pool, Workshop, fullest_with_room
from planner.strategies.search.bounds import cheapest_columns
from planner.strategies.search.shapes import FloatArray

SLACK = 1 + 1e-9
MAX_PEEKS = 6
MAX_FALLBACK_SHAPES = 6


@dataclass(frozen=True, slots=True)
class Draft:
    """Batches in global order, and when the last rank ends (``step_fixed_s`` not included)."""

    batches: tuple[Batch, ...]
    makespan_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a build aims at. ``makespan_s``: when all should end. ``alone_s``: a sequence's shape is the cheapest that
    runs it alone in this time. ``memory_weight``: how fixed times are shared out when shapes are compared (see
    ``planner.strategies.search.bounds``). ``packed``: which of the two ways."""

    makespan_s: float
    alone_s: float
    memory_weight: float
    packed: bool


def build_draft(shop: Workshop, target: Target) -> Draft:
    """Schedule all rows of the workshop."""
    return _Builder(shop, target).run()


class _Builder:
    """The state of one build."""

    def __init__(self, shop: Workshop, target: Target) -> None:
        self.shop = shop
        self.target = target
        self.limit_s = target.makespan_s * SLACK
        self.free_s: FloatArray = np.zeros(shop.num_ranks)
        self.top: list[Batch | None] = [None] * shop.num_ranks
        self.open: dict[int, list[Batch]] = {}
        self.batches: list[Batch] = []

    def run(self) -> Draft:
        shop, target = self.shop, self.target
        columns = cheapest_columns(shop.long, target.alone_s, target.memory_weight).tolist()
        shared, singles = [], []
        for row, column in zip(shop.long_rows, columns, strict=True):
            if shop.degree[column] == 1:
                singles.append(row)
            else:
                shared.append((row, column))
        pool = Pool(shop, singles + shop.settled)
        shared.sort(key=lambda item: (-shop.degree[item[1]], -shop.marginal_s(*item), item[0]))
        stacks: list[list[Batch]] = [[] for _ in range(shop.num_ranks)]
        if target.packed:
            groups = pack_groups(shop, shared, target.makespan_s)
            fill_groups(shop, groups, pool, target.makespan_s)
            for batch in sorted(groups, key=lambda batch: (-batch.degree, -batch.seconds, batch.rows[0])):
                self.put(batch, *self.best_start(batch.column, batch.seconds))
            stacks = fill_ranks(shop, pool, self.free_s, target.makespan_s)
        else:
            for row, column in shared:
                self.place(row, column)
            self.top_up(pool)
        self.deal(pool.longest_first(), stacks)
        balance_ranks(shop, stacks, self.free_s)
        depth = max(len(stack) for stack in stacks)
        self.batches += [stack[i] for i in range(depth) for stack in stacks if i < len(stack)]
        return Draft(tuple(self.batches), float(self.free_s.max()))

    def place(self, row: int, column: int) -> None:
        """Into the fullest group of its shape that ends in time, a new one in time, or where it ends first."""
        shop = self.shop
        load, capacity, marginal_s = shop.load(row, column), shop.capacity[column], shop.marginal_s(row, column)
        best: Batch | None = None
        for batch in self.open.get(column, ()):
            fits = batch.load + load <= capacity and batch.end_s + marginal_s <= self.limit_s
            if fits and not batch.covered and (best is None or batch.end_s > best.end_s):
                best = batch
        if best is not None:
            self.join(best, row)
            return
        total_s = marginal_s + shop.fixed[column]
        first, begin_s = self.best_start(column, total_s)
        if begin_s + total_s <= self.limit_s:
            self.start(row, column, first, begin_s)
        else:
            self.place_late(row)

    def place_late(self, row: int) -> None:
        """No room in time: any open group or any of the row's shapes, wherever it ends first."""
        shop = self.shop
        best_s, joined, opened = float("inf"), None, (0, 0, 0.0)
        for column, batches in self.open.items():
            load, marginal_s = shop.load(row, column), shop.marginal_s(row, column)
            for batch in batches:
                end_s = batch.end_s + marginal_s
                if end_s < best_s and not batch.covered and batch.load + load <= shop.capacity[column]:
                    best_s, joined = end_s, batch
        for column in self.fallback_columns(row):
            total_s = shop.marginal_s(row, column) + shop.fixed[column]
            first, begin_s = self.best_start(column, total_s)
            if begin_s + total_s < best_s:
                best_s, joined, opened = begin_s + total_s, None, (column, first, begin_s)
        if joined is not None:
            self.join(joined, row)
        else:
            self.start(row, *opened)

    def fallback_columns(self, row: int) -> list[int]:
        """Some shapes that the row fits, from the cheapest to the quickest: none is both dearer and slower than
        another."""
        shop = self.shop
        fitting = [column for column in range(len(shop.shapes)) if shop.load(row, column) <= shop.capacity[column]]
        alone = {column: shop.marginal_s(row, column) + shop.fixed[column] for column in fitting}
        frontier: list[int] = []
        for column in sorted(fitting, key=lambda c: (alone[c] * shop.degree[c], alone[c], c)):
            if not frontier or alone[column] < alone[frontier[-1]]:
                frontier.append(column)
        if len(frontier) <= MAX_FALLBACK_SHAPES:
            return frontier
        last = len(frontier) - 1
        return [frontier[last * i // (MAX_FALLBACK_SHAPES - 1)] for i in range(MAX_FALLBACK_SHAPES)]

    def best_start(self, column: int, total_s: float) -> tuple[int, float]:
        """First rank and begin of a new group: in time with the fewest rank seconds lost waiting, else the earliest."""
        firsts, ranks = self.shop.places(self.shop.degree[column])
        free_s = self.free_s[ranks]
        begins_s = free_s.max(axis=1)
        in_time = begins_s + total_s <= self.limit_s
        if in_time.any():
            lost_s = np.where(in_time, begins_s * ranks.shape[1] - free_s.sum(axis=1), np.inf)
            place = int(np.lexsort((firsts, -begins_s, lost_s.round(9)))[0])
        else:
            place = int(np.argmin(begins_s))
        return int(firsts[place]), float(begins_s[place])

    def start(self, row: int, column: int, first: int, begin_s: float) -> None:
        batch = Batch(column, self.shop.degree[column], self.shop.fixed[column])
        self.put(batch, first, begin_s)
        self.open.setdefault(column, []).append(batch)
        self.join(batch, row)

    def put(self, batch: Batch, first: int, begin_s: float) -> None:
        batch.first_rank, batch.begin_s = first, begin_s
        for rank in range(first, first + batch.degree):
            below = self.top[rank]
            if below is not None:
                below.covered = True
            self.top[rank] = batch
        self.free_s[first : first + batch.degree] = batch.end_s
        self.batches.append(batch)

    def join(self, batch: Batch, row: int) -> None:
        batch.add(row, self.shop.load(row, batch.column), self.shop.marginal_s(row, batch.column))
        self.free_s[batch.first_rank : batch.first_rank + batch.degree] = batch.end_s

    def top_up(self, pool: Pool) -> None:
        """Fill groups whose ranks have too little time left for a microbatch of their own to be worth its fixed time.

        With r seconds left on d ranks, local microbatches do r - fixed_s of local work a rank; the group itself does r
        times its efficiency (local over shared rank seconds).
        """
        shop = self.shop
        if not shop.has_local or not pool:
            return
        tokens = sum(pool.sizes) / len(pool)
        local_s = (shop.square[0] * tokens + shop.linear[0]) * tokens + shop.each[0]
        for batch in self.batches:
            column = batch.column
            shared_s = (shop.square[column] * tokens + shop.linear[column]) * tokens + shop.each[column]
            efficiency = local_s / (batch.degree * shared_s) if shared_s > 0 else 1.0
            left_s = self.target.makespan_s - batch.end_s
            if batch.covered or left_s * (1 - efficiency) >= shop.fixed[0]:
                continue
            while pool:
                room, left_s = shop.capacity[column] - batch.load, self.target.makespan_s - batch.end_s
                row = pool.take_at_most(shop.longest_within(column, left_s, room))
                if row is None:
                    break
                self.join(batch, row)

    def deal(self, rows: list[int], stacks: list[list[Batch]]) -> None:
        """Each row to the rank where it ends first, into the fullest of that rank's local microbatches with room."""
        shop = self.shop
        if not rows:
            return
        fixed_s, capacity = shop.fixed[0], shop.capacity[0]
        heap = [(free_s, rank) for rank, free_s in enumerate(self.free_s.tolist())]
        heapq.heapify(heap)
        for row in rows:
            load, marginal_s = shop.local_load[row], shop.local_s[row]
            seen: list[tuple[float, int]] = []
            best_s, best_place, best_batch = float("inf"), 0, None
            while heap and len(seen) < MAX_PEEKS and heap[0][0] + marginal_s < best_s:
                free_s, rank = heapq.heappop(heap)
                batch = fullest_with_room(stacks[rank], capacity - load)
                end_s = free_s + marginal_s + (fixed_s if batch is None else 0.0)
                if end_s < best_s:
                    best_s, best_place, best_batch = end_s, len(seen), batch
                seen.append((free_s, rank))
                if batch is not None:
                    break  # the ranks left are free no earlier
            _, rank = seen.pop(best_place)
            for entry in seen:
                heapq.heappush(heap, entry)
            heapq.heappush(heap, (best_s, rank))
            if best_batch is None:
                best_batch = Batch(0, 1, fixed_s, first_rank=rank)
                stacks[rank].append(best_batch)
            best_batch.add(row, load, marginal_s)
        for end_s, rank in heap:
            self.free_s[rank] = end_s
