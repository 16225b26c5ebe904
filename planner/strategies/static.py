"""The baseline: one degree for the whole step, given or the best. What most training systems do by hand.

The ranks are cut into blocks of the degree; where it does not divide their number, the ranks left over form one more,
smaller block (degree 3 on 4 ranks: blocks of 3 and 1). Sequences are packed longest first under memory, each into the
block where it finishes earliest, best fit among that block's microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.errors import SpecError
from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import Found
from planner.pricing.problem import StepProblem
from planner.strategies.greedy import Lane, Schedule, as_played, fill_lanes
from planner.strategies.search.bounds import makespan_bound_s
from planner.strategies.search.shapes import (
    GroupShape,
    describe_shapes,
    flexsp_degrees,
    price_table,
    require_fits,
    shapes_of_degree,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticResult:
    """``bound_s``: lower bound on the makespan (seconds, ``step_fixed_s`` not included) of every layout tried."""

    schedule: Schedule
    bound_s: float
    note: str


Layout = tuple[GroupShape, ...]  # the shape of each block, in rank order


def plan_static(problem: StepProblem, degree: int | None = None) -> Found:
    """The strategy ``static``: ``static_schedule`` as a step's answer."""
    result = static_schedule(problem, degree)
    return Found(
        groups=result.schedule.groups, status=SolveStatus.STATIC, bound_s=result.bound_s, note=result.note
    )


def static_schedule(problem: StepProblem, degree: int | None = None) -> StaticResult:
    """Best homogeneous layout: of ``degree`` where it is given, else of FlexSP's degrees.

    Raises SpecError on an impossible degree, InfeasibleError where a sequence fits none of the layouts.
    """
    layouts = usual_layouts(problem) if degree is None else _layouts_of_degree(degree, problem)
    if not layouts:
        raise SpecError(_refusal(degree, problem))
    best = best_layout(problem, layouts)
    if best is None:
        shapes = tuple(dict.fromkeys(shape for layout in layouts for shape in layout))
        require_fits(price_table(problem.lengths, shapes), problem)
        raise SpecError("no single degree fits every sequence of this step: use --strategy flexsp")
    return best


def best_layout(problem: StepProblem, layouts: SequenceOf[Layout]) -> StaticResult | None:
    """The quickest of these layouts, the first among equals; None where none fits every sequence."""
    results = []
    for layout in layouts:
        distinct = tuple(dict.fromkeys(layout))
        table = price_table(problem.lengths, distinct)
        if not table.fits.any(axis=1).all():
            continue
        first_ranks = np.cumsum([0] + [shape.degree for shape in layout[:-1]])
        lanes = [Lane(distinct.index(shape), int(first)) for shape, first in zip(layout, first_ranks, strict=True)]
        places = np.arange(len(lanes))
        order = np.lexsort((table.rows, -table.lengths))
        schedule = fill_lanes(table, lanes, [(row, places) for row in order.tolist()], problem.num_ranks)
        schedule = as_played(schedule, problem)
        results.append((schedule, makespan_bound_s(table, problem.num_ranks), describe_shapes(layout)))
    if not results:
        return None
    schedule, _, note = min(results, key=lambda result: result[0].makespan_s)
    return StaticResult(schedule=schedule, bound_s=min(bound_s for _, bound_s, _ in results), note=note)


def possible_degrees(problem: StepProblem) -> tuple[int, ...]:
    """The degrees ``static_schedule`` takes here, ascending."""
    priced = sorted({fit.degree for fit in problem.cost.times})
    return tuple(degree for degree in priced if _layouts_of_degree(degree, problem))


def every_layout(problem: StepProblem) -> list[Layout]:
    """The layouts of all degrees that ``static_schedule`` takes here, ascending."""
    degrees = sorted({fit.degree for fit in problem.cost.times})
    return [layout for degree in degrees for layout in _layouts_of_degree(degree, problem)]


def usual_layouts(problem: StepProblem) -> list[Layout]:
    """The layouts of FlexSP's degrees, ascending."""
    degrees = flexsp_degrees(problem.num_ranks)
    return [layout for degree in degrees for layout in _layouts_of_degree(degree, problem)]


def _layouts_of_degree(degree: int, problem: StepProblem) -> list[Layout]:
    """One layout per kind; the smaller last block keeps the kind if it can."""
    num_ranks, cost, limits = problem.num_ranks, problem.cost, problem.limits
    if not 1 <= degree <= num_ranks:
        return []
    num_blocks, rest = divmod(num_ranks, degree)
    layouts = []
    for shape in shapes_of_degree(degree, cost, limits):
        ends = shapes_of_degree(rest, cost, limits) if rest else ()
        if rest and not ends:
            continue
        same_kind = tuple(end for end in ends if end.kind is shape.kind)
        layouts.append((shape,) * num_blocks + (same_kind or ends)[:1])
    return layouts


def _refusal(degree: int | None, problem: StepProblem) -> str:
    num_ranks, limits = problem.num_ranks, problem.limits
    kinds = " or ".join(limits.kinds) or "local"
    if degree is None:
        return (
            f"the cost model prices no degree that is allowed on {num_ranks} ranks with attention {kinds}: "
            "calibrate again for this number of ranks"
        )
    if degree < 1:
        reason = "a degree is at least 1"
    elif degree > num_ranks:
        reason = "a group cannot have more ranks than there are"
    elif set(limits.kinds) <= {AttentionKind.ULYSSES} and degree > limits.max_ulysses_degree:
        reason = f"ulysses needs a query head per rank, so at most degree {limits.max_ulysses_degree}"
    else:
        reason = "the cost model prices no such group, or none for the ranks left over: calibrate with this degree"
    known = ", ".join(map(str, possible_degrees(problem))) or "none"
    return f"degree {degree} is not possible on {num_ranks} ranks with attention {kinds}: {reason} (possible: {known})"
