"""Made-up executed steps for tests: real plans, with the times of a machine of another speed."""

from __future__ import annotations

import dataclasses
import random

from planner.cost.model import CostModel
from planner.measured.drift import Executed, planned_times
from planner.measured.step_times import MeasuredStep, MicrobatchTime, RankStep
from planner.plan import StepPlan
from planner.pricing.microbatch import price_microbatch
from planner.pricing.simulate import step_lengths
from planner.step_planner import greedy_step
from tests.planner.step_cases import RING, ULYSSES, make_cost, make_limits
from tests.plans import step_problem

NUM_RANKS = 4


def cost_here() -> CostModel:
    return make_cost(NUM_RANKS, kinds=(ULYSSES, RING))


def make_plan(step: int, cost: CostModel, seed: int = 0) -> StepPlan:
    draw = random.Random(1000 * seed + step)
    lengths = [int(draw.paretovariate(0.9) * 200) % 9_000 + 1 for _ in range(draw.randint(4, 14))]
    limits = make_limits(kinds=(ULYSSES, RING))
    return greedy_step(step_problem(lengths, NUM_RANKS, cost, limits), step=step)


def executed_on(plan: StepPlan, machine: CostModel, *, noise: random.Random | None = None) -> Executed:
    """The plan as executed on a machine whose true prices are ``machine``'s; with ``noise`` each microbatch deviates by
    up to 5 %. A tenth of each microbatch's time is waiting for messages."""
    lengths = step_lengths(plan)
    true = tuple(
        dataclasses.replace(
            microbatch,
            predicted_s=price_microbatch(microbatch, lengths, machine).seconds
            * (1.0 if noise is None else noise.uniform(0.95, 1.05)),
        )
        for microbatch in plan.microbatches
    )
    times: list[list[MicrobatchTime]] = [[] for _ in range(plan.num_ranks)]
    for index, (start_s, stop_s) in enumerate(planned_times(dataclasses.replace(plan, microbatches=true))):
        for rank in plan.microbatches[index].ranks:
            times[rank].append(MicrobatchTime(
                microbatch=index, start_s=start_s, middle_s=start_s + (stop_s - start_s) / 3, stop_s=stop_s,
                forward_wait_s=0.04 * (stop_s - start_s), backward_wait_s=0.06 * (stop_s - start_s),
            ))
    last_s = max(each.stop_s for found in times for each in found)
    ranks = tuple(
        RankStep(
            gather_s=0.25 * machine.step_fixed_s, microbatches=tuple(found),
            reduce_s=0.5 * machine.step_fixed_s + last_s - max((each.stop_s for each in found), default=0.0),
        )
        for found in times
    )
    return plan, MeasuredStep(step=plan.step, ranks=ranks, plan_wait_s=0.001, update_s=0.25 * machine.step_fixed_s)


def slower(cost: CostModel, factor: float) -> CostModel:
    """A machine that takes ``factor`` times as long for everything."""
    names = ("s_per_token2", "s_per_token", "s_per_sequence", "fixed_s")
    times = tuple(
        dataclasses.replace(fit, **{name: factor * getattr(fit, name) for name in names}) for fit in cost.times
    )
    return dataclasses.replace(cost, times=times, step_fixed_s=factor * cost.step_fixed_s)
