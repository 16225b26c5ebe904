"""Megatron-core's hybrid context parallelism (``--hybrid-context-parallel``, 0.16): the rule of its balanced scheduler.

As published: a sequence runs on the smallest power of two of ranks on which each rank's share fits a rank's token
capacity; its work is length^2 / ranks. Sequences, longest first, are cut into as many buckets of about equal work as
there are degrees. A *round* is filled from the first bucket whose first sequence can be placed: on a new group where
enough ranks are free, else on the least loaded group of its degree. The round ends when nothing can be placed, or, once
a smaller degree has come up, when all ranks are within 5 % of the busiest. Then the busiest group gives its last
sequences back while that evens out the round, and where ranks are idle the smallest groups are doubled. What is left
over goes to the next round.

Flaws of the rule that are kept, since this strategy is for comparison: work is quadratic only, so short sequences
hardly count; the longest sequence gets no more ranks than memory requires; each closed bucket is subtracted twice from
the number of buckets still needed, so late buckets are uneven; sequences given back lose their place in the order.

Where the original fails or wastes time, this differs:

- A sequence that needs more ranks than the largest power of two among them stops the original with an assertion. Here
  it runs on all ranks. It also does where no smaller degree is priced or holds it, remainders included.
- Doubling a group takes as many idle ranks as it has. Where there are fewer (two groups of 2 on 5 ranks) the original
  stops with an IndexError. Here those ranks stay idle for the round.
- The original runs a forward and backward for each sequence of a group. Here a group's sequences are packed by best fit
  into as few microbatches as memory allows, which only saves repeated fixed time.
- There, all ranks wait after each round. Our runtime has no such barrier: ranks continue as soon as they are free.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from planner.plan import SolveStatus
from planner.pricing.assemble import Found, GroupChoice
from planner.pricing.problem import StepProblem
from planner.strategies.hdp import best_fit_packs, smallest_columns
from planner.strategies.search.bounds import step_bound_s
from planner.strategies.search.shapes import PriceTable, flexsp_degrees, price_table, require_fits, ring_shapes

BUCKET_SLACK = 1.1
ROUND_SPREAD = 0.05


def plan_megatron(problem: StepProblem) -> Found:
    """The strategy ``megatron``. Raises SpecError where no ring can be formed, InfeasibleError where a sequence fits on
    none."""
    shapes = ring_shapes("megatron", flexsp_degrees(problem.num_ranks), problem)
    table = price_table(problem.lengths, shapes)
    require_fits(table, problem)
    rounds = megatron_rounds(table, problem.num_ranks)
    column_of = {degree: column for column, degree in enumerate(table.degrees.tolist())}
    choices = []
    for groups in rounds:
        for group in groups:
            column = column_of[group.degree]
            ranks = tuple(range(group.first_rank, group.first_rank + group.degree))
            for pack in best_fit_packs(table, group.rows, column):
                sequences = tuple(sorted(table.rows[pack].tolist()))
                choices.append(GroupChoice(table.shapes[column].kind, ranks, sequences))
    bound_s = step_bound_s(problem.lengths, shapes, problem.num_ranks)
    return Found(
        groups=tuple(choices), status=SolveStatus.GREEDY, bound_s=bound_s,
        note=f"megatron hybrid context parallelism, {len(rounds)} rounds",
    )


@dataclass(slots=True)
class RankGroup:
    """``degree`` consecutive ranks, and the rows of the table that they run in one round, in the order of placement.
    ``load``: the sum of their work."""

    first_rank: int
    degree: int
    load: float = 0.0
    rows: list[int] = field(default_factory=list)


def megatron_rounds(table: PriceTable, num_ranks: int) -> list[list[RankGroup]]:
    """The rounds of the rule, each a list of disjoint groups. The table's shapes must be local and rings of powers of
    two and of all ranks, as far as they are priced; every row must fit one."""
    degrees = table.degrees[smallest_columns(table, np.inf)].tolist()
    works = [length * length / degree for length, degree in zip(table.lengths.tolist(), degrees, strict=True)]
    left = np.argsort(-table.lengths, kind="stable").tolist()
    rounds = []
    while left:
        groups, left = _fill_round(left, degrees, works, num_ranks)
        left += _trim(groups, works, num_ranks)
        _use_idle_ranks(groups, table, num_ranks)
        rounds.append(groups)
    return rounds


def _buckets(rows: list[int], degrees: list[int], works: list[float]) -> list[deque[int]]:
    """Cut ``rows`` into runs of about equal work, at most one for each degree among them."""
    num_degrees = len({degrees[row] for row in rows})
    target = sum(works[row] for row in rows) / num_degrees
    buckets: list[deque[int]] = []
    current, current_work = deque[int](), 0.0
    for place, row in enumerate(rows):
        # As the original does, subtract each closed bucket twice.
        still_needed = num_degrees - 2 * len(buckets)
        if current and (current_work + works[row] > target * BUCKET_SLACK or len(rows) - place <= still_needed):
            buckets.append(current)
            current, current_work = deque(), 0.0
        current.append(row)
        current_work += works[row]
    return [*buckets, current]


def _fill_round(
    rows: list[int], degrees: list[int], works: list[float], num_ranks: int
) -> tuple[list[RankGroup], list[int]]:
    """The groups of one round with their rows, and the rows that are left."""
    buckets = _buckets(rows, degrees, works)
    groups: list[RankGroup] = []
    groups_of_degree: dict[int, list[RankGroup]] = {}
    first_degree, num_free, smaller_seen = None, num_ranks, False
    while buckets:
        bucket = next(
            (b for b in buckets if b and (degrees[b[0]] in groups_of_degree or degrees[b[0]] <= num_free)), None
        )
        if bucket is None:
            break
        row = bucket.popleft()
        degree = degrees[row]
        first_degree = first_degree or degree
        if degree <= num_free:  # a new group has no load, so it is the least loaded one
            group = RankGroup(first_rank=num_ranks - num_free, degree=degree)
            num_free -= degree
            groups.append(group)
            groups_of_degree.setdefault(degree, []).append(group)
        else:
            group = min(groups_of_degree[degree], key=lambda each: each.load)
        group.rows.append(row)
        group.load += works[row]
        while buckets and not buckets[0]:
            buckets.pop(0)
        smaller_seen = smaller_seen or degree < first_degree
        if smaller_seen and buckets and not num_free and _spread(groups) <= ROUND_SPREAD * _busiest(groups).load:
            break
    return groups, [row for bucket in buckets for row in bucket]


def _busiest(groups: list[RankGroup]) -> RankGroup:
    return max(groups, key=lambda group: group.load)


def _spread(groups: list[RankGroup]) -> float:
    return _busiest(groups).load - min(group.load for group in groups)


def _trim(groups: list[RankGroup], works: list[float], num_ranks: int) -> list[int]:
    """Take the last row off the busiest group while that makes the round more even. Returns the rows taken off."""
    removed: list[int] = []
    if sum(group.degree for group in groups) < num_ranks:
        return removed
    while _spread(groups) > ROUND_SPREAD * _busiest(groups).load:
        group = _busiest(groups)
        if len(group.rows) < 2:
            break
        before, row = _spread(groups), group.rows[-1]
        group.load -= works[row]
        if _spread(groups) >= before:
            group.load += works[row]
            break
        removed.append(group.rows.pop())
    return removed


def _use_idle_ranks(groups: list[RankGroup], table: PriceTable, num_ranks: int) -> None:
    """Double the smallest group, the first among equals, up to all ranks. Stop where too few ranks are idle, the cost
    model does not price the degree, or the rows no longer fit (an uneven split may hold a token more). Groups stay
    adjacent."""
    column_of = {degree: column for column, degree in enumerate(table.degrees.tolist())}
    while num_idle := num_ranks - sum(group.degree for group in groups):
        group = min(groups, key=lambda each: each.degree)
        larger = min(2 * group.degree, num_ranks)
        column = column_of.get(larger)
        if larger - group.degree > num_idle or column is None or not table.fits[group.rows, column].all():
            break
        group.degree = larger
        first_rank = 0
        for each in groups:
            each.first_rank, first_rank = first_rank, first_rank + each.degree
