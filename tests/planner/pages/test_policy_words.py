"""Memory policies in words."""

from __future__ import annotations

import pytest

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.pages.planned_step import PlannedStep
from planner.pages.policy_words import policy_line, policy_name
from planner.plan import MemoryAction, MemoryPolicy
from planner.pricing.simulate import simulate
from planner.step_planner import plan_step
from tests.planner.step_cases import RING, make_cost, make_limits, with_activation, with_policies
from tests.plans import step_problem


def planned(lengths: list[int], strategy: str, cost: CostModel, limits: PlanLimits, num_ranks: int = 16) -> PlannedStep:
    plan = plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy=strategy)
    return PlannedStep(plan=plan, simulation=simulate(plan, cost))


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (MemoryPolicy(), "keep"),
        (MemoryPolicy(keep_fraction=0.5, swap_fraction=0.5), "swap 50%"),
        (MemoryPolicy(keep_fraction=0.999, swap_fraction=0.001), "swap <1%"),
        (MemoryPolicy(keep_fraction=0.25, swap_fraction=0.25, recompute_fraction=0.5), "swap 25%, recompute 50%"),
    ],
)
def test_names(policy: MemoryPolicy, name: str) -> None:
    assert policy_name(policy) == name


def test_the_line_says_which_policy_and_why() -> None:
    cost = with_activation(make_cost(16, kinds=(RING,)))
    limits = with_policies(make_limits(kinds=(RING,), rank_tokens=2000), MemoryAction.SWAP, host_tokens=1000)
    step = planned([15_000, 500], "hdp", cost, limits)
    (fraction,) = {m.memory.swap_fraction for m in step.plan.microbatches} - {0.0}
    assert policy_line([step], cost, limits) == (
        f"memory policy: 1 of 2 microbatches do not keep all, 1 swap {fraction:.0%} of their tokens' "
        "activations: 1 to need fewer ranks (6 instead of 8 for 15K tokens)"
    )


def test_the_line_says_where_nothing_else_could_hold_it() -> None:
    cost, limits = with_activation(make_cost(1)), with_policies(make_limits(rank_tokens=2000), MemoryAction.RECOMPUTE)
    line = policy_line([planned([6500], "adaptive", cost, limits, 1)], cost, limits)
    assert line.endswith("1 recompute 100% of their tokens' activations: 1 since no number of ranks could keep all "
                         "(6.5K tokens on 1)")


def test_the_line_says_when_microbatches_only_hold_more() -> None:
    cost = with_activation(make_cost(1, fixed_s=10.0))
    limits = with_policies(make_limits(rank_tokens=1000), MemoryAction.RECOMPUTE)
    line = policy_line([planned([900] * 6, "adaptive", cost, limits, 1)], cost, limits)
    assert line.startswith("memory policy: 2 of 2 microbatches do not keep all, 2 recompute")
    assert line.endswith("2 to hold more in one microbatch")


def test_the_line_says_why_all_is_kept() -> None:
    limits = make_limits(rank_tokens=2000)
    for cost, allowed, end in (
        (make_cost(1), limits, "kept, as --memory keep says"),
        (make_cost(1), with_policies(limits), "kept, since the cost model prices nothing else"),
        (with_activation(make_cost(1)), with_policies(limits), "adaptive would gain nothing by swap or recompute"),
    ):
        assert policy_line([planned([900], "adaptive", cost, allowed, 1)], cost, allowed).endswith(end)
