"""Microbatches of algorithm 1 placed anew by PP-Balance (``planner.strategies.pp_balance``) where every rank is a
pipeline."""

from __future__ import annotations

from planner.cost.model import CostModel
from planner.plan import SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.simulate import step_lengths
from planner.strategies.pp_balance import best_placing


def pp_balance(plan: StepPlan, *, num_stages: int, cost: CostModel) -> StepPlan:
    """``plan``'s microbatches (one group each, priced for all stages together) on consecutive ranks, longest first."""
    order = sorted(plan.microbatches, key=lambda microbatch: -microbatch.predicted_s)
    stage_s = [microbatch.predicted_s / num_stages for microbatch in order]
    degrees = [len(microbatch.ranks) for microbatch in order]
    placing = best_placing(stage_s, degrees, num_ranks=plan.num_ranks, num_stages=num_stages)
    choices = []
    for microbatch, first, degree in zip(order, placing.first_ranks, degrees, strict=True):
        (group,) = microbatch.groups
        choices.append(GroupChoice(group.kind, tuple(range(first, first + degree)), group.sequences))
    return assemble_plan(
        step=plan.step, strategy="hdp-pp", num_ranks=plan.num_ranks, lengths=step_lengths(plan), groups=choices,
        cost=cost, status=SolveStatus.GREEDY, bound_s=0.0, wall_s=0.0, note="PP-Balance",
    )
