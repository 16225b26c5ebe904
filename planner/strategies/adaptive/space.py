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
from dataclasses import dataclass

import numpy as np

from planner.cost.chunk_fit import moves_queries
from planner.plan import AttentionKind, Sharding
from planner.pricing.problem import StepProblem
from planner.strategies.adaptive.effort import MAX_LOCALS, NUM_VOTERS
from planner.strategies.search.bounds import cheapest_columns, least_rounds, lockstep_bound_s, step_bound_s
from planner.strategies.search.chunk_shapes import chunk_sizes, chunked_shapes
from planner.strategies.search.memory_policy import recompute_fractions, with_every_policy, with_policy
from planner.strategies.search.shapes import (
    BoolArray,
    GroupShape,
    allowed_shapes,
    group_tokens,
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
        sets = [kept] if keeps else _chosen(whole, whole_s, problem)
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


class _Known:
    """A shape, which of the long sequences fit it, whether all others surely do, and what it charges for a token."""

    def __init__(self, shape: GroupShape, fits: BoolArray, short_tokens: int) -> None:
        most = (short_tokens / shape.num_teams + 2) * shape.held.at_zero + 1  # a zigzag's remainder, rounding
        self.takes_short = shape.chunk_tokens == 0 or most <= shape.capacity_tokens
        self.shape, self.fits = shape, fits
        memory_s = shape.fit.fixed_s / max(group_tokens(shape), 1)
        self.most_s_per_token = shape.fit.s_per_token + memory_s * shape.held.at_zero
        self.least_s_per_token = shape.fit.s_per_token + memory_s * shape.held.least

    def beats(self, other: _Known) -> bool:
        here, there = self.shape.fit, other.shape.fit
        return (
            self.takes_short
            and self.most_s_per_token <= other.least_s_per_token
            and here.adds_at_most(there)
            and here.fixed_s <= there.fixed_s
            and bool((self.fits | ~other.fits).all())
        )


def _worthwhile(problem: StepProblem, kept: tuple[GroupShape, ...]) -> tuple[GroupShape, ...]:
    """``every_policy`` without the shapes that no plan gains by, so a bound over all shapes stays the same.

    A milder policy of the same kind and degree that takes every sequence which fits here is charged no more for any,
    however fixed times are shared out, where it is no dearer per token, both without memory's share of its fixed time
    and with the most of that against the least here (``planner.strategies.search.bounds``).
    """
    cost, limits = problem.cost, problem.limits
    lengths = np.unique(np.array(problem.lengths, dtype=np.int64))
    is_long = lengths > kept[0].capacity_tokens  # local holds all others in full
    short = int(lengths[~is_long].max(initial=0))
    known: dict[tuple[AttentionKind, int], list[_Known]] = {}

    def add(shapes: SequenceOf[GroupShape]) -> None:
        fits = price_table(lengths[is_long], shapes).fits if shapes else np.empty((0, 0), dtype=np.bool_)
        for column, shape in enumerate(shapes):
            new, others = _Known(shape, fits[:, column], short), known.setdefault((shape.kind, shape.degree), [])
            if not any(other.beats(new) for other in others):
                others.append(new)

    for fraction in recompute_fractions(cost, limits):
        add(with_policy(kept, fraction, cost, limits))
    if cost.chunks is not None and chunk_sizes(cost, limits):
        least_s = {(shape.kind, shape.degree): cost.chunks.least_s_per_token(shape.fit) for shape in kept}
        add(chunked_shapes([  # nearly always none: no chunk of any size could be cheaper
            shape for shape in kept
            if not any(
                each.fits.all() and each.most_s_per_token <= least_s[shape.kind, shape.degree]
                for each in known[shape.kind, shape.degree]
            )
        ], cost, limits))
    return _by_degree(each.shape for place in known.values() for each in place)


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
    """The shapes with policies that are the cheapest choice of some sequence (of the longest, and of a sample of the
    others), and one local shape for each that is, those that would get the most tokens first."""
    ordered = np.sort(np.asarray(problem.lengths, dtype=np.int64))
    sample = np.unique(np.concatenate((ordered[:: -(-len(ordered) // NUM_VOTERS)], ordered[-NUM_VOTERS:])))
    table = price_table(sample, shapes)
    chosen = np.zeros(len(shapes))
    for weight in (0.0, 1.0):
        np.add.at(chosen, cheapest_columns(table, bound_s, weight), sample.astype(np.float64))
    policies = {(0.0, 0)} | {shape.policy for shape, votes in zip(shapes, chosen, strict=True) if votes > 0}
    shared = tuple(shape for shape in shapes if shape.degree > 1 and shape.policy in policies)
    local = [place for place, shape in enumerate(shapes) if shape.kind is AttentionKind.LOCAL]
    if not local:
        return [shared]
    wanted = sorted((place for place in local if chosen[place] > 0), key=lambda place: -chosen[place])[:MAX_LOCALS]
    sets = [(shapes[place], *shared) for place in wanted or local[:1]]
    return [each for each in sets if not _misfits(each, problem)] or [(shapes[local[-1]], *shared)]
