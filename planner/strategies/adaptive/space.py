"""What ``adaptive`` searches over for one step: shapes of groups with memory policies, and the bound that they share.

The bound is that of every shape with every policy. The search is over fewer: policies are left out where memory does
not bind, which the bounds with and without them show, and so are those that no sequence would choose at the bound.
Short sequences run on single ranks, all under one policy; where two are promising, both are searched. Chunks come last,
and only on top: where the bound shows that they may gain, what is found without them is searched as if there were none,
so they never make a plan worse.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.cost.chunk_fit import moves_queries
from planner.plan import AttentionKind, Sharding
from planner.pricing.problem import StepProblem
from planner.strategies.adaptive.effort import MAX_LOCALS, NUM_VOTERS
from planner.strategies.search.bounds import cheapest_columns, dominates, least_rounds, lockstep_bound_s, step_bound_s
from planner.strategies.search.chunk_shapes import chunk_sizes, chunked_shapes
from planner.strategies.search.memory_policy import recompute_fractions, with_every_policy, with_policy
from planner.strategies.search.shapes import (
    BoolArray,
    GroupShape,
    HeldShare,
    allowed_shapes,
    price_table,
    require_fits,
    shapes_of_degree,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A set of shapes to search. Column 0 is local wherever local is priced, and then the only local shape.
    ``bound_s``: of plans of such shapes (makespan); ``in_chunks``: some of them run in chunks."""

    shapes: tuple[GroupShape, ...]
    bound_s: float
    in_chunks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """``bound_s`` (makespan) holds for all plans, which may use ``shapes`` or shapes that are never better.
    ``choices``: the most promising first, those in chunks last."""

    bound_s: float
    shapes: tuple[GroupShape, ...]
    choices: tuple[Choice, ...]


def search_space(problem: StepProblem) -> SearchSpace:
    """Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none."""
    kept = every_shape(problem)
    shapes = _worthwhile(problem, kept)
    whole = _whole(shapes)
    _require_fits(shapes, problem)
    bound_s = whole_s = _bound_s(shapes, problem)
    if len(whole) < len(shapes):
        whole_s = _bound_s(whole, problem.without_chunks())
    choices: list[Choice] = []
    if whole_s < np.inf:
        keeps = whole == kept or _bound_s(kept, problem) <= whole_s
        sets = _chosen(kept if keeps else whole, whole_s, problem)
        choices = [Choice(shapes=each, bound_s=whole_s) for each in sets]
    if whole_s > bound_s:
        sets = _chosen(_beside_chunks(shapes, problem), bound_s, problem)
        choices += [
            Choice(shapes=each, bound_s=bound_s, in_chunks=True) for each in sets
            if len(_whole(each)) < len(each) and not _misfits(each, problem)
        ]
        if not choices:  # each sequence fits somewhere, but not all in what is searched at once: say which one does not
            _require_fits(sets[-1], problem)
    return SearchSpace(bound_s=bound_s, shapes=shapes, choices=tuple(choices))


def _whole(shapes: Iterable[GroupShape]) -> tuple[GroupShape, ...]:
    return tuple(shape for shape in shapes if not shape.chunk_tokens)


def _beside_chunks(shapes: tuple[GroupShape, ...], problem: StepProblem) -> tuple[GroupShape, ...]:
    """In lockstep, of what runs whole in a round with chunks: no swapping or recomputing, nor groups that would take
    the room of moving queries (a whole microbatch is then one chunk)."""
    if problem.cost.sharding is not Sharding.ZERO3:
        return shapes
    kept = (shape for shape in every_shape(problem) if not moves_queries(shape.kind, shape.degree))
    return _by_degree((*kept, *(shape for shape in shapes if shape.chunk_tokens)))


def every_shape(problem: StepProblem) -> tuple[GroupShape, ...]:
    """All shapes that the cost model prices and the limits allow on so many ranks, degrees ascending, activations kept.

    Raises SpecError where there are none.
    """
    cost, limits = problem.cost, problem.limits
    degrees = sorted({fit.degree for fit in cost.times if fit.degree <= problem.num_ranks})
    shapes = tuple(shape for degree in degrees for shape in shapes_of_degree(degree, cost, limits))
    return shapes or allowed_shapes(problem)


def every_policy(problem: StepProblem) -> tuple[GroupShape, ...]:
    """``every_shape`` with every memory policy that is searched, degrees ascending."""
    return _by_degree(with_every_policy(every_shape(problem), problem.cost, problem.limits))


def _by_degree(shapes: Iterable[GroupShape]) -> tuple[GroupShape, ...]:
    return tuple(sorted(shapes, key=lambda shape: shape.degree))


def _worthwhile(problem: StepProblem, kept: tuple[GroupShape, ...]) -> tuple[GroupShape, ...]:
    """``every_policy`` without what a milder policy of the same kind and degree dominates that takes every sequence
    which fits here: no plan gains by those, so a bound over all shapes stays the same."""
    cost, limits = problem.cost, problem.limits
    lengths = np.unique(np.array(problem.lengths, dtype=np.int64))
    found: dict[tuple[AttentionKind, int], list[tuple[GroupShape, BoolArray]]] = {}

    def is_beaten(shape: GroupShape, fits: BoolArray) -> bool:
        milder = found.get((shape.kind, shape.degree), ())
        return any(dominates(other, shape) and (held | ~fits).all() for other, held in milder)

    def add(shapes: SequenceOf[GroupShape]) -> None:
        for shape, fits in zip(shapes, price_table(lengths, shapes).fits.T if shapes else (), strict=True):
            if not is_beaten(shape, fits):
                found.setdefault((shape.kind, shape.degree), []).append((shape, fits))

    for fraction in recompute_fractions(cost, limits):
        add(with_policy(kept, fraction, cost, limits))
    if cost.chunks is not None and chunk_sizes(cost, limits):  # nearly always none: even the best would be beaten
        none_held, all_fit = HeldShare(at_zero=0.0, least=0.0), np.ones(len(lengths), dtype=np.bool_)
        best = [replace(each.fit, s_per_token=cost.chunks.least_s_per_token(each.fit)) for each in kept]
        add(chunked_shapes([
            shape for shape, fit in zip(kept, best, strict=True)
            if not is_beaten(replace(shape, fit=fit, held=none_held), all_fit)
        ], cost, limits))
    return _by_degree(shape for place in found.values() for shape, _ in place)


def _require_fits(shapes: tuple[GroupShape, ...], problem: StepProblem) -> None:
    if _misfits(shapes, problem):
        require_fits(price_table(problem.lengths, shapes), problem)  # raises: the message names the sequence's index


def _misfits(shapes: tuple[GroupShape, ...], problem: StepProblem) -> bool:
    """Whether some sequence fits none of the shapes. What the first one surely holds is not priced."""
    longer = [length for length in problem.lengths if length > shapes[0].capacity_tokens]
    return bool(longer) and not price_table(longer, shapes).fits.any(axis=1).all()


def _bound_s(shapes: tuple[GroupShape, ...], problem: StepProblem) -> float:
    """Infinite where some sequence fits none of the shapes. In lockstep the rounds are counted over every policy that
    the problem allows: shapes that cost more than they save are left out here, and yet one round less may be theirs."""
    if _misfits(shapes, problem):
        return np.inf
    if problem.cost.sharding is not Sharding.ZERO3:
        return step_bound_s(problem.lengths, shapes, problem.num_ranks)
    num_rounds = least_rounds(problem.lengths, shapes, problem.num_ranks)
    if num_rounds > 1 and not problem.keeps_all:
        num_rounds = least_rounds(problem.lengths, every_policy(problem), problem.num_ranks)
    return lockstep_bound_s(problem.lengths, shapes, problem.num_ranks, num_rounds)


def _chosen(shapes: tuple[GroupShape, ...], bound_s: float, problem: StepProblem) -> list[tuple[GroupShape, ...]]:
    """The shapes that are, for some sequence, both cheaper than every quicker one and quicker than every cheaper one
    (asked are the longest and a sample of the others), and one local shape for each that is the cheapest at the bound,
    those that would get the most tokens first."""
    ordered = np.sort(np.asarray(problem.lengths, dtype=np.int64))
    sample = np.unique(np.concatenate((ordered[:: -(-len(ordered) // NUM_VOTERS)], ordered[-NUM_VOTERS:])))
    table = price_table(sample, shapes)
    alone_s = np.where(table.fits, table.marginal_s + table.fixed_s, np.inf)
    charges = np.where(table.fits, table.degrees * (table.marginal_s + table.fixed_s * table.memory_shares), np.inf)
    order = np.argsort(charges, axis=1, kind="stable")
    ranked_s = np.take_along_axis(alone_s, order, axis=1)
    quicker = np.ones(ranked_s.shape, dtype=np.bool_)
    quicker[:, 1:] = ranked_s[:, 1:] < np.minimum.accumulate(ranked_s, axis=1)[:, :-1]
    worth = set(order[quicker & np.isfinite(ranked_s)].tolist())
    shared = tuple(shape for place, shape in enumerate(shapes) if shape.degree > 1 and place in worth)
    local = [place for place, shape in enumerate(shapes) if shape.kind is AttentionKind.LOCAL]
    if not local:
        return [shared]
    votes = np.zeros(len(shapes))
    for weight in (0.0, 1.0):
        np.add.at(votes, cheapest_columns(table, bound_s, weight), sample.astype(np.float64))
    wanted = sorted((place for place in local if votes[place] > 0), key=lambda place: -votes[place])[:MAX_LOCALS]
    sets = [(shapes[place], *shared) for place in wanted or local[:1]]
    return [each for each in sets if not _misfits(each, problem)] or [(shapes[local[-1]], *shared)]
