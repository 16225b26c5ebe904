"""What no plan can beat: a proven lower bound on the step time under the cost model.

Let C be the time of the last rank to finish, ``step_fixed_s`` aside, in any plan whose groups have the given shapes.

- *Critical path.* A sequence alone on a shape takes ``marginal_s + fixed_s``; in company it takes no less. So every
  sequence runs on a shape where that is at most C, and C is at least the longest sequence's best time.
- *Work.* In a microbatch a rank is busy for the marginal_s of its groups and the largest of their fixed times, F, and
  all ranks together are busy for at most num_ranks * C rank seconds. So a group may be charged degree * marginal_s, and
  all groups of a microbatch together its ranks' F in fixed times.
- *Fixed times by memory.* Charge every sequence degree * fixed_s times its share of its group's memory, which is
  fixed_s times the tokens it holds over the tokens m that a rank may hold. With one group that is at most its fixed
  times, because its shares add up to at most 1. With several that overlap: for every x >= 0, the groups with
  fixed_s > x hold their tokens on ranks that have F > x, m on each at most. Integrated over x from 0 on, the left side
  is what all groups are charged and the right side the sum of F over the ranks.
- *Fixed times by the clock.* Charge every sequence degree * fixed_s * marginal_s / (C - fixed_s) instead. On a rank
  the marginal_s of all its groups add up to at most C - F, and fixed_s / (C - fixed_s) is largest for fixed_s = F: so
  at most F is charged.

  With weights w and 1 - w, a mix of these two charges is also at most the fixed times. So for every w in 0 .. 1:

      sum over sequences of min over shapes allowed at C of
          degree * (marginal_s + fixed_s * (w * memory share + (1 - w) * marginal_s / (C - fixed_s)))  <=  num_ranks * C

  This is the dual side of a linear program that lets every sequence choose fractions of shapes.

A smaller C allows fewer shapes and raises every charge, so the left side falls as C grows. The smallest C that
satisfies the inequality is bracketed by bisection, and the lower end of the bracket is returned.

The memory share of a sequence is its tokens over those that all ranks of the group can hold: never more than what the
zigzag layout takes of a ring. Tokens that do not stay on the device do not count, and no microbatch frees more than the
shapes say. Nothing depends on rounds, placement or order, so the bound holds for every strategy that forms these
shapes, even several in one microbatch. It holds in lockstep (zero3), where barriers only add time. It holds with
pipeline stages: a cost model gives seconds and memory of one stage, and each stage alone runs all of the microbatches,
one at a time on a rank, so what is said here of ranks holds for the ranks of any stage. All coefficients must be at
least 0.

*Lockstep.* Where all ranks wait after each round (``planner.pricing.lockstep``) more can be said. Let f be the least
fixed_s of all shapes, and R the number of rounds of a plan. A rank runs at most one microbatch a round and holds no
more than its memory in it. So R is at least the least memory that all sequences can take over the memory of all ranks,
rounded up. A round takes at least f: a rank is idle in it, or busy for F >= f and the marginal_s of its groups. So

    num_ranks * R * f + sum over sequences of min over allowed shapes of degree * marginal_s  <=  num_ranks * C

where a shape is allowed if it runs the sequence alone in C - (R - 1) f: the other rounds leave no more of C. More
rounds raise the left side and allow fewer shapes, so the least possible R gives a bound for all plans.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import ceil

import numpy as np

from planner.plan import AttentionKind
from planner.pricing.microbatch import SequencePrices
from planner.strategies.search.shapes import (
    BoolArray,
    FloatArray,
    GroupShape,
    IntArray,
    PriceTable,
    group_tokens,
    price_table,
)

MEMORY_WEIGHTS = (1.0, 0.0, 0.5, 0.75, 0.25)
MAX_EVALUATIONS = 60
RELATIVE_WIDTH = 1e-10


@dataclass(frozen=True, slots=True)
class BoundPart:
    """Rows of one table, each standing for ``counts`` sequences of its length."""

    table: PriceTable
    counts: FloatArray


def makespan_bound_s(table: PriceTable, num_ranks: int) -> float:
    """Proven lower bound (seconds) on the time of the last rank to finish the table's sequences.

    Every row must fit at least one shape.
    """
    if not table.num_rows:
        return 0.0
    _, places, counts = np.unique(table.lengths, return_index=True, return_counts=True)
    return bound_of_parts((BoundPart(table.take_rows(places), counts.astype(np.float64)),), num_ranks)


def step_bound_s(lengths: SequenceOf[int] | IntArray, shapes: SequenceOf[GroupShape], num_ranks: int) -> float:
    """``makespan_bound_s`` of sequences of these lengths (tokens) on these shapes, fast for many of both."""
    return bound_of_parts(bound_parts(lengths, shapes, num_ranks), num_ranks)


def bound_parts(
    lengths: SequenceOf[int] | IntArray, shapes: SequenceOf[GroupShape], num_ranks: int
) -> tuple[BoundPart, ...]:
    """Each distinct length, priced once. A length that ``surely_local`` names is priced only on local and on the shapes
    that may charge it less than local does; the few longer ones are priced on all shapes."""
    distinct, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    weights = counts.astype(np.float64)
    local = next((shape for shape in shapes if shape.kind is AttentionKind.LOCAL), None)
    if local is None or not len(distinct):
        return (BoundPart(price_table(distinct, shapes), weights),) if len(distinct) else ()
    short = surely_local(distinct, weights, shapes, local, num_ranks)
    parts = []
    if short.any():
        useful = [shape for shape in shapes if shape is local or not dominates(local, shape)]
        parts.append(BoundPart(price_table(distinct[short], useful), weights[short]))
    if not short.all():
        parts.append(BoundPart(price_table(distinct[~short], shapes), weights[~short]))
    return tuple(parts)


def lockstep_bound_s(
    lengths: SequenceOf[int] | IntArray, shapes: SequenceOf[GroupShape], num_ranks: int, num_rounds: int | None = None
) -> float:
    """``step_bound_s`` where all ranks wait for each other after each round (``zero3``): never less.

    ``num_rounds``: no plan has fewer rounds. Given by who leaves shapes out of ``shapes`` because they cost more rank
    seconds: they may hold more, and so save a round. None: plans use ``shapes`` only, and the rounds follow from them.
    """
    parts = bound_parts(lengths, shapes, num_ranks)
    if not parts:
        return 0.0
    works = [_Work.of(part) for part in parts]
    fixed_s = min(shape.fit.fixed_s for shape in shapes)
    num_rounds = least_rounds(lengths, shapes, num_ranks) if num_rounds is None else num_rounds
    others_s = (num_rounds - 1) * fixed_s
    longest_s = max(float(work.alone_s.min(axis=1).max()) for work in works)
    # A part for single ranks leaves out shapes that cost more rank seconds than local. Some of them may be quicker than
    # all that are left, so the time limit must not rule out any shape in such a part.
    has_all = [len(part.table.shapes) == len(shapes) for part in parts]

    def needed_s(makespan_s: float) -> float:
        limits_s = [makespan_s - others_s if each else np.inf for each in has_all]
        least_s = sum(work.marginal_rank_s(limit_s) for work, limit_s in zip(works, limits_s, strict=True))
        return num_rounds * fixed_s + least_s / num_ranks

    low_s = max(bound_of_parts(parts, num_ranks), longest_s + others_s)
    return _raised(needed_s, low_s)


def least_rounds(lengths: SequenceOf[int] | IntArray, shapes: SequenceOf[GroupShape], num_ranks: int) -> int:
    """No plan of these shapes has fewer rounds: every sequence takes its memory on the shape where that is least, and a
    round holds no more than all ranks do. The ranks of a shape hold ``group_tokens`` together."""
    tokens = np.asarray(lengths, dtype=np.int64).astype(np.float64)
    shares: dict[tuple[float, float, float], float] = {}
    for shape in shapes:
        held = shape.held.least, shape.held.at_zero, shape.held.per_token
        share = shape.degree / max(group_tokens(shape), 1)
        if share < shares.get(held, np.inf):
            shares[held] = share
    least = np.full(len(tokens), np.inf)
    for (lowest, at_zero, per_token), share in shares.items():
        held_tokens = tokens * np.maximum(lowest, at_zero - per_token * tokens)
        least = np.minimum(least, share * held_tokens)
    return max(1, ceil(float(least.sum()) / num_ranks * (1 - 1e-9)))


def surely_local(
    lengths: IntArray, counts: FloatArray, shapes: SequenceOf[GroupShape], local: GroupShape, num_ranks: int
) -> BoolArray:
    """Which lengths surely fit ``local`` and run there alone within a simple lower bound on the makespan. That bound is
    the longest sequence's best time or the work at the cheapest coefficients of all shapes, whichever is more."""
    tokens = lengths.astype(np.float64)
    prices = SequencePrices.of([shape.fit for shape in shapes])
    cheapest = prices.cheapest(np.array([shape.degree for shape in shapes], dtype=np.int64))
    work_s = float(cheapest.marginal_s(tokens)[:, 0] @ counts) / num_ranks
    longest = price_table(lengths[[int(np.argmax(lengths))]], shapes)
    least_s = max(work_s, float(_alone_s(longest).min()))
    local_s = SequencePrices.of([local.fit]).marginal_s(tokens)[:, 0] + local.fit.fixed_s
    fits = lengths * local.held.at_zero <= local.capacity_tokens
    surely: BoolArray = fits & (local_s <= least_s)
    return surely


def dominates(one: GroupShape, other: GroupShape) -> bool:
    """Whether ``one`` charges every sequence that fits both no more rank seconds than ``other``, whatever the weights.
    ``one`` is local, or they have one degree: then it is no slower either."""
    here, there = one.fit, other.fit
    most_s = here.s_per_token + here.fixed_s * one.held.at_zero / max(group_tokens(one), 1)
    least_s = there.s_per_token + there.fixed_s * other.held.least / max(group_tokens(other), 1)
    times = other.degree // one.degree
    return here.adds_at_most(there, times=times) and here.fixed_s <= there.fixed_s and most_s <= times * least_s


def bound_of_parts(parts: SequenceOf[BoundPart], num_ranks: int) -> float:
    """The bound for all parts together (seconds, 0 without parts)."""
    works = [_Work.of(part) for part in parts]
    best_s = max((float(work.alone_s.min(axis=1).max()) for work in works), default=0.0)
    for memory_weight in MEMORY_WEIGHTS if works else ():
        best_s = _raise_bound(works, num_ranks, memory_weight, best_s)
    return best_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A part ready to be charged: arrays of row by shape, vectors by shape, ``counts`` by row."""

    counts: FloatArray
    alone_s: FloatArray
    rank_seconds: FloatArray  # degree * marginal_s
    memory_rank_seconds: FloatArray  # degree * fixed_s * memory share
    fixed_s: FloatArray

    @classmethod
    def of(cls, part: BoundPart) -> _Work:
        table = part.table
        return cls(
            counts=part.counts, alone_s=_alone_s(table), rank_seconds=table.degrees * table.marginal_s,
            memory_rank_seconds=table.degrees * table.fixed_s * table.memory_shares, fixed_s=table.fixed_s,
        )

    def charge_s(self, makespan_s: float, memory_weight: float) -> float:
        """Least rank seconds of all rows in a step that takes ``makespan_s``."""
        spare_s = makespan_s - self.fixed_s  # negative only where no row is allowed
        clock_weight = np.where(spare_s > 0, (1 - memory_weight) * self.fixed_s / np.maximum(spare_s, 1e-300), 0.0)
        charges = self.rank_seconds * (1 + clock_weight) + memory_weight * self.memory_rank_seconds
        return float(np.where(self.alone_s <= makespan_s, charges, np.inf).min(axis=1) @ self.counts)

    def marginal_rank_s(self, limit_s: float) -> float:
        """Least rank seconds of all rows, fixed times left out, on shapes that run them alone within the limit."""
        return float(np.where(self.alone_s <= limit_s, self.rank_seconds, np.inf).min(axis=1) @ self.counts)


def _raise_bound(works: SequenceOf[_Work], num_ranks: int, memory_weight: float, low_s: float) -> float:
    """The largest bound that this weight proves, or ``low_s`` where that is more. ``low_s`` must be proven, and no less
    than the critical path."""

    def needed_s(makespan_s: float) -> float:
        return sum(work.charge_s(makespan_s, memory_weight) for work in works) / num_ranks

    return _raised(needed_s, low_s)


def _raised(needed_s: Callable[[float], float], low_s: float) -> float:
    """The least C with ``needed_s(C) <= C``, from below, and at least ``low_s``.

    ``needed_s`` falls as C grows. So where needed_s(C) > C, no makespan up to C is possible, and the least possible one
    is at most needed_s(C). Where needed_s(C) <= C, it is at most C and at least needed_s(C).
    """
    high_s = needed_s(low_s)
    if high_s <= low_s:
        return low_s
    trial_s = high_s
    for _ in range(MAX_EVALUATIONS):
        need_s = needed_s(trial_s)
        if need_s > trial_s:
            low_s, high_s = trial_s, min(high_s, need_s)
        else:
            low_s, high_s = max(low_s, need_s), trial_s
        if high_s - low_s <= RELATIVE_WIDTH * high_s:
            break
        trial_s = need_s if low_s < need_s < high_s else (low_s + high_s) / 2
    return low_s


def cheapest_columns(table: PriceTable, makespan_s: float, memory_weight: float = 1.0) -> IntArray:
    """Per sequence the shape with the fewest rank seconds among those that run it within ``makespan_s``; the quickest
    one where none does. Its part of the fixed time is that of the bound."""
    alone_s = _alone_s(table)
    limit_s = np.maximum(makespan_s * (1 + 1e-9), alone_s.min(axis=1))
    allowed = table.fits & (alone_s <= limit_s[:, None])
    shares = memory_weight * table.memory_shares
    if memory_weight < 1:
        spare_s = np.maximum(limit_s[:, None] - table.fixed_s, 1e-300)
        shares = shares + (1 - memory_weight) * np.minimum(table.marginal_s / spare_s, 1.0)
    charges = table.degrees * (table.marginal_s + table.fixed_s * shares)
    columns: IntArray = np.argmin(np.where(allowed, charges, np.inf), axis=1)
    return columns


def _alone_s(table: PriceTable) -> FloatArray:
    times: FloatArray = np.where(table.fits, table.marginal_s + table.fixed_s, np.inf)
    return times
