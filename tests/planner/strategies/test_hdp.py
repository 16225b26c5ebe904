"""HDP: every sequence gets the ranks it needs, and the ranks come out even."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, SpecError
from planner.plan import AttentionKind, SolveStatus, StepPlan, plan_digest
from planner.pricing.simulate import simulate
from planner.schedules.layout import local_token_counts
from planner.step_planner import plan_step
from tests.planner.step_cases import LOCAL, RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem
from tests.work import count_calls

VARIANTS = ("hdp", "hdp-floor", "hdp-naive")
RANK_TOKENS = 1000


def cost_and_limits(
    num_ranks: int, *, rank_tokens: int = RANK_TOKENS, node: int | None = None
) -> tuple[CostModel, PlanLimits]:
    return make_cost(num_ranks, kinds=(RING,)), replace(
        make_limits(rank_tokens=rank_tokens, kinds=(RING,)), devices_per_node=node
    )


def hdp(
    lengths: list[int], num_ranks: int, strategy: str = "hdp", *, rank_tokens: int = RANK_TOKENS,
    node: int | None = None,
) -> StepPlan:
    cost, limits = cost_and_limits(num_ranks, rank_tokens=rank_tokens, node=node)
    return plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy=strategy)


def least_degree(length: int, num_ranks: int, rank_tokens: int) -> int:
    """The published D(s), computed from the layout itself."""
    return next(
        degree for degree in range(1, num_ranks + 1)
        if max(local_token_counts(LOCAL if degree == 1 else RING, degree, [length])) <= rank_tokens
    )


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6, 12, 24, 100]), st.integers(1, 60), st.sampled_from(VARIANTS),
    st.sampled_from([300, 1000, 50_000]), st.sampled_from([None, 1, 4, 8]),
)
@settings(max_examples=60, deadline=None)
def test_any_step_is_legal_bounded_and_repeatable(
    seed: int, num_ranks: int, num_sequences: int, strategy: str, rank_tokens: int, node: int | None
) -> None:
    lengths = skewed_lengths(seed, num_sequences, rank_tokens * num_ranks)
    plan = hdp(lengths, num_ranks, strategy, rank_tokens=rank_tokens, node=node)  # plan_step verifies it
    assert plan.solver.status is SolveStatus.GREEDY
    assert 0 < plan.solver.bound_s <= plan.predicted_s * (1 + 1e-9)
    assert plan_digest(plan) == plan_digest(hdp(lengths, num_ranks, strategy, rank_tokens=rank_tokens, node=node))
    if strategy != "hdp-floor":
        for group in (group for microbatch in plan.microbatches for group in microbatch.groups):
            for sequence in group.sequences:
                assert group.degree == least_degree(lengths[sequence], num_ranks, rank_tokens)


def test_the_papers_example_at_one_tenth() -> None:
    """A sequence of 96 capacities beside 32 of one: 96 ranks for the long one, one each for the others."""
    plan = hdp([96_000] + [1000] * 32, 128)
    groups = sorted((group for batch in plan.microbatches for group in batch.groups), key=lambda each: -each.degree)
    assert (groups[0].kind, groups[0].degree) == (RING, 96)
    assert sorted(group.ranks[0] for group in groups[1:]) == list(range(96, 128))
    assert all(group.kind is LOCAL for group in groups[1:])


def test_ranks_run_unequal_numbers_of_microbatches_to_finish_together() -> None:
    cost, _ = cost_and_limits(8)
    lengths = [3000] + [700] * 50
    plan = hdp(lengths, 8)
    counts = [sum(rank in batch.ranks for batch in plan.microbatches) for rank in range(8)]
    assert len(set(counts)) > 1
    simulation = simulate(plan, cost)
    longest_s = max(batch.predicted_s for batch in plan.microbatches if len(batch.ranks) == 1)
    assert max(simulation.rank_finish_s) - min(simulation.rank_finish_s) <= longest_s


def test_balance_beats_counting_microbatches_on_a_skewed_step() -> None:
    lengths = skewed_lengths(5, 300, 12_000)
    balanced, naive = (hdp(lengths, 16, strategy) for strategy in ("hdp", "hdp-naive"))
    assert balanced.predicted_s < 0.95 * naive.predicted_s


def test_naive_fills_packs_and_balance_keeps_all_ranks_at_work() -> None:
    lengths = [100] * 10
    assert [batch.ranks for batch in hdp(lengths, 4, "hdp-naive").microbatches] == [(0,)]
    assert {batch.ranks for batch in hdp(lengths, 4).microbatches} == {(0,), (1,), (2,), (3,)}


def test_the_floor_shortens_the_critical_path_where_memory_is_ample() -> None:
    lengths = [40_000] + [500] * 20
    by_memory, floor = (hdp(lengths, 8, strategy, rank_tokens=50_000) for strategy in ("hdp", "hdp-floor"))
    assert max(len(batch.ranks) for batch in by_memory.microbatches) == 1
    assert floor.predicted_s < 0.5 * by_memory.predicted_s


def test_rings_stay_inside_a_node_where_they_can() -> None:
    plan = hdp([3000] * 4 + [5000], 16, node=4)
    rings = {len(batch.ranks): [] for batch in plan.microbatches}
    for batch in plan.microbatches:
        assert batch.ranks == tuple(range(batch.ranks[0], batch.ranks[0] + len(batch.ranks)))
        rings[len(batch.ranks)].append(batch.ranks)
    assert set(rings) == {3, 5}
    assert all(ranks[0] // 4 == ranks[-1] // 4 for ranks in rings[3])


def test_an_unpriced_degree_is_rounded_up() -> None:
    cost, limits = cost_and_limits(8)
    coarse = replace(cost, times=tuple(fit for fit in cost.times if fit.degree in (1, 4, 7)))
    plan = plan_step(step_problem([1500, 4500, 80], 8, coarse, limits), step=0, strategy="hdp")
    assert sorted(len(batch.ranks) for batch in plan.microbatches) == [1, 4, 7]


def without(cost: CostModel, kind: AttentionKind) -> CostModel:
    return replace(cost, times=tuple(fit for fit in cost.times if fit.kind is not kind))


@pytest.mark.parametrize("strategy", [*VARIANTS, "megatron", "zeppelin"])
def test_what_cannot_be_planned_is_said_in_one_line(strategy: str) -> None:
    cost, limits = cost_and_limits(4)

    def plan(lengths: list[int], cost: CostModel, limits: PlanLimits) -> StepPlan:
        return plan_step(step_problem(lengths, 4, cost, limits), step=0, strategy=strategy)

    with pytest.raises(InfeasibleError, match=r"sequence 1 \(4001 tokens\) fits in no group") as caught:
        plan([10, 4001], cost, limits)
    assert caught.value.needed_bytes > caught.value.available_bytes
    with pytest.raises(SpecError, match="use --attention auto or ring"):
        plan([10], cost, replace(limits, kinds=(ULYSSES,)))
    with pytest.raises(SpecError, match="rings, and the cost model prices none that it could form: calibrate again"):
        plan([10], without(cost, RING), limits)
    with pytest.raises(SpecError, match="prices no local group, calibrate again"):
        plan([10], without(cost, LOCAL), limits)


@pytest.mark.parametrize("strategy", [*VARIANTS, "zeppelin"])
def test_an_impossible_node_is_refused(strategy: str) -> None:
    with pytest.raises(SpecError, match="devices_per_node must be at least 1, got 0"):
        hdp([10], 4, strategy, node=0)


def calls_to_plan(strategy: str, num_ranks: int, num_sequences: int) -> int:
    lengths = [min(4 * size, 4096 * num_ranks) for size in skewed_lengths(7, num_sequences, 10**6)]
    cost = make_cost(num_ranks, kinds=(RING,))
    limits = replace(make_limits(kinds=(RING,)), devices_per_node=8)
    return count_calls(lambda: plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy=strategy))


@pytest.mark.parametrize("strategy", [*VARIANTS, "megatron", "zeppelin"])
def test_planning_grows_like_the_step(strategy: str) -> None:
    """A thousand calls a sequence are about 0.1 ms of it; twice the ranks and sequences would be four times the work
    if anything were done for each pair. Milliseconds: ``benchmarks.planner``."""
    small, double = calls_to_plan(strategy, 64, 512), calls_to_plan(strategy, 128, 1024)
    assert small < 1000 * 512
    assert double < 3.5 * small
    assert calls_to_plan(strategy, 1024, 2000) < 1000 * 2000
