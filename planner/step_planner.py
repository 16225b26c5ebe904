"""One step in, one plan out: greedy first, then the strategy improves on it; the result is verified."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.assemble import GroupChoice, assemble_plan
from planner.bounds import makespan_bound_s
from planner.codec import suggest
from planner.cost import CostModel, PlanLimits
from planner.errors import SpecError
from planner.flexsp import flexsp_schedule
from planner.greedy import greedy_schedule
from planner.plan import SolveStatus, StepPlan
from planner.shapes import PriceTable, allowed_shapes, price_table, require_fits
from planner.solver import SolverFailure
from planner.static import best_layout, static_schedule, usual_layouts
from planner.units import format_seconds
from planner.verify import verify_plan

STRATEGIES = ("flexsp", "static")
LATER_STRATEGIES = ("adaptive", "hdp", "megatron", "zeppelin")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A strategy's answer. ``bound_s`` leaves ``step_fixed_s`` out."""

    groups: tuple[GroupChoice, ...]
    status: SolveStatus
    bound_s: float
    note: str


def plan_step(
    lengths: SequenceOf[int], *, step: int, num_ranks: int, cost: CostModel, limits: PlanLimits, strategy: str,
    degree: int | None = None,
) -> StepPlan:
    """Plan one step over sequences of these lengths (tokens) on ``num_ranks`` data ranks.

    ``degree`` belongs to ``static`` only (None: the best one). The same inputs give the same plan, wall times apart,
    unless ``limits.time_limit_s`` cuts the search.

    The report's bound holds for every plan of the group shapes tried, whatever its rounds and order. Status: OPTIMAL
    where the plan is within ``limits.relative_gap`` of that bound, and only there: the rounds' programs may all be
    closed and yet prove nothing about other ways to cut the rounds. Else GREEDY where the list schedule won, LIMIT
    where another plan won and a solver stopped early, FEASIBLE where it won and none did. STATIC always for ``static``.
    The note names the winner.

    Raises SpecError on bad arguments and InfeasibleError where a sequence fits in no group.
    """
    started_s = time.perf_counter()
    check_strategy(strategy, degree)
    _check_lengths(lengths, num_ranks)
    if strategy == "static":
        found = _static(lengths, num_ranks, cost, limits, degree)
    else:
        found = _flexsp(lengths, num_ranks, cost, limits, started_s + limits.time_limit_s)
    return _finish(found, lengths, step, strategy, num_ranks, cost, limits, started_s)


def greedy_step(
    lengths: SequenceOf[int], *, step: int, num_ranks: int, cost: CostModel, limits: PlanLimits
) -> StepPlan:
    """The greedy plan alone, in milliseconds: what runs when the planner is late. Raises as ``plan_step`` does."""
    started_s = time.perf_counter()
    _check_lengths(lengths, num_ranks)
    found = _greedy(_priced(lengths, num_ranks, cost, limits), num_ranks)
    return _finish(found, lengths, step, "greedy", num_ranks, cost, limits, started_s)


def check_strategy(strategy: str, degree: int | None) -> None:
    """Raises SpecError on an unknown or unbuilt strategy, or a degree for a strategy that chooses its own."""
    available = ", ".join(STRATEGIES)
    if strategy in LATER_STRATEGIES:
        raise SpecError(f"strategy {strategy!r} is not built yet; available: {available}")
    if strategy not in STRATEGIES:
        raise SpecError(f"unknown strategy {strategy!r}{suggest(strategy, STRATEGIES)}; available: {available}")
    if degree is not None and strategy != "static":
        raise SpecError(f"strategy {strategy!r} chooses its own degrees: drop --degree or use --strategy static")


def _check_lengths(lengths: SequenceOf[int], num_ranks: int) -> None:
    if num_ranks < 1:
        raise SpecError(f"a plan needs at least 1 rank, got {num_ranks}")
    if not len(lengths):
        raise SpecError("a step needs at least one sequence, got none")
    for index, num_tokens in enumerate(lengths):
        if num_tokens < 1:
            raise SpecError(f"sequence {index} has {num_tokens} tokens; every sequence needs at least 1")


def _priced(lengths: SequenceOf[int], num_ranks: int, cost: CostModel, limits: PlanLimits) -> PriceTable:
    table = price_table(lengths, allowed_shapes(num_ranks, cost, limits))
    require_fits(table, cost, limits)
    return table


def _greedy(table: PriceTable, num_ranks: int) -> _Found:
    schedule = greedy_schedule(table, num_ranks)
    bound_s = makespan_bound_s(table, num_ranks)
    return _Found(groups=schedule.groups, status=SolveStatus.GREEDY, bound_s=bound_s, note="greedy list schedule")


def _flexsp(
    lengths: SequenceOf[int], num_ranks: int, cost: CostModel, limits: PlanLimits, deadline_s: float
) -> _Found:
    """The best of greedy, best static and FlexSP's rounds. Rounds are not searched where greedy is proven good."""
    table = _priced(lengths, num_ranks, cost, limits)
    layouts = usual_layouts(num_ranks, cost, limits)
    shapes = dict.fromkeys((*table.shapes, *(shape for layout in layouts for shape in layout)))
    bound_s = makespan_bound_s(price_table(lengths, tuple(shapes)), num_ranks)  # static's last block may be odd
    best, winner = greedy_schedule(table, num_ranks), "greedy"
    notes, hit_limit = [], False
    if not _proven(best.makespan_s, bound_s, cost, limits):
        homogeneous = best_layout(lengths, layouts, num_ranks)
        if homogeneous is not None and homogeneous.schedule.makespan_s < best.makespan_s:
            best, winner = homogeneous.schedule, f"static ({homogeneous.note})"
        try:
            result = flexsp_schedule(
                table, num_ranks=num_ranks, max_local_tokens=cost.max_local_tokens(limits.device_budget_bytes),
                limits=limits, incumbent_s=best.makespan_s, deadline_s=deadline_s,
            )
        except SolverFailure as error:
            result = None
            notes.append(f"solver failed: {error}")
        if result is not None:
            hit_limit = result.hit_limit
            notes.append(
                f"flexsp {result.num_rounds} rounds, sum of makespans {format_seconds(result.makespans_s)}, "
                f"{result.num_programs} programs"
            )
            if result.schedule.makespan_s < best.makespan_s:
                best, winner = result.schedule, "flexsp"
    status = SolveStatus.GREEDY
    if _proven(best.makespan_s, bound_s, cost, limits):
        status = SolveStatus.OPTIMAL
    elif winner != "greedy":
        status = SolveStatus.LIMIT if hit_limit else SolveStatus.FEASIBLE
    return _Found(groups=best.groups, status=status, bound_s=bound_s, note="; ".join([f"{winner} plan", *notes]))


def _proven(makespan_s: float, bound_s: float, cost: CostModel, limits: PlanLimits) -> bool:
    """Within the relative gap of what no plan can beat, as shares of the whole step."""
    step_s = makespan_s + cost.step_fixed_s
    return makespan_s - bound_s <= limits.relative_gap * step_s


def _static(
    lengths: SequenceOf[int], num_ranks: int, cost: CostModel, limits: PlanLimits, degree: int | None
) -> _Found:
    result = static_schedule(lengths, num_ranks=num_ranks, cost=cost, limits=limits, degree=degree)
    return _Found(
        groups=result.schedule.groups, status=SolveStatus.STATIC, bound_s=result.bound_s, note=result.note
    )


def _finish(
    found: _Found, lengths: SequenceOf[int], step: int, strategy: str, num_ranks: int, cost: CostModel,
    limits: PlanLimits, started_s: float,
) -> StepPlan:
    plan = assemble_plan(
        step=step, strategy=strategy, num_ranks=num_ranks, lengths=lengths, groups=found.groups, cost=cost,
        status=found.status, bound_s=found.bound_s + cost.step_fixed_s, wall_s=time.perf_counter() - started_s,
        note=found.note,
    )
    verify_plan(plan, lengths, num_ranks=num_ranks, cost=cost, limits=limits)
    return plan
