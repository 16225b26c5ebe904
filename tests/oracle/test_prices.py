"""The price of a plan, asked twice: ``planner.pricing`` and the slow oracle agree on every plan of every strategy."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.errors import InfeasibleError, SpecError
from planner.plan import AttentionKind, MemoryAction, Sharding
from planner.pricing.simulate import simulate
from planner.step_planner import STRATEGIES, plan_step
from tests.oracle.prices import price_plan
from tests.planner.random_plans import random_case, toy_cost, with_moves
from tests.planner.step_cases import make_cost, make_limits, skewed_lengths, with_activation, with_chunks, with_policies
from tests.plans import cost_model, step_problem

BOTH = (AttentionKind.ULYSSES, AttentionKind.RING)


@pytest.mark.parametrize("sharding", list(Sharding))
def test_random_plans_cost_the_same_twice(sharding: Sharding) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        case = random_case(rng)
        cost = replace(case.cost, sharding=sharding)
        if seed % 2:
            remap = cost_model(case.num_ranks, with_remap=True, node_size=3).remap
            remap = replace(remap, linear_s_per_token=1e-8)
            case = with_moves(rng, replace(case, cost=replace(case.cost, remap=remap)))
            cost = replace(case.cost, sharding=sharding)
        plan = replace(case.plan, sharding=sharding)
        mine, theirs = price_plan(plan, cost), simulate(plan, cost)
        assert mine.step_s == pytest.approx(theirs.step_s, rel=1e-12)
        assert mine.peak_bytes == theirs.rank_peak_bytes
        assert mine.host_bytes == theirs.rank_host_bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stages", [1, 3])
def test_plans_of_every_strategy_cost_the_same_twice(strategy: str, stages: int) -> None:
    for seed in range(4):
        num_ranks = 3 + seed
        cost = with_activation(make_cost(num_ranks, kinds=BOTH))
        cost = replace(cost, num_stages=stages) if stages > 1 else with_chunks(cost)
        if seed == 3 and stages == 1:
            cost = replace(cost, sharding=Sharding.ZERO3)
        limits = with_policies(make_limits(kinds=BOTH, rank_tokens=1500 * stages))
        if stages > 1:
            limits = replace(limits, policies=(MemoryAction.KEEP, MemoryAction.SWAP, MemoryAction.RECOMPUTE))
        try:
            plan = plan_step(step_problem(skewed_lengths(seed, 14, 3000), num_ranks, cost, limits), step=0,
                             strategy=strategy)
        except (InfeasibleError, SpecError):
            continue
        mine, theirs = price_plan(plan, cost), simulate(plan, cost)
        assert mine.step_s == pytest.approx(plan.predicted_s, rel=1e-12)
        assert mine.peak_bytes == theirs.rank_peak_bytes
        assert mine.host_bytes == theirs.rank_host_bytes


def test_the_oracle_reads_no_price_of_ours() -> None:
    """The random plans have another coefficient for every kind and degree, so nothing agrees by luck."""
    cost = toy_cost(random.Random(0), 5)
    assert len({fit.s_per_token2 for fit in cost.times}) == len(cost.times)
