"""What ``adaptive`` searches over for one step: shapes of groups with memory policies, and the bound that they share.

The bound is that of every shape with every policy. The search is over fewer: policies are left out where memory does
not bind, which the bounds with and without them show, and so are fractions of recomputed tokens and sizes of chunks
that no sequence would choose at the bound. Short sequences run on single ranks, all under one policy; where two are
promising, both are searched. Chunks come last, and only on top: where the bound shows that they may gain, what is found
without them is searched as if there were none, so they never make a plan worse.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.cost.chunk_fit import moves_queries
from planner.plan import AttentionKind, Sharding
from planner.pricing.problem import StepProblem
from planner.strategies.search.bounds import cheapest_columns, least_rounds, lockstep_bound_s, step_bound_s
from planner.strategies.search.chunk_shapes import chunks_worth_it
from planner.strategies.search.memory_policy import recompute_fractions, swaps, with_every_policy, with_policy
from planner.strategies.search.shapes import (
    GroupShape,
    allowed_shapes,
    group_tokens,
    price_table,
    require_fits,
    shapes_of_degree,
)

MEMORY_BINDS = 5e-3  # of the bound: what policies must promise to be searched
TARGETS = (1.0, 1.25)  # times the bound: where a fraction must be some sequence's choice
MAX_LOCALS = 2
NUM_VOTERS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A set of shapes to search. Column 0 is local wherever local is priced, and then the only local shape. ``aim_s``:
    a bound (makespan) of plans of such shapes, to begin at; ``in_chunks``: with shapes that run in chunks."""

    shapes: tuple[GroupShape, ...]
    aim_s: float
    in_chunks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """``bound_s`` (makespan) holds for all shapes; ``choices``: the most promising first, those in chunks last."""

    bound_s: float
    choices: tuple[Choice, ...]
    has_policies: bool


def search_space(problem: StepProblem) -> SearchSpace:
    """Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none."""
    lengths, cost, limits = problem.lengths, problem.cost, problem.limits
    kept = every_shape(problem)
    whole = kept
    if len(recompute_fractions(cost, limits)) > 1 or swaps(cost, limits):
        whole = _worth_it(lengths, every_whole_policy(problem))
    chunks = chunks_worth_it(lengths, kept, whole, cost, limits)
    shapes = _by_degree(whole + chunks) if chunks else whole
    _require_fits(shapes, problem)
    num_rounds = _num_rounds(shapes, problem)
    bound_s = _bound_s(shapes, problem, num_rounds)
    choices: tuple[Choice, ...] = ()
    has_policies = False
    if not chunks or not _misfits(lengths, whole):
        aim_s = bound_s
        if chunks:
            aim_s = _bound_s(whole, problem, _num_rounds(whole, problem.without_chunks()))
        choices, has_policies = _whole_choices(kept, whole, aim_s, problem)
        if not chunks or aim_s <= bound_s * (1 + MEMORY_BINDS):
            return SearchSpace(bound_s=bound_s, choices=choices, has_policies=has_policies)
    beside = _by_degree(_beside_chunks(kept) + chunks) if cost.sharding is Sharding.ZERO3 else shapes
    mixed = _choices(lengths, beside, bound_s)
    choices += tuple(
        Choice(shapes=each, aim_s=bound_s, in_chunks=True) for each in mixed
        if any(shape.chunk_tokens for shape in each) and not _misfits(lengths, each)
    )
    if not choices:  # each fits somewhere, but not all in what is searched at once: say which one does not
        _require_fits(mixed[-1], problem)
    return SearchSpace(bound_s=bound_s, choices=choices, has_policies=True)


def _beside_chunks(kept: tuple[GroupShape, ...]) -> tuple[GroupShape, ...]:
    """In lockstep, of what runs whole in a round with chunks: no swapping or recomputing, nor groups that would take
    the room of moving queries (a whole microbatch is then one chunk)."""
    return tuple(shape for shape in kept if not moves_queries(shape.kind, shape.degree))


def _whole_choices(
    kept: tuple[GroupShape, ...], whole: tuple[GroupShape, ...], bound_s: float, problem: StepProblem
) -> tuple[tuple[Choice, ...], bool]:
    """What is searched without chunks, under the bound of that, and whether anything but keeping is among it."""
    if whole is kept:
        return (Choice(shapes=kept, aim_s=bound_s),), False
    if not _misfits(problem.lengths, kept) and _bound_s(kept, problem) <= bound_s * (1 + MEMORY_BINDS):
        return (Choice(shapes=kept, aim_s=bound_s),), False
    return tuple(Choice(shapes=each, aim_s=bound_s) for each in _choices(problem.lengths, whole, bound_s)), True


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


def every_whole_policy(problem: StepProblem) -> tuple[GroupShape, ...]:
    """``every_policy`` without chunks."""
    kept, cost, limits = every_shape(problem), problem.cost, problem.limits
    return _by_degree(
        shape for fraction in recompute_fractions(cost, limits) for shape in with_policy(kept, fraction, cost, limits)
    )


def _by_degree(shapes: Iterable[GroupShape]) -> tuple[GroupShape, ...]:
    return tuple(sorted(shapes, key=lambda shape: shape.degree))


def _worth_it(lengths: SequenceOf[int], shapes: tuple[GroupShape, ...]) -> tuple[GroupShape, ...]:
    """Without the shapes that recompute where no plan gains by it, so the bound is still that of all shapes.

    Recomputing adds seconds per token, and the most that a token saves is its memory's share of the fixed time. Where
    it adds more than that, and all sequences that could run there can without, each of them is charged less without,
    however fixed times are shared out.
    """
    least = {(shape.kind, shape.degree): shape for shape in shapes if shape.recompute_fraction == 0}
    longer = np.unique(np.array([length for length in lengths if length > shapes[0].capacity_tokens], dtype=np.int64))
    table = price_table(longer, tuple(least.values()))
    all_fit = {place: bool(table.fits[:, column].all()) for column, place in enumerate(least)}

    def pays(shape: GroupShape) -> bool:
        place = (shape.kind, shape.degree)
        without = least[place]
        saved = shape.fit.fixed_s * (without.held.at_zero - shape.held.least) / max(group_tokens(shape), 1)
        return not all_fit[place] or shape.fit.s_per_token - without.fit.s_per_token < saved

    return tuple(shape for shape in shapes if shape.recompute_fraction == 0 or pays(shape))


def _require_fits(shapes: tuple[GroupShape, ...], problem: StepProblem) -> None:
    if _misfits(problem.lengths, shapes):
        require_fits(price_table(problem.lengths, shapes), problem)  # raises: the message names the sequence's index


def _misfits(lengths: SequenceOf[int], shapes: tuple[GroupShape, ...]) -> bool:
    """Whether some sequence fits none of the shapes. What the first one surely holds is not priced."""
    longer = [length for length in lengths if length > shapes[0].capacity_tokens]
    return bool(longer) and not price_table(longer, shapes).fits.any(axis=1).all()


def _num_rounds(shapes: tuple[GroupShape, ...], problem: StepProblem) -> int | None:
    """The least rounds of any plan in lockstep, None where there are none: shapes that cost more than they save are
    left out of ``shapes``, and yet one round less may be theirs."""
    if problem.cost.sharding is not Sharding.ZERO3:
        return None
    num_rounds = least_rounds(problem.lengths, shapes, problem.num_ranks)
    if num_rounds == 1 or problem.keeps_all:
        return num_rounds
    return least_rounds(problem.lengths, every_policy(problem), problem.num_ranks)


def _bound_s(shapes: tuple[GroupShape, ...], problem: StepProblem, num_rounds: int | None = None) -> float:
    if problem.cost.sharding is Sharding.ZERO3:
        return lockstep_bound_s(problem.lengths, shapes, problem.num_ranks, num_rounds)
    return step_bound_s(problem.lengths, shapes, problem.num_ranks)


def _choices(
    lengths: SequenceOf[int], shapes: tuple[GroupShape, ...], bound_s: float
) -> tuple[tuple[GroupShape, ...], ...]:
    """The shapes with policies that are the cheapest choice of some sequence (of the longest, and of a sample of the
    others), and one local shape for each that is, those that would get the most tokens first."""
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    sample = np.unique(np.concatenate((ordered[:: -(-len(ordered) // NUM_VOTERS)], ordered[-NUM_VOTERS:])))
    table = price_table(sample, shapes)
    tokens = sample.astype(np.float64)
    chosen = np.zeros(len(shapes))
    for weight in (0.0, 1.0):
        for target in TARGETS:
            np.add.at(chosen, cheapest_columns(table, target * bound_s, weight), tokens)
    policies = {(0.0, 0)} | {shape.policy for shape, votes in zip(shapes, chosen, strict=True) if votes > 0}
    shared = tuple(shape for shape in shapes if shape.degree > 1 and shape.policy in policies)
    local = [place for place, shape in enumerate(shapes) if shape.kind is AttentionKind.LOCAL]
    if not local:
        return (shared,)
    wanted = sorted((place for place in local if chosen[place] > 0), key=lambda place: -chosen[place])[:MAX_LOCALS]
    sets = [(shapes[place], *shared) for place in wanted or local[:1]]
    possible = [each for each in sets if not _misfits(lengths, each)]
    return tuple(possible) or tuple((shapes[place], *shared) for place in local[-1:])
