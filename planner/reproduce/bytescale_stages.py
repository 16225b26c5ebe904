"""PP-Balance: microbatches of algorithm 1 placed anew where every rank is a pipeline, one length level a pipeline.

A pipeline of p stages that runs microbatches of t_1 >= t_2 >= ... seconds a stage takes about sum(t_i) + (p - 1) * t_1:
what fills and drains it is its longest microbatch. So long ones belong together, and the pipelines without them take
more microbatches. Algorithm 2 gets there from buckets of equal work and a slack, of which neither number is published.
Here: longest first, each to the first ranks that it does not hold up past a target, else to those that it finishes
earliest on; the target is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.assemble import GroupChoice, assemble_plan
from planner.cost import CostModel
from planner.plan import SolveStatus, StepPlan
from planner.simulate import step_lengths

NUM_TRIALS = 4


@dataclass(frozen=True, slots=True)
class _Placing:
    """The first rank of every microbatch and when the last pipeline ends."""

    first_ranks: tuple[int, ...]
    finish_s: float


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


def best_placing(
    stage_s: SequenceOf[float], degrees: SequenceOf[int], *, num_ranks: int, num_stages: int
) -> _Placing:
    """The best of a few targets between what no placing can beat and what list scheduling reaches."""
    work_s = sum(each_s * degree for each_s, degree in zip(stage_s, degrees, strict=True)) / num_ranks
    low_s = max(work_s, num_stages * max(stage_s))
    best = _place(stage_s, degrees, num_ranks, num_stages, 0.0)
    high_s = best.finish_s
    for _ in range(NUM_TRIALS):
        target_s = (low_s + high_s) / 2
        placing = _place(stage_s, degrees, num_ranks, num_stages, target_s)
        best = min(best, placing, key=lambda each: each.finish_s)
        if placing.finish_s <= target_s:
            high_s = target_s
        else:
            low_s = target_s
    return best


def _place(
    stage_s: SequenceOf[float], degrees: SequenceOf[int], num_ranks: int, num_stages: int, target_s: float
) -> _Placing:
    busy_s, longest_s = np.zeros(num_ranks), np.zeros(num_ranks)
    first_ranks = []
    last_s = 0.0
    for each_s, degree in zip(stage_s, degrees, strict=True):
        starts_s, levels_s = busy_s, longest_s
        if degree > 1:
            starts_s = np.lib.stride_tricks.sliding_window_view(busy_s, degree).max(axis=1)
            levels_s = np.lib.stride_tricks.sliding_window_view(longest_s, degree).max(axis=1)
        finish_s = starts_s + each_s + (num_stages - 1) * np.maximum(levels_s, each_s)
        first = int(np.argmax(finish_s <= target_s))
        if finish_s[first] > target_s:
            first = int(np.argmin(finish_s))
        last_s = max(last_s, float(finish_s[first]))
        level_s = max(each_s, float(levels_s[first]))
        busy_s[first : first + degree] = starts_s[first] + each_s
        longest_s[first : first + degree] = level_s
        first_ranks.append(first)
    return _Placing(tuple(first_ranks), last_s)
