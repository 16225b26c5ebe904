"""The baseline: one degree for the whole step, given or the best one, as in most training systems.

The ranks are cut into blocks of that degree. Where it does not divide their number, the ranks left over form a smaller
block (degree 3 on 4 ranks: blocks of 3 and 1). Sequences are packed longest first under memory: each goes to the block
where it finishes earliest, and there by best fit into one of the block's microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.errors import SpecError
from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import Found
from planner.pricing.problem import StepProblem
from planner.strategies.greedy import RankBlock, Schedule, as_played, fill_blocks
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
    """``bound_s``: lower bound on the makespan of every layout tried (seconds, ``step_fixed_s`` left out)."""

    schedule: Schedule
    bound_s: float
    note: str


Layout = tuple[GroupShape, ...]  # the shape of each block of ranks, in rank order


def plan_static(problem: StepProblem, degree: int | None = None) -> Found:
    """The strategy ``static``: ``static_schedule`` as a step's answer."""
    result = static_schedule(problem, degree)
    return Found(
        groups=result.schedule.groups, status=SolveStatus.STATIC, bound_s=result.bound_s, note=result.note
    )


def static_schedule(problem: StepProblem, degree: int | None = None) -> StaticResult:
    """The best homogeneous layout: of ``degree`` where it is given, else of FlexSP's degrees.

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
    """The schedule of the quickest layout, the first among equals. None where no layout fits every sequence."""
    results = []
    for layout in layouts:
        distinct = tuple(dict.fromkeys(layout))
        table = price_table(problem.lengths, distinct)
        if not table.fits.any(axis=1).all():
            continue
        first_ranks = np.cumsum([0] + [shape.degree for shape in layout[:-1]])
        blocks = [
            RankBlock(distinct.index(shape), int(first)) for shape, first in zip(layout, first_ranks, strict=True)
        ]
        places = np.arange(len(blocks))
        order = np.lexsort((table.rows, -table.lengths))
        schedule = fill_blocks(table, blocks, [(row, places) for row in order.tolist()], problem.num_ranks)
        schedule = as_played(schedule, problem)
        results.append((schedule, makespan_bound_s(table, problem.num_ranks), describe_shapes(layout)))
    if not results:
        return None
    schedule, _, note = min(results, key=lambda result: result[0].makespan_s)
    return StaticResult(schedule=schedule, bound_s=min(bound_s for _, bound_s, _ in results), note=note)


def possible_degrees(problem: StepProblem) -> tuple[int, ...]:
    """The degrees that ``static_schedule`` accepts for this problem, ascending."""
    priced = sorted({fit.degree for fit in problem.cost.times})
    return tuple(degree for degree in priced if _layouts_of_degree(degree, problem))


def usual_layouts(problem: StepProblem) -> list[Layout]:
    """The layouts of FlexSP's degrees, ascending."""
    degrees = flexsp_degrees(problem.num_ranks)
    return [layout for degree in degrees for layout in _layouts_of_degree(degree, problem)]


def _layouts_of_degree(degree: int, problem: StepProblem) -> list[Layout]:
    """One layout per attention kind. The smaller last block has the same kind where that is possible."""
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
