"""What ``adaptive`` searches over for one step: shapes of groups with memory policies, and the bound that they share.

The bound is that of every shape with every policy. The search is over fewer: policies are left out where memory does
not bind, which the bounds with and without them show, and so are fractions of recomputed tokens that no sequence would
choose at the bound. Short sequences run on single ranks, all under one policy; where two are promising, both are
searched.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.bounds import cheapest_columns, lockstep_bound_s, step_bound_s
from planner.cost import CostModel, PlanLimits
from planner.memory_policy import recompute_fractions, swaps, with_policy
from planner.plan import AttentionKind, Sharding
from planner.shapes import GroupShape, allowed_shapes, group_tokens, price_table, require_fits, shapes_of_degree

MEMORY_BINDS = 5e-3  # of the bound: what policies must promise to be searched
TARGETS = (1.0, 1.25)  # times the bound: where a fraction must be some sequence's choice
MAX_LOCALS = 2
NUM_VOTERS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """``bound_s`` (makespan) holds for all shapes; ``choices``: sets of shapes to search, the most promising first.
    Column 0 of a set is local wherever local is priced, and then its only local shape."""

    bound_s: float
    choices: tuple[tuple[GroupShape, ...], ...]
    has_policies: bool


def search_space(lengths: SequenceOf[int], num_ranks: int, cost: CostModel, limits: PlanLimits) -> SearchSpace:
    """Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none."""
    kept = every_shape(num_ranks, cost, limits)
    fractions = recompute_fractions(cost, limits)
    if len(fractions) == 1 and not swaps(cost, limits):
        _require_fits(lengths, kept, cost, limits)
        return SearchSpace(bound_s=_bound_s(lengths, kept, num_ranks, cost), choices=(kept,), has_policies=False)
    shapes = _worth_it(lengths, every_policy(num_ranks, cost, limits))
    _require_fits(lengths, shapes, cost, limits)
    bound_s = _bound_s(lengths, shapes, num_ranks, cost)
    if not _misfits(lengths, kept) and _bound_s(lengths, kept, num_ranks, cost) <= bound_s * (1 + MEMORY_BINDS):
        return SearchSpace(bound_s=bound_s, choices=(kept,), has_policies=False)
    return SearchSpace(bound_s=bound_s, choices=_choices(lengths, shapes, bound_s), has_policies=True)


def every_shape(num_ranks: int, cost: CostModel, limits: PlanLimits) -> tuple[GroupShape, ...]:
    """All shapes that the cost model prices and the limits allow on so many ranks, degrees ascending, activations kept.

    Raises SpecError where there are none.
    """
    degrees = sorted({fit.degree for fit in cost.times if fit.degree <= num_ranks})
    shapes = tuple(shape for degree in degrees for shape in shapes_of_degree(degree, cost, limits))
    return shapes or allowed_shapes(num_ranks, cost, limits)


def every_policy(num_ranks: int, cost: CostModel, limits: PlanLimits) -> tuple[GroupShape, ...]:
    """``every_shape`` with every memory policy that is searched, degrees ascending."""
    kept = every_shape(num_ranks, cost, limits)
    shapes = [
        shape for fraction in recompute_fractions(cost, limits) for shape in with_policy(kept, fraction, cost, limits)
    ]
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


def _require_fits(
    lengths: SequenceOf[int], shapes: tuple[GroupShape, ...], cost: CostModel, limits: PlanLimits
) -> None:
    if _misfits(lengths, shapes):
        require_fits(price_table(lengths, shapes), cost, limits)  # raises: the message names the sequence's index


def _misfits(lengths: SequenceOf[int], shapes: tuple[GroupShape, ...]) -> bool:
    """Whether some sequence fits none of the shapes. What the first one surely holds is not priced."""
    longer = [length for length in lengths if length > shapes[0].capacity_tokens]
    return bool(longer) and not price_table(longer, shapes).fits.any(axis=1).all()


def _bound_s(lengths: SequenceOf[int], shapes: tuple[GroupShape, ...], num_ranks: int, cost: CostModel) -> float:
    bound = lockstep_bound_s if cost.sharding is Sharding.ZERO3 else step_bound_s
    return bound(lengths, shapes, num_ranks)


def _choices(
    lengths: SequenceOf[int], shapes: tuple[GroupShape, ...], bound_s: float
) -> tuple[tuple[GroupShape, ...], ...]:
    """The shapes with fractions that are the cheapest choice of some sequence (of the longest, and of a sample of the
    others), and one local shape for each that is, those that would get the most tokens first."""
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    sample = np.unique(np.concatenate((ordered[:: -(-len(ordered) // NUM_VOTERS)], ordered[-NUM_VOTERS:])))
    table = price_table(sample, shapes)
    tokens = sample.astype(np.float64)
    chosen = np.zeros(len(shapes))
    for weight in (0.0, 1.0):
        for target in TARGETS:
            np.add.at(chosen, cheapest_columns(table, target * bound_s, weight), tokens)
    fractions = {0.0} | {shape.recompute_fraction for shape, votes in zip(shapes, chosen, strict=True) if votes > 0}
    shared = tuple(shape for shape in shapes if shape.degree > 1 and shape.recompute_fraction in fractions)
    local = [place for place, shape in enumerate(shapes) if shape.kind is AttentionKind.LOCAL]
    if not local:
        return (shared,)
    wanted = sorted((place for place in local if chosen[place] > 0), key=lambda place: -chosen[place])[:MAX_LOCALS]
    sets = [(shapes[place], *shared) for place in wanted or local[:1]]
    possible = [each for each in sets if not _misfits(lengths, each)]
    return tuple(possible) or tuple((shapes[place], *shared) for place in local[-1:])
