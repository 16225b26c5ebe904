"""Hybrid data parallelism of ByteScale (Ge et al., arXiv 2502.21231): every sequence gets as many ranks as it needs.

As published: a sequence that one rank can hold runs on one rank. A longer one runs as a ring over the smallest number
of ranks that can hold it, which may be any integer. Ranks may run unequal numbers of microbatches; one gradient sum
ends the step.

- ``hdp-naive`` (algorithm 1): short sequences are packed by best fit into microbatches of a rank's full capacity. Then
  everything goes to the ranks with the fewest microbatches so far, whatever these cost.
- ``hdp`` (algorithm 2, DP-Balance): the longest sequence left goes to the ranks with the least work so far. The paper
  draws from buckets of equal work; the buckets are pieces of the list sorted by length and DP-Balance empties them one
  after the other, so this is longest-first list scheduling. Its slack delta has no published value and is 0 here.
- ``hdp-floor``: ``hdp`` with the fix of the first flaw below.

Where the run allows swapping, ``hdp`` and ``hdp-floor`` make rings smaller by offloading (eq. 3): a sequence of s
tokens that one rank cannot hold leaves only the fraction 1 - r(s) of its activations on its ranks, in all layers but
two, which stay complete. r(s) is the largest fraction whose copy hides under the forward
(``planner.strategies.search.memory_policy``). ``hdp-naive`` keeps everything.

Flaws and gaps of the method, and what is done here:

- Memory alone decides the number of ranks. Where memory is ample the longest sequence runs on too few of them and
  dominates the step time; offloading makes that worse. ``hdp-floor`` takes the smallest ring that also runs the
  sequence within the step's proven lower bound.
- The paper does not cap offloading by host memory. Here a sequence offloads at most what a full rank's share of the
  host's memory holds, and of that only what its ring needs: nothing where the ring is no smaller for it.
- Packing to full capacity leaves ranks without work in a step of few tokens. So ``hdp`` packs while it balances: a
  short sequence joins the fullest microbatch of its rank that still has room.
- The paper does not say which ranks form a ring, nor in which order ranks meet. Here they are the consecutive ranks
  that can start first, inside one node where it is large enough (rings are priced for that), in one global order.
- A ring's unused capacity is not filled. The paper's figures show it filled now and then, but it gives no rule.
- PP-Balance is a strategy of its own, ``hdp-pp`` (``planner.strategies.pp_balance``).

A degree that the cost model does not price is rounded up to the next one that it does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import Found, GroupChoice
from planner.pricing.problem import StepProblem
from planner.strategies.greedy import RankBlock, fill_blocks
from planner.strategies.search.bounds import step_bound_s
from planner.strategies.search.memory_policy import choose_policies, with_policy
from planner.strategies.search.shapes import (
    FloatArray,
    GroupShape,
    IntArray,
    PriceTable,
    price_table,
    require_fits,
    ring_shapes,
)


def plan_hdp(problem: StepProblem) -> Found:
    """The strategy ``hdp``. Raises SpecError where no ring can be formed, InfeasibleError where a sequence fits on no
    ring."""
    return _plan(problem, balanced=True, floor=False)


def plan_hdp_floor(problem: StepProblem) -> Found:
    """The strategy ``hdp-floor``; errors as ``plan_hdp``."""
    return _plan(problem, balanced=True, floor=True)


def plan_hdp_naive(problem: StepProblem) -> Found:
    """The strategy ``hdp-naive``; errors as ``plan_hdp``."""
    return _plan(problem.keeping_all(), balanced=False, floor=False)


def _plan(problem: StepProblem, *, balanced: bool, floor: bool) -> Found:
    lengths, num_ranks = problem.lengths, problem.num_ranks
    shapes = hdp_shapes(problem)
    table = hdp_table(lengths, shapes)
    require_fits(table, problem)
    bound_s = step_bound_s(lengths, shapes, num_ranks)
    columns = smallest_columns(table, bound_s if floor else np.inf)
    place = _place_by_time if balanced else _place_by_count
    groups = place(table, columns, num_ranks, problem.node_size)
    degrees = table.degrees[columns]
    note = (
        f"hdp {'balanced by time' if balanced else 'by microbatch count'}, degrees by memory"
        f"{' and critical path' if floor else ''}: {int((degrees > 1).sum())} rings of up to {int(degrees.max())} ranks"
    )
    shape_of = {shape.degree: shape for shape in shapes}
    choices = choose_policies([(shape_of[len(group.ranks)], group) for group in groups], problem)
    return Found(groups=choices, status=SolveStatus.GREEDY, bound_s=bound_s, note=note)


def hdp_shapes(problem: StepProblem) -> tuple[GroupShape, ...]:
    """Local and rings of any degree; where the limits allow swapping, each swaps what hides under the forward. Raises
    SpecError where no ring can be formed."""
    rings = ring_shapes("hdp", range(2, problem.num_ranks + 1), problem)
    return with_policy(rings, 0.0, problem.cost, problem.limits)


def hdp_table(lengths: SequenceOf[int], shapes: SequenceOf[GroupShape]) -> PriceTable:
    """Prices of these shapes, local first. A sequence that one rank can hold without swapping counts with all of its
    tokens there, as in the paper."""
    table = price_table(lengths, shapes)
    loads = table.load_tokens.copy()
    loads[:, 0] = np.where(table.lengths <= table.capacity_tokens[0], table.lengths, loads[:, 0])
    return replace(table, load_tokens=loads)


def smallest_columns(table: PriceTable, target_s: float) -> IntArray:
    """Per row, the column of the smallest degree that holds the sequence and runs it alone within ``target_s`` seconds;
    where none is that quick, the smallest of the quickest."""
    alone_s = np.where(table.fits, table.marginal_s + table.fixed_s, np.inf)
    limit_s = np.maximum(target_s * (1 + 1e-9), alone_s.min(axis=1))
    columns: IntArray = np.argmax(table.fits & (alone_s <= limit_s[:, None]), axis=1)
    return columns


def _place_by_time(
    table: PriceTable, columns: IntArray, num_ranks: int, node_size: int
) -> tuple[GroupChoice, ...]:
    """DP-Balance (algorithm 2): longest first, each to the ranks that are free first."""
    order = np.lexsort((table.rows, -table.lengths))
    is_ring = table.degrees[columns] > 1
    busy_s = np.zeros(num_ranks)
    alone_s = table.marginal_s + table.fixed_s
    rings = _place_rings(table, columns, order[is_ring[order]], alone_s, busy_s, node_size)
    blocks = [RankBlock(0, rank) for rank in range(num_ranks)]
    places = np.arange(num_ranks)
    singles = fill_blocks(table, blocks, [(row, places) for row in order[~is_ring[order]].tolist()], num_ranks, busy_s)
    return (*rings, *singles.groups)


def _place_by_count(
    table: PriceTable, columns: IntArray, num_ranks: int, node_size: int
) -> tuple[GroupChoice, ...]:
    """Algorithm 1: rings in the step's order, then packs, each to the ranks with the fewest microbatches."""
    is_ring = table.degrees[columns] > 1
    num_batches = np.zeros(num_ranks)
    rings = _place_rings(
        table, columns, np.flatnonzero(is_ring), np.ones_like(table.marginal_s), num_batches, node_size
    )
    singles = []
    for pack in best_fit_packs(table, np.flatnonzero(~is_ring), column=0):
        rank = int(np.argmin(num_batches))
        num_batches[rank] += 1
        singles.append(GroupChoice(AttentionKind.LOCAL, (rank,), tuple(sorted(table.rows[pack].tolist()))))
    return (*rings, *singles)


def _place_rings(
    table: PriceTable, columns: IntArray, order: IntArray, weights: FloatArray, busy: FloatArray, node_size: int
) -> list[GroupChoice]:
    """Give each row of ``order`` to consecutive ranks that can start it first; among equals, to those that wait least.

    ``weights``: what a row adds to ``busy`` on each shape. ``busy`` has one value per rank and is changed in place.
    """
    groups = []
    starts_of: dict[int, IntArray] = {}
    for row, column in zip(order.tolist(), columns[order].tolist(), strict=True):
        degree = table.shapes[column].degree
        if degree not in starts_of:
            starts = np.arange(len(busy) - degree + 1)
            starts_of[degree] = starts[starts % node_size + degree <= node_size] if degree <= node_size else starts
        starts = starts_of[degree]
        windows = np.lib.stride_tricks.sliding_window_view(busy, degree)[starts]
        free = windows.max(axis=1)
        waits = np.where(free == free.min(), -windows.sum(axis=1), np.inf)
        best = int(np.argmin(waits))
        first = int(starts[best])
        busy[first : first + degree] = free[best] + weights[row, column]
        ranks = tuple(range(first, first + degree))
        groups.append(GroupChoice(AttentionKind.RING, ranks, (int(table.rows[row]),)))
    return groups


def best_fit_packs(
    table: PriceTable, rows: Iterable[int], column: int, capacity: int | None = None
) -> list[list[int]]:
    """Pack rows by best fit, longest first: each goes into the fullest pack that still takes it, else into a new one.

    ``capacity``: tokens of a pack (None: those of the shape in ``column``). Every row must fit it.
    """
    if capacity is None:
        capacity = int(table.capacity_tokens[column])
    lengths, loads = table.lengths.tolist(), table.load_tokens[:, column].tolist()
    packs: list[list[int]] = []
    spare: list[tuple[int, int]] = []  # (tokens left, pack), ascending: the first with enough room is the fullest
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        place = bisect_left(spare, (loads[row], -1))
        if place < len(spare):
            left, pack = spare.pop(place)
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        insort(spare, (left - loads[row], pack))
    return packs
