"""List scheduling, longest first (Graham's LPT rule), under memory: a plan that always exists, within milliseconds.

Every sequence takes the shape that costs the fewest rank seconds among those that run it within a target time. Then
the sequences are placed one by one, largest degree first and longest first within a degree, on the aligned block of
ranks where they finish earliest. A block opens another microbatch when its open ones are full. There are no rounds:
ranks may run unequal numbers of microbatches.
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
class RankBlock:
    """Consecutive ranks from ``first_rank`` on that run groups of the shape in column ``column`` of the table."""

    column: int
    first_rank: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Groups in global order, and the makespan in seconds, ``step_fixed_s`` left out."""

    groups: tuple[GroupChoice, ...]
    makespan_s: float


@dataclass(slots=True)
class _OpenMicrobatch:
    """A microbatch that is being filled: the tokens that a rank can still take, and its rows so far."""

    spare_tokens: int
    rows: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockChoice:
    """The blocks that a row may go to, as arrays. ``column``: the blocks' common column, None where they differ.
    ``places`` is kept alive because its ``id`` is the key under which this value is found again."""

    places: IntArray
    first_ranks: IntArray
    columns: IntArray
    fixed_s: FloatArray
    column: int | None

    @classmethod
    def of(cls, table: PriceTable, blocks: list[RankBlock], places: IntArray) -> _BlockChoice:
        chosen = [blocks[place] for place in places.tolist()]
        columns = np.array([block.column for block in chosen])
        return cls(
            places=places, first_ranks=np.array([block.first_rank for block in chosen]), columns=columns,
            fixed_s=table.fixed_s[columns], column=int(columns[0]) if (columns == columns[0]).all() else None,
        )

    def first_to_finish(
        self, table: PriceTable, row: int, free_s: FloatArray, spare_tokens: IntArray
    ) -> tuple[int, bool, float]:
        """The block where the row finishes first (a place among these), whether it opens a microbatch for the row, and
        when it ends (seconds)."""
        columns = self.columns if self.column is None else self.column
        opens = spare_tokens[self.places] < table.load_tokens[row, columns]
        finish_s = free_s[self.first_ranks] + table.marginal_s[row, columns] + np.where(opens, self.fixed_s, 0.0)
        if self.column is None:
            finish_s[~table.fits[row, columns]] = np.inf
        best = int(np.argmin(finish_s))
        return best, bool(opens[best]), float(finish_s[best])


def plan_greedy(problem: StepProblem) -> Found:
    """The greedy plan on FlexSP's shapes, with the lower bound of those shapes.

    Where some sequence fits only under a memory policy, all shapes get the policy that frees most: all tokens swapped
    and recomputed, or, where that is not enough, the largest chunks with which every sequence fits.

    Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none.
    """
    lengths, num_ranks = problem.lengths, problem.num_ranks
    kept = allowed_shapes(problem)
    shapes, table = _roomy_shapes(problem, kept)
    require_fits(table, problem)
    schedule = greedy_schedule(table, num_ranks)
    # ``choose_policies`` may later give a microbatch a milder policy, so the bound has to hold for every policy.
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
    """The shapes under the mildest policy with which every sequence fits one of them; under the last policy tried where
    there is none. Tried are keeping all, swapping and recomputing all, and smaller and smaller chunks."""
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
    """The schedule with its simulated makespan where the cost model has lockstep or pipeline stages, which list
    scheduling does not count."""
    if problem.cost.runs_free:
        return schedule
    return replace(schedule, makespan_s=makespan_s(schedule.groups, problem))


def greedy_schedule(table: PriceTable, num_ranks: int) -> Schedule:
    """The better of two list schedules: with the shapes of the least work, and with those of the least work that run
    each sequence within the proven lower bound. Every row must fit at least one shape."""
    targets_s = (float("inf"), makespan_bound_s(table, num_ranks))
    choices = [cheapest_columns(table, target_s) for target_s in targets_s]
    if np.array_equal(choices[0], choices[1]):
        choices = choices[:1]
    return min((_schedule_columns(table, columns, num_ranks) for columns in choices), key=lambda s: s.makespan_s)


def _schedule_columns(table: PriceTable, columns: IntArray, num_ranks: int) -> Schedule:
    """The list schedule in which each row runs on the shape in its column."""
    used = sorted(set(columns.tolist()))
    blocks = [
        RankBlock(column, number * shape.degree)
        for column in used
        for shape in (table.shapes[column],)
        for number in range(num_ranks // shape.degree)
    ]
    blocks_of = {column: np.array([i for i, block in enumerate(blocks) if block.column == column]) for column in used}
    marginal_s = table.marginal_s[np.arange(table.num_rows), columns]
    order = np.lexsort((table.rows, -marginal_s, -table.degrees[columns]))
    return fill_blocks(table, blocks, [(row, blocks_of[columns[row]]) for row in order.tolist()], num_ranks)


def fill_blocks(
    table: PriceTable, blocks: list[RankBlock], order: Iterable[tuple[int, IntArray]], num_ranks: int,
    busy_s: FloatArray | None = None,
) -> Schedule:
    """Give each row, in this order, to the block where it finishes first.

    ``order``: rows, each with its allowed blocks as places in ``blocks``; it must fit at least one of them. Any two
    blocks must be disjoint or nested, and a row for an outer block must come before all rows for the blocks inside it.
    Then the ranks of a block are always free at the same time, and the simulated makespan is the same. ``busy_s``: when
    each rank becomes free (seconds; default: 0).
    """
    rows = list(order)
    free_s = np.zeros(num_ranks) if busy_s is None else busy_s.copy()
    spare_tokens = np.full(len(blocks), -1, dtype=np.int64)  # in each block's emptiest microbatch; -1: none is open
    microbatches: list[list[_OpenMicrobatch]] = [[] for _ in blocks]
    choices: dict[int, _BlockChoice] = {}
    degrees, capacities = table.degrees.tolist(), table.capacity_tokens.tolist()
    tail = _uniform_tail(blocks, rows)
    for row, places in rows[:tail]:
        choice = choices.get(id(places))
        if choice is None:
            choice = choices[id(places)] = _BlockChoice.of(table, blocks, places)
        best, opens, finish_s = choice.first_to_finish(table, row, free_s, spare_tokens)
        block = int(places[best])
        column = blocks[block].column
        load = int(table.load_tokens[row, column])
        opened = microbatches[block]
        if opens:
            opened.append(_OpenMicrobatch(capacities[column], []))
        # Best fit: the fullest microbatch that still takes the row, so that the others keep room for long rows.
        microbatch = min((b for b in opened if b.spare_tokens >= load), key=lambda b: b.spare_tokens)
        microbatch.rows.append(row)
        microbatch.spare_tokens -= load
        spare_tokens[block] = max(b.spare_tokens for b in opened)
        first = blocks[block].first_rank
        free_s[first : first + degrees[column]] = finish_s
    if tail < len(rows):
        _fill_uniform_blocks(table, blocks, rows[tail:], free_s, microbatches)
    return Schedule(_groups(table, blocks, microbatches), float(free_s.max()))


def _uniform_tail(blocks: list[RankBlock], rows: SequenceOf[tuple[int, IntArray]]) -> int:
    """The place from which on all rows may go to the same blocks of one shape. In most steps these are nearly all rows:
    the ones for single ranks."""
    if not rows or len({blocks[place].column for place in rows[-1][1].tolist()}) > 1:
        return len(rows)
    tail = len(rows)
    while tail > 0 and rows[tail - 1][1] is rows[-1][1]:
        tail -= 1
    return tail


def _fill_uniform_blocks(
    table: PriceTable, blocks: list[RankBlock], rows: SequenceOf[tuple[int, IntArray]], free_s: FloatArray,
    microbatches: list[list[_OpenMicrobatch]],
) -> None:
    """``fill_blocks`` for rows that may all go to the same blocks of one shape, with heaps in place of arrays.

    A row finishes first either on the block that is free first and has room in an open microbatch, or on the block that
    is free first and opens a microbatch. ``free_s`` and ``microbatches`` are changed in place."""
    mine = rows[0][1].tolist()
    column = blocks[mine[0]].column
    degree, capacity = table.shapes[column].degree, int(table.capacity_tokens[column])
    fixed_s, loads = float(table.fixed_s[column]), table.load_tokens[:, column].tolist()
    marginals_s = table.marginal_s[:, column].tolist()
    free = {block: float(free_s[blocks[block].first_rank]) for block in mine}
    spare = {block: max((microbatch.spare_tokens for microbatch in microbatches[block]), default=-1) for block in mine}
    every = [(free[block], block) for block in mine]
    opened = [(free[block], block) for block in mine if microbatches[block]]
    heapq.heapify(every)
    heapq.heapify(opened)
    for row, _ in rows:
        load, marginal_s = loads[row], marginals_s[row]
        while every[0][0] != free[every[0][1]]:
            heapq.heappop(every)  # out of date: the block has got work since
        block = every[0][1]
        opens = spare[block] < load
        finish_s = every[0][0] + marginal_s + (fixed_s if opens else 0.0)
        passed = []
        while opens and opened and opened[0][0] + marginal_s <= finish_s:
            entry = heapq.heappop(opened)
            if entry[0] != free[entry[1]]:
                continue
            passed.append(entry)
            if spare[entry[1]] >= load:
                opens, block, finish_s = False, entry[1], entry[0] + marginal_s
        for entry in passed:
            heapq.heappush(opened, entry)
        if opens:
            microbatches[block].append(_OpenMicrobatch(capacity, []))
        microbatch = min((b for b in microbatches[block] if b.spare_tokens >= load), key=lambda b: b.spare_tokens)
        microbatch.rows.append(row)
        microbatch.spare_tokens -= load
        spare[block] = max(b.spare_tokens for b in microbatches[block])
        free[block] = finish_s
        heapq.heappush(every, (finish_s, block))
        heapq.heappush(opened, (finish_s, block))
    for block in mine:
        first = blocks[block].first_rank
        free_s[first : first + degree] = free[block]


def _groups(
    table: PriceTable, blocks: list[RankBlock], microbatches: list[list[_OpenMicrobatch]]
) -> tuple[GroupChoice, ...]:
    """The groups in global order: larger degrees first; within a degree the first microbatch of every block, then the
    second of every block, and so on."""
    placed = []
    for block, opened in zip(blocks, microbatches, strict=True):
        shape = table.shapes[block.column]
        ranks = tuple(range(block.first_rank, block.first_rank + shape.degree))
        for ordinal, microbatch in enumerate(opened):
            sequences = tuple(sorted(table.rows[microbatch.rows].tolist()))
            key = (-shape.degree, ordinal, block.first_rank, block.column)
            placed.append((key, GroupChoice(shape.kind, ranks, sequences)))
    return tuple(group for _, group in sorted(placed, key=lambda item: item[0]))
