"""The published strategies as candidates for ``adaptive``: those that may have the better plan are run.

A step has a budget of work, which grows with the gap that is left to win (``planner.strategies.adaptive.effort``).
Rivals are asked in the order of what they won for their work on unseen steps; one that cannot plan the step is left
out. FlexSP solves as many nodes of its programs as the budget still takes. So ``adaptive`` takes the best of what was
run; a strategy that was not run may be better, where the bound covers its plans by no more than the gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from planner.errors import InfeasibleError, SpecError
from planner.plan import SolveStatus
from planner.pricing.assemble import Found, makespan_s
from planner.pricing.problem import StepProblem
from planner.strategies.adaptive.effort import LEAST_GAP, MOST_GAP, NODE_WORK, PACK_SHARES, WORK_PER_GAP
from planner.strategies.flexsp.round_packing import pack_round
from planner.strategies.flexsp.strategy import one_kind_per_degree, place_rounds, plan_flexsp
from planner.strategies.greedy import plan_greedy
from planner.strategies.hdp import plan_hdp, plan_hdp_floor, plan_hdp_naive
from planner.strategies.megatron import plan_megatron
from planner.strategies.pp_balance import plan_hdp_pp, plan_packs
from planner.strategies.search.shapes import allowed_shapes, price_table, require_fits
from planner.strategies.static import plan_static, possible_degrees
from planner.strategies.zeppelin import plan_zeppelin


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """``work``: what running it takes, in runs of greedy."""

    name: str
    plan: Callable[[StepProblem], Found]
    work: float


def beat_with_rivals(
    found: Found, adaptive: Callable[[StepProblem], Found], problem: StepProblem, deadline_s: float
) -> tuple[str, Found, float]:
    """The best plan of ``found`` and of the rivals that were run, with the rival's name where it is one's, and its
    makespan."""
    name, best, best_s = "", found, makespan_s(found.groups, problem)
    gap = min(best_s / found.bound_s - 1, MOST_GAP) + LEAST_GAP
    left = WORK_PER_GAP * gap / (len(problem.lengths) * problem.num_ranks)
    least_s = found.bound_s if problem.cost.remap is None else 0.0  # plans that move tokens may be below the bound
    is_open = not problem.is_proven(best_s, found.bound_s)
    for rival in _rivals(problem, adaptive, is_open=is_open):
        if left < 1 or best_s <= least_s:
            break
        if rival.work > left:
            continue
        left -= rival.work
        limits = replace(
            problem.limits, time_limit_s=max(deadline_s - time.perf_counter(), 0.0),
            max_nodes=min(problem.limits.max_nodes, int(left / NODE_WORK)),
        )
        try:
            new = rival.plan(replace(problem, limits=limits))
        except (SpecError, InfeasibleError):  # not possible with these kinds, degrees or lengths
            continue
        new_s = makespan_s(new.groups, problem, new.moves)
        if new_s < best_s:
            name, best, best_s = rival.name, new, new_s
    return name, best, best_s


def _rivals(
    problem: StepProblem, adaptive: Callable[[StepProblem], Found], *, is_open: bool
) -> Iterator[Rival]:
    """What won most for its work on unseen steps comes first."""
    if problem.cost.num_stages > 1:
        if not problem.keeps_all:
            yield Rival(name="all kept", plan=lambda each: adaptive(each.keeping_all()), work=20)
        for share in PACK_SHARES:  # full ones may be too few to fill the pipelines
            for floor in (False, True):
                yield Rival(
                    name=f"hdp-pp, packs of {share:g} of the capacity", work=1,
                    plan=partial(plan_packs, pack_share=share, floor=floor),
                )
    yield Rival(name="flexsp round", plan=_one_round, work=1)
    yield Rival(name="greedy", plan=plan_greedy, work=1)
    if is_open:
        yield Rival(name="flexsp", plan=plan_flexsp, work=16)
    yield Rival(name="hdp-floor", plan=plan_hdp_floor, work=1)
    yield Rival(name="hdp", plan=plan_hdp, work=1)
    yield Rival(name="hdp-naive", plan=plan_hdp_naive, work=1)
    yield Rival(name="hdp-pp", plan=plan_hdp_pp, work=1)
    yield Rival(name="megatron", plan=plan_megatron, work=1)
    for degree in possible_degrees(problem):
        yield Rival(name="static", plan=partial(plan_static, degree=degree), work=1)
    yield Rival(name="zeppelin", plan=plan_zeppelin, work=10)


def _one_round(problem: StepProblem) -> Found:
    """FlexSP's plan without a program where one round may hold the step. With several, every round loses time of its
    own, and each took 2 % and more over adaptive's plan."""
    if sum(problem.lengths) > problem.num_ranks * problem.max_rank_tokens:
        raise SpecError("one round cannot hold the step")
    table = price_table(problem.lengths, allowed_shapes(problem))
    require_fits(table, problem)
    table = one_kind_per_degree(table)
    packing = pack_round(table, problem.num_ranks, deadline_s=time.perf_counter() + problem.limits.time_limit_s)
    if packing is None:
        raise SpecError("no round was found")
    schedule = place_rounds([table], [packing], problem.num_ranks)
    return Found(groups=schedule.groups, status=SolveStatus.FEASIBLE, bound_s=0.0, note="")
