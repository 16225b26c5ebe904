"""Megatron's rule: the same rounds as the original's scheduler, and a plan where the original has none."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.plan import SolveStatus, StepPlan, plan_digest
from planner.step_planner import plan_step
from planner.strategies.megatron import megatron_rounds
from planner.strategies.search.shapes import PriceTable, flexsp_degrees, price_table, ring_shapes
from tests.planner.step_cases import RING, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem

RANK_TOKENS = 1024


def plan_megatron(lengths: list[int], num_ranks: int, rank_tokens: int = RANK_TOKENS) -> StepPlan:
    limits = make_limits(rank_tokens=rank_tokens, kinds=(RING,))
    return plan_step(
        step_problem(lengths, num_ranks, make_cost(num_ranks, kinds=(RING,)), limits), step=0, strategy="megatron"
    )


def priced(lengths: list[int], num_ranks: int) -> PriceTable:
    cost, limits = make_cost(num_ranks, kinds=(RING,)), make_limits(rank_tokens=RANK_TOKENS, kinds=(RING,))
    return price_table(
        lengths, ring_shapes("megatron", flexsp_degrees(num_ranks), step_problem([1], num_ranks, cost, limits))
    )


def rows_by_rank(table: PriceTable, num_ranks: int) -> list[list[list[int]]]:
    """For each round and rank its rows in order, which is the form of the original's answer."""
    rounds = []
    for groups in megatron_rounds(table, num_ranks):
        ranks: list[list[int]] = [[] for _ in range(num_ranks)]
        for group in groups:
            for rank in range(group.first_rank, group.first_rank + group.degree):
                ranks[rank] = list(group.rows)
        rounds.append(ranks)
    return rounds


@dataclass(frozen=True)
class Group:
    """The part of a process group that the original uses."""

    num_ranks: int

    def size(self) -> int:
        return self.num_ranks


@pytest.fixture(scope="module")
def original() -> Any:
    return pytest.importorskip("megatron.core.pipeline_parallel.hybrid_cp_schedule").BalancedCPScheduler


def drawn(seed: int, num_ranks: int) -> list[int]:
    """Random lengths that any ring of a power of two splits evenly. Only then does the original's capacity equal ours,
    which counts the longer chunk of an uneven split."""
    rng = random.Random(seed)
    longest = RANK_TOKENS << (num_ranks.bit_length() - 1)
    sizes = [min(int(rng.lognormvariate(6.3, 1.4)) + 1, longest) for _ in range(rng.randint(1, 60))]
    return [size if size <= RANK_TOKENS else -(-size // 256) * 256 for size in sizes]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 12, 16, 64])
def test_rounds_are_the_originals(original: Any, num_ranks: int) -> None:
    for seed in range(12):
        lengths = drawn(seed, num_ranks)
        scheduler = original(RANK_TOKENS, Group(num_ranks))
        _, theirs = scheduler.get_groups_and_subsamples(list(enumerate(lengths)), None)
        assert rows_by_rank(priced(lengths, num_ranks), num_ranks) == theirs, lengths


@pytest.mark.parametrize(
    ("num_ranks", "lengths", "error"),
    [(3, [3000], AssertionError), (6, [5000, 800, 900, 2000], AssertionError), (5, [2000, 1900], IndexError)],
)
def test_a_plan_where_the_original_has_none(
    original: Any, num_ranks: int, lengths: list[int], error: type[Exception]
) -> None:
    with pytest.raises(error):
        original(RANK_TOKENS, Group(num_ranks)).get_groups_and_subsamples(list(enumerate(lengths)), None)
    plan = plan_megatron(lengths, num_ranks)
    widest = max(len(batch.ranks) for batch in plan.microbatches)
    assert widest == (num_ranks if error is AssertionError else 2)


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6, 12, 24, 100]), st.integers(1, 60),
    st.sampled_from([300, 1000, 50_000]),
)
@settings(max_examples=60, deadline=None)
def test_any_step_is_legal_bounded_and_repeatable(
    seed: int, num_ranks: int, num_sequences: int, rank_tokens: int
) -> None:
    lengths = skewed_lengths(seed, num_sequences, rank_tokens * num_ranks)
    plan = plan_megatron(lengths, num_ranks, rank_tokens)  # plan_step verifies it
    assert plan.solver.status is SolveStatus.GREEDY
    assert 0 < plan.solver.bound_s <= plan.predicted_s * (1 + 1e-9)
    assert plan_digest(plan) == plan_digest(plan_megatron(lengths, num_ranks, rank_tokens))
    assert {len(batch.ranks) for batch in plan.microbatches} <= set(flexsp_degrees(num_ranks))


def test_short_sequences_of_a_group_share_a_microbatch() -> None:
    plan = plan_megatron([400] * 20, 4)
    assert len(plan.microbatches) == 12  # five of 400 on each rank: two, two and one in 1,024 tokens
    assert all(len(batch.ranks) == 1 for batch in plan.microbatches)


def test_idle_ranks_are_used_by_doubling() -> None:
    plan = plan_megatron([1000, 900], 8)
    assert [batch.ranks for batch in plan.microbatches] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_an_unpriced_size_is_passed_over() -> None:
    cost = make_cost(8, kinds=(RING,))
    coarse = replace(cost, times=tuple(fit for fit in cost.times if fit.degree != 2))
    limits = make_limits(rank_tokens=RANK_TOKENS, kinds=(RING,))
    plan = plan_step(step_problem([2000, 500], 8, coarse, limits), step=0, strategy="megatron")
    assert {len(batch.ranks) for batch in plan.microbatches} == {1, 4}


def test_a_group_is_not_doubled_onto_ranks_that_would_hold_too_much() -> None:
    """Four tokens are one for each of 4 or 8 ranks, but two for one of 13."""
    plan = plan_megatron([4], 13, rank_tokens=1)
    assert [len(batch.ranks) for batch in plan.microbatches] == [8]
