"""Megatron-core's hybrid context parallelism (``--hybrid-context-parallel``, 0.16): the rule of its balanced scheduler.

As published: a sequence runs on the smallest power of two of ranks whose share of it is within the tokens a rank can
hold; its work is length^2 / ranks. Sequences, longest first, are cut into as many buckets of about equal work as there
are sizes. A *round* is filled from the first bucket whose head can be placed: on the least loaded team of ranks of just
that size, or on a new team of free ranks where there are enough. It ends when nothing can be placed, or, once a smaller
size has come up, when all ranks are within 5 % of the busiest. Then the busiest team gives its last sequences back
while that evens out the round, and where ranks are idle the smallest teams are doubled. What is left over goes to the
next round.

Flaws of the rule, kept, since this strategy is for comparison: work is quadratic only, so short sequences count for
nothing; the longest sequence gets no more ranks than memory asks for; the bucket count of a size that is used up is
taken off twice, so late buckets come out uneven; sequences given back lose their place in the order.

Where the original fails or wastes, this differs:

- A sequence that needs more ranks than the largest power of two among them stops the original with an assertion. Here
  it runs on all ranks; so it does where memory, to the token, or the cost model leave no smaller size.
- Doubling a team takes as many idle ranks as it has. Where there are fewer (two teams of 2 on 5 ranks) the original
  stops with an IndexError. Here those ranks stay idle for the round.
- The original runs a team's sequences one by one, a forward and backward each. Here they are packed, best fit, into as
  few microbatches as memory holds: the rule stays the same and only the repeated fixed time is saved.
- All ranks wait after each round there. Our runtime has no such barrier, so ranks go on as soon as they are free.
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
    """The strategy ``megatron``. Raises SpecError where no ring can be formed,
    InfeasibleError where a sequence fits on none."""
    shapes = ring_shapes("megatron", flexsp_degrees(problem.num_ranks), problem)
    table = price_table(problem.lengths, shapes)
    require_fits(table, problem)
    rounds = megatron_rounds(table, problem.num_ranks)
    column_of = {degree: column for column, degree in enumerate(table.degrees.tolist())}
    groups = []
    for teams in rounds:
        for team in teams:
            column = column_of[team.size]
            ranks = tuple(range(team.first_rank, team.first_rank + team.size))
            for pack in best_fit_packs(table, team.rows, column):
                sequences = tuple(sorted(table.rows[pack].tolist()))
                groups.append(GroupChoice(table.shapes[column].kind, ranks, sequences))
    bound_s = step_bound_s(problem.lengths, shapes, problem.num_ranks)
    return Found(
        groups=tuple(groups), status=SolveStatus.GREEDY, bound_s=bound_s,
        note=f"megatron hybrid context parallelism, {len(rounds)} rounds",
    )


@dataclass(slots=True)
class Team:
    """``size`` consecutive ranks and the rows of the table they work on in one round, in the order given to them."""

    first_rank: int
    size: int
    load: float = 0.0
    rows: list[int] = field(default_factory=list)


def megatron_rounds(table: PriceTable, num_ranks: int) -> list[list[Team]]:
    """The rounds of the rule, each a list of disjoint teams. The table's shapes are local and rings of powers of two
    of ranks and of all ranks, as far as they are priced; every row must fit one."""
    sizes = table.degrees[smallest_columns(table, np.inf)].tolist()
    works = [length * length / size for length, size in zip(table.lengths.tolist(), sizes, strict=True)]
    left = np.argsort(-table.lengths, kind="stable").tolist()
    rounds = []
    while left:
        teams, left = _fill_round(left, sizes, works, num_ranks)
        left += _trim(teams, works, num_ranks)
        _use_idle_ranks(teams, table, num_ranks)
        rounds.append(teams)
    return rounds


def _buckets(rows: list[int], sizes: list[int], works: list[float]) -> list[deque[int]]:
    """Cut ``rows`` into runs of about equal work, at most one for each size among them."""
    num_sizes = len({sizes[row] for row in rows})
    target = sum(works[row] for row in rows) / num_sizes
    buckets: list[deque[int]] = []
    current, current_work = deque[int](), 0.0
    for place, row in enumerate(rows):
        # The original takes a closed bucket off twice: it counts buckets down and subtracts those closed as well.
        still_needed = num_sizes - 2 * len(buckets)
        if current and (current_work + works[row] > target * BUCKET_SLACK or len(rows) - place <= still_needed):
            buckets.append(current)
            current, current_work = deque(), 0.0
        current.append(row)
        current_work += works[row]
    return [*buckets, current]


def _fill_round(
    rows: list[int], sizes: list[int], works: list[float], num_ranks: int
) -> tuple[list[Team], list[int]]:
    """Teams with their rows, and the rows that are left."""
    buckets = _buckets(rows, sizes, works)
    teams: list[Team] = []
    team_of_size: dict[int, list[Team]] = {}
    first_size, num_free, smaller_seen = None, num_ranks, False
    while buckets:
        bucket = next((b for b in buckets if b and (sizes[b[0]] in team_of_size or sizes[b[0]] <= num_free)), None)
        if bucket is None:
            break
        row = bucket.popleft()
        size = sizes[row]
        first_size = first_size or size
        if size <= num_free:  # a new team has no load yet, so it always is the least loaded
            team = Team(first_rank=num_ranks - num_free, size=size)
            num_free -= size
            teams.append(team)
            team_of_size.setdefault(size, []).append(team)
        else:
            team = min(team_of_size[size], key=lambda each: each.load)
        team.rows.append(row)
        team.load += works[row]
        while buckets and not buckets[0]:
            buckets.pop(0)
        smaller_seen = smaller_seen or size < first_size
        if smaller_seen and buckets and not num_free and _spread(teams) <= ROUND_SPREAD * _busiest(teams).load:
            break
    return teams, [row for bucket in buckets for row in bucket]


def _busiest(teams: list[Team]) -> Team:
    return max(teams, key=lambda team: team.load)


def _spread(teams: list[Team]) -> float:
    return _busiest(teams).load - min(team.load for team in teams)


def _trim(teams: list[Team], works: list[float], num_ranks: int) -> list[int]:
    """Take the last row of the busiest team away while that makes the round more even; the rows taken away."""
    removed: list[int] = []
    if sum(team.size for team in teams) < num_ranks:
        return removed
    while _spread(teams) > ROUND_SPREAD * _busiest(teams).load:
        team = _busiest(teams)
        if len(team.rows) < 2:
            break
        before, row = _spread(teams), team.rows[-1]
        team.load -= works[row]
        if _spread(teams) >= before:
            team.load += works[row]
            break
        removed.append(team.rows.pop())
    return removed


def _use_idle_ranks(teams: list[Team], table: PriceTable, num_ranks: int) -> None:
    """Double the smallest team, the first among equals, at most to all ranks, while there are enough idle ones, the
    cost model prices the size and the rows still fit (an uneven split may hold a token more). Teams stay adjacent."""
    column_of = {degree: column for column, degree in enumerate(table.degrees.tolist())}
    while num_idle := num_ranks - sum(team.size for team in teams):
        team = min(teams, key=lambda each: each.size)
        larger = min(2 * team.size, num_ranks)
        column = column_of.get(larger)
        if larger - team.size > num_idle or column is None or not table.fits[team.rows, column].all():
            break
        team.size = larger
        first_rank = 0
        for each in teams:
            each.first_rank, first_rank = first_rank, first_rank + each.size
