"""The baseline: one degree for the whole step, given or the best. What most training systems do by hand.

The ranks are cut into blocks of the degree; where it does not divide their number, the ranks left over form one more,
smaller block (degree 3 on 4 ranks: blocks of 3 and 1). Sequences are packed longest first under memory, each into the
block where it finishes earliest, best fit among that block's microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.bounds import makespan_bound_s
from planner.cost import CostModel, PlanLimits
from planner.errors import SpecError
from planner.greedy import Lane, Schedule, fill_lanes
from planner.plan import AttentionKind
from planner.shapes import GroupShape, describe_shapes, price_table, require_fits, shapes_of_degree


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticResult:
    """``bound_s``: lower bound on the makespan (seconds, ``step_fixed_s`` not included) of every layout tried."""

    schedule: Schedule
    bound_s: float
    note: str


def static_schedule(
    lengths: SequenceOf[int], *, num_ranks: int, cost: CostModel, limits: PlanLimits, degree: int | None = None
) -> StaticResult:
    """Best homogeneous layout: of ``degree`` where it is given, else of every degree that is possible.

    Raises SpecError on an impossible degree, InfeasibleError where a sequence fits none of the layouts.
    """
    layouts = _layouts(num_ranks, cost, limits, degree)
    results = []
    for layout in layouts:
        distinct = tuple(dict.fromkeys(layout))
        table = price_table(lengths, distinct)
        if not table.fits.any(axis=1).all():
            continue
        first_ranks = np.cumsum([0] + [shape.degree for shape in layout[:-1]])
        lanes = [Lane(distinct.index(shape), int(first)) for shape, first in zip(layout, first_ranks, strict=True)]
        places = np.arange(len(lanes))
        order = np.lexsort((table.rows, -table.lengths))
        schedule = fill_lanes(table, lanes, [(row, places) for row in order.tolist()], num_ranks)
        results.append((schedule, makespan_bound_s(table, num_ranks), describe_shapes(layout)))
    if not results:
        shapes = tuple(dict.fromkeys(shape for layout in layouts for shape in layout))
        require_fits(price_table(lengths, shapes), cost, limits)
        raise SpecError("no single degree fits every sequence: use --strategy flexsp")
    schedule, _, note = min(results, key=lambda result: result[0].makespan_s)
    return StaticResult(schedule=schedule, bound_s=min(bound_s for _, bound_s, _ in results), note=note)


def possible_degrees(num_ranks: int, cost: CostModel, limits: PlanLimits) -> tuple[int, ...]:
    """The degrees ``static_schedule`` takes here, ascending."""
    priced = sorted({fit.degree for fit in cost.times if fit.degree <= num_ranks})
    return tuple(degree for degree in priced if _layouts_of_degree(degree, num_ranks, cost, limits))


def _layouts(
    num_ranks: int, cost: CostModel, limits: PlanLimits, degree: int | None
) -> list[tuple[GroupShape, ...]]:
    possible = possible_degrees(num_ranks, cost, limits)
    if degree is not None and degree not in possible:
        known = ", ".join(map(str, possible)) or "none"
        raise SpecError(
            f"degree {degree} is not possible on {num_ranks} ranks with attention {_kinds_text(limits)} "
            f"(possible: {known}): {_refusal(degree, num_ranks, limits)}"
        )
    chosen = possible if degree is None else (degree,)
    layouts = [layout for each in chosen for layout in _layouts_of_degree(each, num_ranks, cost, limits)]
    if not layouts:
        raise SpecError(
            f"the cost model prices no degree that is allowed on {num_ranks} ranks with attention "
            f"{_kinds_text(limits)}: calibrate again for this number of ranks"
        )
    return layouts


def _layouts_of_degree(
    degree: int, num_ranks: int, cost: CostModel, limits: PlanLimits
) -> list[tuple[GroupShape, ...]]:
    """One layout (shape of each block, in rank order) per kind; the smaller last block keeps the kind if it can."""
    if not 1 <= degree <= num_ranks:
        return []
    num_blocks, rest = divmod(num_ranks, degree)
    layouts = []
    for shape in shapes_of_degree(degree, cost, limits):
        ends = shapes_of_degree(rest, cost, limits) if rest else ()
        if rest and not ends:
            continue
        end = next((candidate for candidate in ends if candidate.kind is shape.kind), ends[0]) if rest else None
        layouts.append((shape,) * num_blocks + ((end,) if end is not None else ()))
    return layouts


def _kinds_text(limits: PlanLimits) -> str:
    return " or ".join(limits.kinds) or "local"


def _refusal(degree: int, num_ranks: int, limits: PlanLimits) -> str:
    if degree < 1:
        return "a degree is at least 1"
    if degree > num_ranks:
        return "a group cannot have more ranks than there are"
    if AttentionKind.RING not in limits.kinds and degree > limits.max_ulysses_degree:
        return f"ulysses needs a query head per rank, at most degree {limits.max_ulysses_degree}"
    return "the cost model does not price it (or the ranks left over), calibrate with this degree"
