"""One step in, one plan out: the strategy answers, the answer is priced and verified."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from planner.codec import suggest
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import SpecError
from planner.plan import StepPlan
from planner.pricing.assemble import Found, assemble_plan
from planner.pricing.verify import verify_plan
from planner.strategies.adaptive.strategy import plan_adaptive
from planner.strategies.flexsp.strategy import plan_flexsp
from planner.strategies.greedy import plan_greedy
from planner.strategies.hdp import plan_hdp, plan_hdp_floor, plan_hdp_naive
from planner.strategies.megatron import plan_megatron
from planner.strategies.pp_balance import plan_hdp_pp
from planner.strategies.static import plan_static
from planner.strategies.zeppelin import plan_zeppelin


class Strategy(Protocol):
    """A way to plan a step of sequences of these lengths (tokens).

    ``degree``: the user's, given to ``static`` only. ``deadline_s``: when to stop, by ``time.perf_counter``.
    Raises SpecError and InfeasibleError.
    """

    def __call__(
        self, lengths: SequenceOf[int], *, num_ranks: int, cost: CostModel, limits: PlanLimits, degree: int | None,
        deadline_s: float,
    ) -> Found: ...


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


def plan_step(
    lengths: SequenceOf[int], *, step: int, num_ranks: int, cost: CostModel, limits: PlanLimits, strategy: str,
    degree: int | None = None,
) -> StepPlan:
    """Plan one step over sequences of these lengths (tokens) on ``num_ranks`` data ranks.

    ``degree`` belongs to ``static`` only (None: the best one). The same inputs give the same plan, wall times apart,
    unless ``limits.time_limit_s`` cuts the search.

    The report's bound holds for every plan of the group shapes tried, whatever its rounds and order. Status of
    ``flexsp``: OPTIMAL where the plan is within ``limits.relative_gap`` of that bound, and only there: the rounds'
    programs may all be closed and yet prove nothing about other ways to cut the rounds. Else GREEDY where the list
    schedule won, LIMIT where another plan won and a solver stopped early, FEASIBLE where it won and none did; the note
    names the winner. ``static`` is always STATIC; the rules without a solver (hdp, megatron, zeppelin) are GREEDY.

    Raises SpecError on bad arguments and InfeasibleError where a sequence fits in no group.
    """
    started_s = time.perf_counter()
    check_strategy(strategy, degree)
    _check_lengths(lengths, num_ranks)
    found = STRATEGIES[strategy](
        lengths, num_ranks=num_ranks, cost=cost, limits=limits, degree=degree,
        deadline_s=started_s + limits.time_limit_s,
    )
    return _finish(found, lengths, step, strategy, num_ranks, cost, limits, started_s)


def greedy_step(
    lengths: SequenceOf[int], *, step: int, num_ranks: int, cost: CostModel, limits: PlanLimits
) -> StepPlan:
    """The greedy plan alone, in milliseconds: what runs when the planner is late. Raises as ``plan_step`` does."""
    started_s = time.perf_counter()
    _check_lengths(lengths, num_ranks)
    found = plan_greedy(lengths, num_ranks=num_ranks, cost=cost, limits=limits)
    return _finish(found, lengths, step, "greedy", num_ranks, cost, limits, started_s)


def check_strategy(strategy: str, degree: int | None) -> None:
    """Raises SpecError on an unknown strategy, or a degree for a strategy that chooses its own."""
    if strategy not in STRATEGIES:
        available = ", ".join(STRATEGIES)
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


def _finish(
    found: Found, lengths: SequenceOf[int], step: int, strategy: str, num_ranks: int, cost: CostModel,
    limits: PlanLimits, started_s: float,
) -> StepPlan:
    plan = assemble_plan(
        step=step, strategy=strategy, num_ranks=num_ranks, lengths=lengths, groups=found.groups, cost=cost,
        status=found.status, bound_s=found.bound_s + cost.step_fixed_s, wall_s=time.perf_counter() - started_s,
        note=found.note, moves=found.moves,
    )
    verify_plan(plan, lengths, num_ranks=num_ranks, cost=cost, limits=limits)
    return plan
