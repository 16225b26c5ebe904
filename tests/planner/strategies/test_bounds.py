"""The lower bound against every plan there is, on steps small enough to try them all."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import AttentionKind, Sharding
from planner.step_planner import STRATEGIES, greedy_step, plan_step
from planner.strategies.adaptive.space import every_shape
from planner.strategies.search.bounds import bound_parts, lockstep_bound_s, makespan_bound_s, step_bound_s
from planner.strategies.search.shapes import group_tokens, price_table
from tests.planner.brute_force import best_makespan_s, kept_groups
from tests.planner.random_plans import toy_cost
from tests.planner.step_cases import RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem

BOTH = (ULYSSES, RING)


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.lists(st.integers(1, 4000), min_size=1, max_size=3),
    st.sampled_from([(ULYSSES,), (RING,)]), st.sampled_from([0.0, 2e-3, 0.3]), st.sampled_from([1400, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_no_plan_beats_the_bound_and_adaptive_is_no_better_than_the_best(
    seed: int, num_ranks: int, lengths: list[int], kinds: tuple[AttentionKind, ...], fixed_s: float, rank_tokens: int
) -> None:
    lengths = [min(size, num_ranks * (rank_tokens - 2)) for size in lengths]
    cost = make_cost(num_ranks, kinds=kinds, fixed_s=fixed_s)
    limits = make_limits(kinds=kinds, rank_tokens=rank_tokens)
    check_against_brute_force(lengths, num_ranks, cost, limits, rank_tokens)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 20_000), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_for_uneven_costs(seed: int, lengths: list[int]) -> None:
    rng = random.Random(seed)
    cost = toy_cost(rng, 3)
    rank_tokens = rng.choice([7000, 12_000, 60_000])
    limits = PlanLimits(device_budget_bytes=cost.device_bytes(rank_tokens), max_ulysses_degree=3, kinds=BOTH)
    check_against_brute_force(lengths, 3, cost, limits, cost.max_local_tokens(limits.device_budget_bytes))


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.lists(st.integers(1, 4000), min_size=1, max_size=3),
    st.sampled_from([(ULYSSES,), (RING,)]), st.sampled_from([0.0, 2e-3, 0.3]), st.sampled_from([1400, 4096]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_plan_in_lockstep_beats_its_bound(
    seed: int, num_ranks: int, lengths: list[int], kinds: tuple[AttentionKind, ...], fixed_s: float, rank_tokens: int,
    uneven: bool,
) -> None:
    lengths = [min(size, num_ranks * (rank_tokens - 2)) for size in lengths]
    cost = toy_cost(random.Random(seed), num_ranks) if uneven else make_cost(num_ranks, kinds=kinds, fixed_s=fixed_s)
    cost = replace(cost, sharding=Sharding.ZERO3)
    budget = cost.device_bytes(rank_tokens)
    limits = PlanLimits(device_budget_bytes=budget, max_ulysses_degree=num_ranks, kinds=kinds)
    held = cost.max_local_tokens(budget)
    shapes = every_shape(step_problem([1], num_ranks, cost, limits))
    best_s = best_makespan_s(lengths, kept_groups(shapes, num_ranks, held), num_ranks, held, lockstep=True)
    bound_s = lockstep_bound_s(lengths, shapes, num_ranks)
    assert step_bound_s(lengths, shapes, num_ranks) <= bound_s <= best_s * (1 + 1e-9)
    plan = plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy="adaptive")
    assert plan.predicted_s >= (best_s + cost.step_fixed_s) * (1 - 1e-9)


def test_lockstep_counts_whole_rounds() -> None:
    """Three full sequences on two ranks: two rounds, though they take one and a half ranks' memory."""
    cost, limits = make_cost(2, fixed_s=0.5), make_limits(rank_tokens=4096)
    shapes = every_shape(step_problem([1], 2, cost, limits))
    marginal_s = cost.group_s(AttentionKind.LOCAL, 1, [4096]) - 0.5
    assert lockstep_bound_s([4096] * 3, shapes, 2) == pytest.approx(2 * 0.5 + 1.5 * marginal_s, rel=1e-6)


def check_against_brute_force(
    lengths: list[int], num_ranks: int, cost: CostModel, limits: PlanLimits, rank_tokens: int
) -> None:
    shapes = every_shape(step_problem([1], num_ranks, cost, limits))
    best_s = best_makespan_s(lengths, kept_groups(shapes, num_ranks, rank_tokens), num_ranks, rank_tokens)
    bound_s = step_bound_s(lengths, shapes, num_ranks)
    assert 0 < bound_s <= best_s * (1 + 1e-9)
    assert makespan_bound_s(price_table(lengths, shapes), num_ranks) <= best_s * (1 + 1e-9)
    plan = plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy="adaptive")
    assert plan.predicted_s >= (best_s + cost.step_fixed_s) * (1 - 1e-9)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.0, 1e-3, 0.4]))
@settings(max_examples=40, deadline=None)
def test_the_bound_of_all_shapes_holds_for_every_strategy(
    seed: int, num_ranks: int, num_sequences: int, fixed_s: float
) -> None:
    lengths = skewed_lengths(seed, num_sequences, 4096 * min(num_ranks, 3) - 8)
    cost, limits = make_cost(num_ranks, kinds=BOTH, fixed_s=fixed_s), make_limits(kinds=BOTH, max_nodes=5)
    bound_s = (
        step_bound_s(lengths, every_shape(step_problem([1], num_ranks, cost, limits)), num_ranks) + cost.step_fixed_s
    )
    plans = [greedy_step(step_problem(lengths, num_ranks, cost, limits), step=0)]
    for name in STRATEGIES:
        if name in ("static", "hdp-naive") and max(lengths) > 4096:
            continue  # one degree for all may not fit them all
        plans.append(plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy=name))
    assert bound_s <= min(plan.predicted_s for plan in plans) * (1 + 1e-9)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 50), st.sampled_from([0.0, 1e-3, 0.4]))
@settings(max_examples=40, deadline=None)
def test_fewer_prices_give_the_same_bound(seed: int, num_ranks: int, num_sequences: int, fixed_s: float) -> None:
    lengths = skewed_lengths(seed, num_sequences, 4096)
    cost, limits = make_cost(num_ranks, kinds=BOTH, fixed_s=fixed_s), make_limits(kinds=BOTH)
    shapes = every_shape(step_problem([1], num_ranks, cost, limits))
    whole = makespan_bound_s(price_table(lengths, shapes), num_ranks)
    assert step_bound_s(lengths, shapes, num_ranks) == pytest.approx(whole, rel=1e-7)
    parts = bound_parts(lengths, shapes, num_ranks)
    assert sum(int(part.counts.sum()) for part in parts) == len(lengths)


def test_more_shapes_never_raise_the_bound() -> None:
    cost, limits = make_cost(8, kinds=BOTH, fixed_s=0.1), make_limits(kinds=BOTH)
    shapes = every_shape(step_problem([1], 8, cost, limits))
    lengths = skewed_lengths(4, 60, 9000)
    few = tuple(shape for shape in shapes if shape.degree in (1, 4, 8))
    assert step_bound_s(lengths, shapes, 8) <= step_bound_s(lengths, few, 8) * (1 + 1e-9)


def test_memory_counts_microbatches() -> None:
    """Full sequences on one rank each: the bound is the microbatches a rank must run, fixed times included."""
    cost, limits = make_cost(2, fixed_s=0.5), make_limits(rank_tokens=4096)
    shapes = every_shape(step_problem([1], 2, cost, limits))
    seconds = cost.group_s(AttentionKind.LOCAL, 1, [4096])
    assert step_bound_s([4096] * 8, shapes, 2) == pytest.approx(4 * seconds, rel=1e-6)


def test_the_clock_counts_a_fixed_time_for_every_rank() -> None:
    """Ample memory: each of two ranks runs one microbatch, and no less."""
    cost, limits = make_cost(2, fixed_s=0.5), make_limits(rank_tokens=10**6)
    shapes = every_shape(step_problem([1], 2, cost, limits))
    seconds = cost.group_s(AttentionKind.LOCAL, 1, [100] * 4)
    assert step_bound_s([100] * 8, shapes, 2) == pytest.approx(seconds, rel=1e-6)


def test_the_longest_sequence_sets_the_pace() -> None:
    cost, limits = make_cost(4), make_limits()
    shapes = every_shape(step_problem([1], 4, cost, limits))
    alone_s = min(cost.group_s(shape.kind, shape.degree, [16_000]) for shape in shapes if group_tokens(shape) >= 16_000)
    assert step_bound_s([16_000, 5], shapes, 4) == pytest.approx(alone_s, rel=1e-2)
    assert step_bound_s([], shapes, 4) == 0.0
    assert makespan_bound_s(price_table(np.array([10]), shapes).take_rows([]), 4) == 0.0
