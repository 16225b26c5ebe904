"""Plan one step: a strategy chooses the groups, then its plan is priced and verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from planner.codec import suggest
from planner.errors import SpecError
from planner.plan import StepPlan
from planner.pricing.assemble import Found, assemble_plan
from planner.pricing.problem import StepProblem
from planner.pricing.verify import verify_plan
from planner.strategies.adaptive.strategy import plan_adaptive
from planner.strategies.flexsp.strategy import plan_flexsp
from planner.strategies.greedy import plan_greedy
from planner.strategies.hdp import plan_hdp, plan_hdp_floor, plan_hdp_naive
from planner.strategies.megatron import plan_megatron
from planner.strategies.pp_balance import plan_hdp_pp
from planner.strategies.static import plan_static
from planner.strategies.zeppelin import plan_zeppelin

Strategy = Callable[[StepProblem], Found]
"""A way to plan a step. Raises SpecError where it cannot be used, InfeasibleError where a sequence fits in no group."""

STRATEGIES: dict[str, Strategy] = {
    "adaptive": plan_adaptive,
    "flexsp": plan_flexsp,
    "hdp": plan_hdp,
    "hdp-floor": plan_hdp_floor,
    "hdp-naive": plan_hdp_naive,
    "hdp-pp": plan_hdp_pp,
    "megatron": plan_megatron,
    "static": plan_static,
    "zeppelin": plan_zeppelin,
}


def plan_step(problem: StepProblem, *, step: int, strategy: str, degree: int | None = None) -> StepPlan:
    """Plan one step.

    ``degree`` belongs to ``static`` only (None: the best one). The same inputs give the same plan, wall times apart,
    unless ``limits.time_limit_s`` cuts the search.

    The report's lower bound holds for every plan of the group shapes and memory policies tried that moves no tokens,
    whatever its rounds and order. The status of ``flexsp`` is OPTIMAL only where the plan is within
    ``limits.relative_gap`` of that bound: solving every round's program proves nothing about other ways to cut the
    rounds. Otherwise it is GREEDY where the list schedule won, LIMIT where another plan won and a solver stopped early,
    and FEASIBLE where another plan won and no solver did; the note names the winner. ``static`` is always STATIC; the
    rules without a solver (hdp, megatron, zeppelin) are GREEDY.

    Raises SpecError on bad arguments and InfeasibleError where no group was found that a sequence fits in.
    """
    check_strategy(strategy, degree)
    answer = STRATEGIES[strategy] if degree is None else partial(plan_static, degree=degree)
    return _planned(answer, problem, step, strategy)


def greedy_step(problem: StepProblem, *, step: int) -> StepPlan:
    """The greedy plan alone, in milliseconds: it runs when the planner is late. Raises what ``plan_step`` raises."""
    return _planned(plan_greedy, problem, step, "greedy")


def check_strategy(strategy: str, degree: int | None) -> None:
    """Raises SpecError on an unknown strategy, or on a degree for a strategy that chooses its own."""
    if strategy not in STRATEGIES:
        available = ", ".join(STRATEGIES)
        raise SpecError(f"unknown strategy {strategy!r}{suggest(strategy, STRATEGIES)}; available: {available}")
    if degree is not None and strategy != "static":
        raise SpecError(f"strategy {strategy!r} chooses its own degrees: drop --degree or use --strategy static")


def _planned(answer: Strategy, problem: StepProblem, step: int, strategy: str) -> StepPlan:
    started_s = time.perf_counter()
    found = answer(problem)
    plan = assemble_plan(
        step=step, strategy=strategy, num_ranks=problem.num_ranks, lengths=problem.lengths, groups=found.groups,
        cost=problem.cost, status=found.status, bound_s=found.bound_s + problem.cost.step_fixed_s,
        wall_s=time.perf_counter() - started_s, note=found.note, moves=found.moves,
    )
    verify_plan(plan, problem)
    return plan
