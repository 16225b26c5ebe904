"""A plan that always exists, in milliseconds: list scheduling, longest first (Graham's LPT rule) under memory.

Every sequence takes the shape that costs the fewest rank seconds, among those that run it within a target time; then
sequences go one by one, largest degree first and longest first within a degree, to the aligned block of ranks where
they finish earliest. A block opens another microbatch when its open ones are full. There are no rounds: ranks may run
unequal numbers of microbatches.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.plan import SolveStatus
from planner.pricing.assemble import Found, GroupChoice, makespan_s
from planner.pricing.problem import StepProblem
from planner.strategies.search.bounds import cheapest_columns, makespan_bound_s
from planner.strategies.search.chunk_shapes import chunk_sizes, chunked_shape
from planner.strategies.search.memory_policy import choose_policies, recompute_fractions, with_every_policy, with_policy
from planner.strategies.search.shapes import (
    FloatArray,
    GroupShape,
    IntArray,
    PriceTable,
    allowed_shapes,
    price_table,
    require_fits,
)


@dataclass(frozen=True, slots=True)
class Lane:
    """Ranks ``first_rank .. first_rank + degree - 1`` as a group of the shape in column ``column`` of the table."""

    column: int
    first_rank: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Groups in global order and the time (seconds) of the last rank to finish, ``step_fixed_s`` not included."""

    groups: tuple[GroupChoice, ...]
    makespan_s: float


@dataclass(slots=True)
class _OpenBatch:
    """A microbatch being filled: what it can still take, and its rows so far."""

    spare_tokens: int
    rows: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaneChoice:
    """Lanes that a row may go to, as arrays. ``column``: of all of them, None where they differ. Keeps ``places``
    alive, whose identity finds it again."""

    places: IntArray
    first_ranks: IntArray
    columns: IntArray
    fixed_s: FloatArray
    column: int | None

    @classmethod
    def of(cls, table: PriceTable, lanes: list[Lane], places: IntArray) -> _LaneChoice:
        chosen = [lanes[place] for place in places.tolist()]
        columns = np.array([lane.column for lane in chosen])
        return cls(
            places=places, first_ranks=np.array([lane.first_rank for lane in chosen]), columns=columns,
            fixed_s=table.fixed_s[columns], column=int(columns[0]) if (columns == columns[0]).all() else None,
        )

    def first_to_finish(
        self, table: PriceTable, row: int, free_s: FloatArray, spare_tokens: IntArray
    ) -> tuple[int, bool, float]:
        """The lane (a place among these), whether it opens a microbatch for the row, and when it ends then."""
        columns = self.columns if self.column is None else self.column
        opens = spare_tokens[self.places] < table.load_tokens[row, columns]
        finish_s = free_s[self.first_ranks] + table.marginal_s[row, columns] + np.where(opens, self.fixed_s, 0.0)
        if self.column is None:
            finish_s[~table.fits[row, columns]] = np.inf
        best = int(np.argmin(finish_s))
        return best, bool(opens[best]), float(finish_s[best])


def plan_greedy(problem: StepProblem) -> Found:
    """The greedy plan on FlexSP's shapes, with the bound of those shapes. Where
    some sequence fits only if memory policies make room, all shapes are taken with the policy that frees most: to swap
    and recompute all, and where that is too little, the largest chunks that do.

    Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none.
    """
    lengths, num_ranks = problem.lengths, problem.num_ranks
    kept = allowed_shapes(problem)
    shapes, table = _roomy_shapes(problem, kept)
    require_fits(table, problem)
    schedule = greedy_schedule(table, num_ranks)
    # what is packed in a roomy way may still get a milder one
    every = table if shapes is kept else price_table(lengths, with_every_policy(kept, problem.cost, problem.limits))
    bound_s = makespan_bound_s(every, num_ranks)
    shape_of = {(shape.kind, shape.degree): shape for shape in shapes}
    groups = choose_policies(
        [(shape_of[group.kind, len(group.ranks)], group) for group in schedule.groups], problem
    )
    return Found(groups=groups, status=SolveStatus.GREEDY, bound_s=bound_s, note="greedy list schedule")


def _roomy_shapes(
    problem: StepProblem, kept: tuple[GroupShape, ...]
) -> tuple[tuple[GroupShape, ...], PriceTable]:
    """The first way to run these shapes in which every sequence fits one of them; the last one where none does."""
    lengths, cost, limits = problem.lengths, problem.cost, problem.limits
    shapes, table = kept, price_table(lengths, kept)
    if not table.fits.any(axis=1).all():
        shapes = with_policy(kept, recompute_fractions(cost, limits)[-1], cost, limits)
        table = price_table(lengths, shapes)
    for size in chunk_sizes(cost, limits):
        if table.fits.any(axis=1).all():
            break
        chunked = [chunk for shape in kept if (chunk := chunked_shape(shape, size, cost, limits)) is not None]
        if chunked:
            shapes, table = tuple(chunked), price_table(lengths, chunked)
    return shapes, table


def as_played(schedule: Schedule, problem: StepProblem) -> Schedule:
    """The schedule with the makespan that lockstep or pipeline stages give it, where the cost model has them."""
    if problem.cost.runs_free:
        return schedule
    return replace(schedule, makespan_s=makespan_s(schedule.groups, problem))


def greedy_schedule(table: PriceTable, num_ranks: int) -> Schedule:
    """The better of two list schedules: shapes chosen for the least work, and for the proven bound as target time.

    Every row must fit at least one shape.
    """
    targets_s = (float("inf"), makespan_bound_s(table, num_ranks))
    choices = [cheapest_columns(table, target_s) for target_s in targets_s]
    if np.array_equal(choices[0], choices[1]):
        choices = choices[:1]
    return min((_schedule_columns(table, columns, num_ranks) for columns in choices), key=lambda s: s.makespan_s)


def _schedule_columns(table: PriceTable, columns: IntArray, num_ranks: int) -> Schedule:
    used = sorted(set(columns.tolist()))
    lanes = [
        Lane(column, block * shape.degree)
        for column in used
        for shape in (table.shapes[column],)
        for block in range(num_ranks // shape.degree)
    ]
    lanes_of = {column: np.array([i for i, lane in enumerate(lanes) if lane.column == column]) for column in used}
    marginal_s = table.marginal_s[np.arange(table.num_rows), columns]
    order = np.lexsort((table.rows, -marginal_s, -table.degrees[columns]))
    return fill_lanes(table, lanes, [(row, lanes_of[columns[row]]) for row in order.tolist()], num_ranks)


def fill_lanes(
    table: PriceTable, lanes: list[Lane], order: Iterable[tuple[int, IntArray]], num_ranks: int,
    busy_s: FloatArray | None = None,
) -> Schedule:
    """Give each row, in this order, to the lane (one of the places in ``lanes`` beside it) where it finishes first.

    Any two lanes must be disjoint or nested, and a row for an outer lane must come before all rows for the lanes inside
    it: then the ranks of a lane are always free at the same time, and this is what the simulator will say. A row must
    fit at least one of its lanes. ``busy_s``: when each rank is free for all this (default: at once).
    """
    rows = list(order)
    free_s = np.zeros(num_ranks) if busy_s is None else busy_s.copy()
    spare_tokens = np.full(len(lanes), -1, dtype=np.int64)  # of each lane's emptiest microbatch; -1: there is none
    batches: list[list[_OpenBatch]] = [[] for _ in lanes]
    choices: dict[int, _LaneChoice] = {}
    degrees, capacities = table.degrees.tolist(), table.capacity_tokens.tolist()
    tail = _like_tail(lanes, rows)
    for row, places in rows[:tail]:
        choice = choices.get(id(places))
        if choice is None:
            choice = choices[id(places)] = _LaneChoice.of(table, lanes, places)
        best, opens, finish_s = choice.first_to_finish(table, row, free_s, spare_tokens)
        lane = int(places[best])
        column = lanes[lane].column
        load = int(table.load_tokens[row, column])
        opened = batches[lane]
        if opens:
            opened.append(_OpenBatch(capacities[column], []))
        # Best fit: the fullest microbatch that still takes the row keeps room for long ones elsewhere.
        batch = min((b for b in opened if b.spare_tokens >= load), key=lambda b: b.spare_tokens)
        batch.rows.append(row)
        batch.spare_tokens -= load
        spare_tokens[lane] = max(b.spare_tokens for b in opened)
        first = lanes[lane].first_rank
        free_s[first : first + degrees[column]] = finish_s
    if tail < len(rows):
        _fill_like_lanes(table, lanes, rows[tail:], free_s, batches)
    return Schedule(_groups(table, lanes, batches), float(free_s.max()))


def _like_tail(lanes: list[Lane], rows: SequenceOf[tuple[int, IntArray]]) -> int:
    """From which row on all go to the same lanes of one shape: nearly all of a step, those for single ranks."""
    if not rows or len({lanes[place].column for place in rows[-1][1].tolist()}) > 1:
        return len(rows)
    tail = len(rows)
    while tail > 0 and rows[tail - 1][1] is rows[-1][1]:
        tail -= 1
    return tail


def _fill_like_lanes(
    table: PriceTable, lanes: list[Lane], rows: SequenceOf[tuple[int, IntArray]], free_s: FloatArray,
    batches: list[list[_OpenBatch]],
) -> None:
    """``fill_lanes`` for rows that may all go to the same lanes of one shape: the lane that is free first with room in
    an open microbatch, or the one that is free first with a new one. ``free_s`` and ``batches`` move on."""
    mine = rows[0][1].tolist()
    column = lanes[mine[0]].column
    degree, capacity = table.shapes[column].degree, int(table.capacity_tokens[column])
    fixed_s, loads = float(table.fixed_s[column]), table.load_tokens[:, column].tolist()
    marginals_s = table.marginal_s[:, column].tolist()
    free = {lane: float(free_s[lanes[lane].first_rank]) for lane in mine}
    spare = {lane: max((batch.spare_tokens for batch in batches[lane]), default=-1) for lane in mine}
    every = [(free[lane], lane) for lane in mine]
    opened = [(free[lane], lane) for lane in mine if batches[lane]]
    heapq.heapify(every)
    heapq.heapify(opened)
    for row, _ in rows:
        load, marginal_s = loads[row], marginals_s[row]
        while every[0][0] != free[every[0][1]]:
            heapq.heappop(every)  # the lane has got work since
        lane = every[0][1]
        opens = spare[lane] < load
        finish_s = every[0][0] + marginal_s + (fixed_s if opens else 0.0)
        passed = []
        while opens and opened and opened[0][0] + marginal_s <= finish_s:
            entry = heapq.heappop(opened)
            if entry[0] != free[entry[1]]:
                continue
            passed.append(entry)
            if spare[entry[1]] >= load:
                opens, lane, finish_s = False, entry[1], entry[0] + marginal_s
        for entry in passed:
            heapq.heappush(opened, entry)
        if opens:
            batches[lane].append(_OpenBatch(capacity, []))
        batch = min((b for b in batches[lane] if b.spare_tokens >= load), key=lambda b: b.spare_tokens)
        batch.rows.append(row)
        batch.spare_tokens -= load
        spare[lane] = max(b.spare_tokens for b in batches[lane])
        free[lane] = finish_s
        heapq.heappush(every, (finish_s, lane))
        heapq.heappush(opened, (finish_s, lane))
    for lane in mine:
        first = lanes[lane].first_rank
        free_s[first : first + degree] = free[lane]


def _groups(table: PriceTable, lanes: list[Lane], batches: list[list[_OpenBatch]]) -> tuple[GroupChoice, ...]:
    """Outer lanes first, then the first microbatch of every lane, the second of every lane, ..."""
    placed = []
    for lane, opened in zip(lanes, batches, strict=True):
        shape = table.shapes[lane.column]
        ranks = tuple(range(lane.first_rank, lane.first_rank + shape.degree))
        for ordinal, batch in enumerate(opened):
            sequences = tuple(sorted(table.rows[batch.rows].tolist()))
            key = (-shape.degree, ordinal, lane.first_rank, lane.column)
            placed.append((key, GroupChoice(shape.kind, ranks, sequences)))
    return tuple(group for _, group in sorted(placed, key=lambda item: item[0]))
