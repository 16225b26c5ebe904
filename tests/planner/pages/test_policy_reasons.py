"""Why a plan keeps everything, strategy by strategy, and what is advised where nothing fits: true of the planners."""

from __future__ import annotations

import dataclasses

import pytest

from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit
from planner.cost.limits import PlanLimits
from planner.errors import InfeasibleError
from planner.pages.planned_step import PlannedStep
from planner.pages.policy_reasons import POLICY_STRATEGIES, what_helps, why_kept
from planner.pages.policy_words import policy_line
from planner.plan import AttentionKind, MemoryAction
from planner.pricing.simulate import simulate
from planner.step_planner import STRATEGIES, plan_step
from tests.plans import cost_model, step_problem

NUM_RANKS = 4
ALL = tuple(MemoryAction)
CHUNKS = ChunkFit(
    resident_bytes_per_token=0.2, num_kv_heads=4, fixed_bytes=0, bytes_per_token=1.0, shared_bytes_per_token=0.0,
    again_attention=0.3, again_linear=0.3, s_per_chunk=1e-6,
)
COST = dataclasses.replace(cost_model(NUM_RANKS), chunks=CHUNKS, activation=ActivationFit(
    swap_bytes_per_token=0.5, recompute_bytes_per_token=0.45, recompute_s_per_token=2e-6, copy_bytes_per_s=1e6,
    hidden_share=0.3,
))
LONG, SHORT = (150, 20, 10), (12, 10, 9, 8)


def limits(*policies, budget=30):
    return PlanLimits(
        device_budget_bytes=budget, kinds=(AttentionKind.ULYSSES, AttentionKind.RING), max_ulysses_degree=4,
        policies=policies, host_budget_bytes=10**6,
    )


def step(strategy, lengths, allowed):
    plan = plan_step(step_problem(lengths, NUM_RANKS, COST, allowed), step=0, strategy=strategy)
    return PlannedStep(plan=plan, simulation=simulate(plan, COST))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_table_of_choosers_is_what_the_strategies_do(strategy):
    """Where everything kept does not fit, those that are said to choose do, each with its actions only."""
    def does(action, policy):
        return policy.chunk_tokens > 0 if action is MemoryAction.CHUNK else getattr(policy, f"{action}_fraction") > 0

    for action in ALL[1:]:
        allowed = limits(MemoryAction.KEEP, action)
        if action not in POLICY_STRATEGIES.get(strategy, ()):
            with pytest.raises(InfeasibleError):
                step(strategy, LONG, allowed)
            continue
        found = step(strategy, LONG, allowed)
        assert any(does(action, each.memory) for each in found.plan.microbatches)
        assert "microbatches do not keep all" in policy_line([found], COST, allowed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_says_why_it_kept(strategy):
    def line(*policies, cost=COST):
        return policy_line([step(strategy, SHORT, limits(*policies, budget=200))], cost, limits(*policies))

    assert line(MemoryAction.KEEP) == "memory policy: all activations kept, as --memory keep says"
    unpriced = dataclasses.replace(COST, activation=None, chunks=None)
    assert line(*ALL, cost=unpriced).endswith("kept, since the cost model prices nothing else")
    if strategy == "hdp":
        words = line(*ALL, cost=dataclasses.replace(unpriced, chunks=CHUNKS))
        assert words.endswith("kept, since the cost model prices none of the requested policies")
    kept = line(*ALL)
    if strategy in POLICY_STRATEGIES:
        words = "swap, recompute or chunk" if strategy == "adaptive" else "swap"
        assert kept.endswith(f", since {strategy} would gain nothing by " + words)
    else:
        assert kept.endswith(
            f": {strategy} chooses no memory policies (adaptive: swap, recompute or chunk; hdp, hdp-floor: swap)"
        )


def test_a_strategy_that_chooses_something_else_says_so():
    words = why_kept("hdp", COST, limits(MemoryAction.KEEP, MemoryAction.RECOMPUTE))
    assert words.startswith(": hdp chooses swap only, not recompute (adaptive: ")


@pytest.mark.parametrize(
    ("strategies", "policies", "words"),
    [
        (("adaptive",), (MemoryAction.KEEP,), "; or try --memory auto"),
        (("flexsp",), (MemoryAction.KEEP,), "; or try --strategy adaptive --memory auto"),
        (("zeppelin",), ALL, "; or try --strategy adaptive: zeppelin chooses no memory policies (adaptive: "),
        (("hdp",), (MemoryAction.KEEP, MemoryAction.RECOMPUTE), "; or try --memory auto"),
        (tuple(STRATEGIES), (MemoryAction.KEEP,), "; or try --memory auto"),
    ],
)
def test_what_is_advised_helps(strategies, policies, words):
    for strategy in strategies:
        with pytest.raises(InfeasibleError):
            step(strategy, LONG, limits(*policies))
    advice = what_helps(strategies, COST, limits(*policies))
    assert advice.startswith(words)
    advised = "adaptive" if "--strategy adaptive" in advice else strategies[0]
    assert step(advised, LONG, limits(*ALL)).plan.microbatches


def test_nothing_is_advised_where_nothing_is_left():
    assert what_helps(("adaptive",), COST, limits(*ALL)) == ""
    unpriced = dataclasses.replace(COST, activation=None, chunks=None)
    assert what_helps(("flexsp",), unpriced, limits(MemoryAction.KEEP)) == ""
    crowded = dataclasses.replace(COST, memory=dataclasses.replace(COST.memory, fixed_bytes=31))
    assert what_helps(("adaptive",), crowded, limits(MemoryAction.KEEP)) == ""
