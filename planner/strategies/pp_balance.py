"""PP-Balance of ByteScale (Ge et al., arXiv 2502.21231, algorithm 2): each pipeline runs microbatches of like length.

A pipeline of p stages that runs microbatches of t_1 >= t_2 >= ... seconds a stage takes about sum(t_i) + (p - 1) * t_1:
its longest microbatch sets the time to fill and drain it. So long microbatches belong into the same pipelines, and the
other pipelines take more microbatches. The paper draws from buckets of equal work, one after another, with a slack.

The strategy ``hdp-pp`` does this for the microbatches of algorithm 1 (``planner.strategies.hdp``): sequences that one
rank can hold are packed by best fit up to its full capacity, and longer ones run on the smallest ring that holds them.
The paper leaves gaps, which are filled as follows:

- Neither the number of buckets nor the slack is published. Here each microbatch, longest first, goes to the first ranks
  that then end within a target time, or, where there are none, to those that end earliest. The target is bisected.
- The paper does not say which ranks form a ring. Here: consecutive ones, inside one node where it is large enough.
- It does not say in which order a pipeline runs its microbatches. Here: longest first, in one global order, so that the
  shortest one drains it.
- It does not say that capacity shrinks with the microbatches in flight. It must: the first stage holds as many of them
  as there are stages, so each may hold only that fraction of the tokens (``CostModel.max_local_tokens``).
- It assumes full packs, of which its steps have many for every pipeline. Where a pipeline would get fewer packs than it
  has stages, packs are made smaller: an even share of the tokens each.

One flaw is kept: memory alone decides degrees, as in ``hdp``. Without stages this is longest-first placement of packs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import Found, GroupChoice
from planner.pricing.problem import StepProblem
from planner.strategies.hdp import best_fit_packs, hdp_shapes, hdp_table, smallest_columns
from planner.strategies.search.bounds import step_bound_s
from planner.strategies.search.shapes import IntArray, PriceTable, require_fits

NUM_TRIALS = 4


@dataclass(frozen=True, slots=True)
class Placing:
    """The first rank of every microbatch, and an estimate of when the last pipeline ends (seconds)."""

    first_ranks: tuple[int, ...]
    finish_s: float


def plan_hdp_pp(problem: StepProblem) -> Found:
    """The strategy ``hdp-pp``. Raises SpecError where no ring can be formed, InfeasibleError where a sequence fits on
    none."""
    return plan_packs(problem, pack_share=None)


def plan_packs(problem: StepProblem, *, pack_share: float | None, floor: bool = False) -> Found:
    """``plan_hdp_pp`` with packs of at most ``pack_share`` of a rank's capacity (None: by the module's last rule); a
    longer sequence that one rank can hold is a pack alone. ``floor``: a sequence gets the smallest ring that also runs
    it through all stages within the lower bound."""
    problem = problem.keeping_all()
    num_ranks, num_stages = problem.num_ranks, problem.cost.num_stages
    shapes = hdp_shapes(problem)
    table = hdp_table(problem.lengths, shapes)
    require_fits(table, problem)
    bound_s = step_bound_s(problem.lengths, shapes, num_ranks)
    columns = smallest_columns(table, bound_s / num_stages if floor else np.inf)
    capacity = int(table.capacity_tokens[0])
    if pack_share is None:
        packed_tokens = int(table.lengths[table.degrees[columns] == 1].sum())
        capacity = min(capacity, -(-packed_tokens // (num_ranks * num_stages)))
    else:
        capacity = max(int(pack_share * capacity), 1)
    work = _microbatches(table, columns, capacity)
    stage_s = [seconds for seconds, _, _ in work]
    placing = best_placing(
        stage_s, [table.shapes[column].degree for _, column, _ in work], num_ranks=num_ranks,
        num_stages=num_stages, node_size=problem.node_size,
    )
    groups = []
    for first, (_, column, rows) in zip(placing.first_ranks, work, strict=True):
        degree = table.shapes[column].degree
        kind = AttentionKind.LOCAL if degree == 1 else AttentionKind.RING
        groups.append(GroupChoice(kind, tuple(range(first, first + degree)), tuple(sorted(table.rows[rows].tolist()))))
    note = f"hdp placed by PP-Balance over {num_stages} stages: {len(work)} microbatches"
    return Found(groups=tuple(groups), status=SolveStatus.GREEDY, bound_s=bound_s, note=note)


def _microbatches(table: PriceTable, columns: IntArray, capacity: int) -> list[tuple[float, int, list[int]]]:
    """(seconds of a stage, column, rows) of algorithm 1's microbatches, longest first."""
    is_ring = table.degrees[columns] > 1
    work = [(columns[row], [row]) for row in np.flatnonzero(is_ring).tolist()]
    singles = np.flatnonzero(~is_ring)
    alone = table.load_tokens[singles, 0] > capacity
    work += [(0, [row]) for row in singles[alone].tolist()]
    work += [(0, pack) for pack in best_fit_packs(table, singles[~alone].tolist(), column=0, capacity=capacity)]
    priced = [
        (float(table.marginal_s[rows, column].sum() + table.fixed_s[column]), int(column), rows)
        for column, rows in work
    ]
    return sorted(priced, key=lambda item: (-item[0], item[2]))


def best_placing(
    stage_s: SequenceOf[float], degrees: SequenceOf[int], *, num_ranks: int, num_stages: int,
    node_size: int | None = None,
) -> Placing:
    """Place microbatches on consecutive ranks, with the best of a few target times between a lower bound and the time
    of list scheduling.

    ``stage_s``: seconds of each microbatch on one stage, longest first. ``degrees``: number of ranks of each.
    ``node_size``: ranks of a node; a group that fits a node stays within one (None: all ranks are one node).
    """
    work_s = sum(each_s * degree for each_s, degree in zip(stage_s, degrees, strict=True)) / num_ranks
    low_s = max(work_s, num_stages * max(stage_s))
    starts = {degree: _starts(degree, num_ranks, node_size or num_ranks) for degree in set(degrees)}
    best = _place(stage_s, degrees, starts, num_ranks, num_stages, 0.0)
    high_s = best.finish_s
    for _ in range(NUM_TRIALS):
        target_s = (low_s + high_s) / 2
        placing = _place(stage_s, degrees, starts, num_ranks, num_stages, target_s)
        best = min(best, placing, key=lambda each: each.finish_s)
        if placing.finish_s <= target_s:
            high_s = target_s
        else:
            low_s = target_s
    return best


def _starts(degree: int, num_ranks: int, node_size: int) -> IntArray:
    """The first ranks that a group of this degree may have: a group that fits a node stays within one."""
    starts = np.arange(num_ranks - degree + 1, dtype=np.int64)
    if degree > node_size:
        return starts
    inside: IntArray = starts[starts % node_size + degree <= node_size]
    return inside


def _place(
    stage_s: SequenceOf[float], degrees: SequenceOf[int], starts: dict[int, IntArray], num_ranks: int,
    num_stages: int, target_s: float,
) -> Placing:
    """Place the microbatches in order, each on the first ranks whose pipelines then end within ``target_s``, or, where
    there are none, on those that end earliest. ``starts``: the possible first ranks by degree."""
    busy_s, longest_s = np.zeros(num_ranks), np.zeros(num_ranks)
    first_ranks = []
    last_s = 0.0
    for each_s, degree in zip(stage_s, degrees, strict=True):
        begins_s, levels_s = busy_s, longest_s
        if degree > 1:
            firsts = starts[degree]
            begins_s = np.lib.stride_tricks.sliding_window_view(busy_s, degree)[firsts].max(axis=1)
            levels_s = np.lib.stride_tricks.sliding_window_view(longest_s, degree)[firsts].max(axis=1)
        finish_s = begins_s + each_s + (num_stages - 1) * np.maximum(levels_s, each_s)
        place = int(np.argmax(finish_s <= target_s))
        if finish_s[place] > target_s:
            place = int(np.argmin(finish_s))
        last_s = max(last_s, float(finish_s[place]))
        level_s = max(each_s, float(levels_s[place]))
        first = int(starts[degree][place])
        busy_s[first : first + degree] = float(begins_s[place]) + each_s
        longest_s[first : first + degree] = level_s
        first_ranks.append(first)
    return Placing(tuple(first_ranks), last_s)
