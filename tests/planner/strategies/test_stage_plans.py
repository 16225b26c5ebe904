"""Pipeline stages: plans priced by the order that the runtime follows, within memory, and PP-Balance."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.program import compile_rank_program
from planner.cost.data_sheet import derive_cost
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, PlanError, SpecError
from planner.inputs.files import load_cluster, load_model
from planner.measured.drift import planned_span_s
from planner.plan import MemoryAction, Sharding, SolveStatus, StepPlan, plan_digest, plan_from_json, plan_to_json
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.pipeline_order import StageWork, pipeline_order
from planner.pricing.simulate import simulate
from planner.pricing.verify import verify_plan
from planner.step_planner import STRATEGIES, plan_step
from planner.strategies.adaptive.space import every_shape
from planner.strategies.pp_balance import best_placing
from planner.strategies.search.bounds import step_bound_s
from tests.planner.random_plans import random_case, reprice
from tests.planner.step_cases import (
    LOCAL,
    RING,
    ULYSSES,
    make_cost,
    make_limits,
    skewed_lengths,
    with_activation,
    with_chunks,
    with_policies,
)
from tests.planner.strategies.test_adaptive import adaptive, others
from tests.plans import step_problem

BOTH = (ULYSSES, RING)


def staged_cost(num_ranks: int, num_stages: int, fixed_s: float = 2e-3) -> CostModel:
    return replace(make_cost(num_ranks, kinds=BOTH, fixed_s=fixed_s), num_stages=num_stages)


def locals_plan(lengths: list[int], num_ranks: int, cost: CostModel) -> StepPlan:
    """One local microbatch for each sequence, dealt to the ranks in turn."""
    return assemble_plan(
        step=0, strategy="hand", num_ranks=num_ranks, lengths=lengths,
        groups=[GroupChoice(LOCAL, (index % num_ranks,), (index,)) for index in range(len(lengths))], cost=cost,
        status=SolveStatus.GREEDY, bound_s=0.0, wall_s=0.0,
    )


def test_equal_microbatches_take_what_1f1b_takes() -> None:
    cost = staged_cost(1, 4)
    plan, simulation = (found := locals_plan([500] * 6, 1, cost)), simulate(found, cost)
    each_s = cost.group_s(LOCAL, 1, [500])
    assert plan.num_stages == 4
    assert plan.predicted_s == pytest.approx((6 + 4 - 1) * each_s + cost.step_fixed_s)
    assert simulation.rank_busy_s == pytest.approx((6 * each_s,))
    assert simulation.idle_fraction == pytest.approx(3 / 9)
    assert simulation.peak_bytes == cost.device_bytes(4 * 500)  # four in flight on the first stage
    assert planned_span_s(plan) == pytest.approx(plan.predicted_s - cost.step_fixed_s)
    assert len(simulation.events) == 12  # forward and backward


def test_one_stage_leaves_digests_alone() -> None:
    cost = make_cost(2)
    plan = locals_plan([5, 6], 2, cost)
    assert "num_stages" not in plan_to_json(plan) and replace(cost, num_stages=1).digest == cost.digest
    staged = locals_plan([5, 6], 2, staged_cost(2, 2))
    assert plan_from_json(plan_to_json(staged)) == staged
    assert plan_digest(staged) != plan_digest(plan)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), num_stages=st.integers(2, 5))
def test_the_price_is_that_of_the_order_the_runtime_follows(seed: int, num_stages: int) -> None:
    case = random_case(random.Random(seed))
    cost = replace(case.cost, num_stages=num_stages)
    plan = reprice(replace(case.plan, num_stages=num_stages, cost_digest=cost.digest), cost)
    simulation = simulate(plan, cost)
    work = [StageWork(ranks=batch.ranks, seconds=batch.predicted_s) for batch in plan.microbatches]
    order = pipeline_order(work, num_stages=num_stages)
    assert simulation.step_s == pytest.approx(max(action.stop_s for action in order) + cost.step_fixed_s)
    rank = random.Random(seed).randrange(plan.num_ranks)
    program = compile_rank_program(plan, rank, stage=0, num_stages=num_stages)
    mine = [event.microbatch for event in simulation.events if event.rank == rank]
    assert [program.microbatches[action.place].index for action in program.actions] == mine
    assert max(simulation.rank_busy_s) <= simulation.step_s - cost.step_fixed_s + 1e-9
    limits = replace(case.limits, device_budget_bytes=plan.peak_bytes)
    verify_plan(plan, step_problem(case.lengths, plan.num_ranks, cost, limits))
    if plan.peak_bytes > max(batch.peak_bytes for batch in plan.microbatches):
        tight = replace(limits, device_budget_bytes=plan.peak_bytes - 1)
        with pytest.raises(PlanError, match="microbatches in flight over"):
            verify_plan(plan, step_problem(case.lengths, plan.num_ranks, cost, tight))


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6]), st.integers(1, 30), st.sampled_from([2, 3, 4]),
    st.sampled_from([1e-4, 5e-2]),
)
@settings(max_examples=12, deadline=None)
def test_every_strategy_stays_within_memory_and_adaptive_is_ahead(
    seed: int, num_ranks: int, num_sequences: int, num_stages: int, fixed_s: float
) -> None:
    """``plan_step`` verifies memory in flight and the bound."""
    cost, limits = staged_cost(num_ranks, num_stages, fixed_s), make_limits(kinds=BOTH, max_nodes=10)
    lengths = skewed_lengths(seed, num_sequences, 4096 // num_stages)
    plan = adaptive(lengths, num_ranks, cost, limits)
    found = others(lengths, num_ranks, cost, limits)
    assert {"hdp None", "hdp-pp None", "static None", "zeppelin None"} <= found.keys()
    bound_s = (
        step_bound_s(lengths, every_shape(step_problem([1], num_ranks, cost, limits)), num_ranks) + cost.step_fixed_s
    )
    for name, other in found.items():
        spare = limits.relative_gap if name.startswith("flexsp") and plan.solver.status is SolveStatus.OPTIMAL else 0
        assert plan.predicted_s <= other.predicted_s * (1 + spare) * (1 + 1e-9), name
        assert bound_s <= other.predicted_s * (1 + 1e-9), name


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 5]), st.integers(1, 25), st.sampled_from([2, 3, 4]),
    st.sampled_from([0, 500, 50_000]), st.floats(1, 2),
)
@example(seed=0, num_ranks=2, num_sequences=14, num_stages=3, host_tokens=500, copied=1.0)
@settings(max_examples=25, deadline=None)
def test_policies_stay_within_device_and_host_in_flight(
    seed: int, num_ranks: int, num_sequences: int, num_stages: int, host_tokens: int, copied: float
) -> None:
    """``plan_step`` verifies both, and the bound. What fits with everything kept is planned no worse."""
    cost = with_activation(staged_cost(num_ranks, num_stages))
    assert cost.activation is not None
    cost = replace(cost, activation=replace(cost.activation, host_bytes_per_byte=copied))
    limits = with_policies(make_limits(kinds=BOTH, max_nodes=10), host_tokens=host_tokens)
    lengths = skewed_lengths(seed, num_sequences, num_ranks * 8192 // num_stages)
    for strategy in ("adaptive", "hdp", "hdp-floor"):
        kept = None
        for allowed in (replace(limits, policies=(MemoryAction.KEEP,)), limits):
            try:
                plan = plan_step(step_problem(lengths, num_ranks, cost, allowed), step=0, strategy=strategy)
            except InfeasibleError:
                assert kept is None, "policies made it impossible"
                continue
            if strategy == "adaptive" and kept is not None:
                assert plan.predicted_s <= kept.predicted_s * (1 + 1e-9)
            kept = plan


def test_swapped_microbatches_share_the_host_with_those_in_flight() -> None:
    cost, limits = with_activation(staged_cost(1, 2)), with_policies(make_limits())
    lengths = [3000] * 4  # 4,096 tokens fit at once, so one of two in flight
    plan = plan_step(step_problem(lengths, 1, cost, limits), step=0, strategy="adaptive")
    assert all(batch.memory.swap_fraction > 0 for batch in plan.microbatches) and len(plan.microbatches) == 4
    (swapped,) = simulate(plan, cost).rank_host_bytes
    assert swapped == sum(cost.host_bytes(3000, batch.memory) for batch in plan.microbatches[:2])
    for host_bytes in (swapped, swapped - 1):
        tight = replace(limits, host_budget_bytes=host_bytes)
        if host_bytes == swapped:
            verify_plan(plan, step_problem(lengths, 1, cost, tight))
            continue
        with pytest.raises(PlanError, match="in flight over 2 pipeline stages swap .* to its host"):
            verify_plan(plan, step_problem(lengths, 1, cost, tight))


def test_a_sequence_that_only_fits_without_stages_is_refused() -> None:
    limits = make_limits(kinds=BOTH)
    adaptive([4096], 1, staged_cost(1, 1), limits)
    for strategy in STRATEGIES:
        with pytest.raises(InfeasibleError, match="fits in no group.* with 2 microbatches in flight"):
            plan_step(step_problem([4096], 1, staged_cost(1, 2), limits), step=0, strategy=strategy)


def test_pp_balance_beats_dp_balance_on_the_papers_example() -> None:
    """Four stages, two length levels, as in the paper's figures 5 and 13: DP-Balance spreads the long microbatches over
    all pipelines, so each of them fills and drains with a long one; PP-Balance keeps them in few pipelines."""
    cost, limits = staged_cost(4, 4, fixed_s=1e-4), make_limits(kinds=BOTH, rank_tokens=4 * 4000)
    lengths = [4000] * 4 + [1000] * 80  # a long one takes about the work of seven packs of four short ones
    step = {
        strategy: plan_step(step_problem(lengths, 4, cost, limits), step=0, strategy=strategy)
        for strategy in ("hdp", "hdp-pp", "hdp-naive", "adaptive")
    }
    assert step["hdp-pp"].predicted_s < 0.95 * step["hdp"].predicted_s
    assert step["adaptive"].predicted_s <= step["hdp-pp"].predicted_s
    owners = {batch.ranks for batch in step["hdp-pp"].microbatches if lengths[batch.groups[0].sequences[0]] == 4000}
    spread = {batch.ranks for batch in step["hdp"].microbatches if lengths[batch.groups[0].sequences[0]] == 4000}
    assert len(owners) < len(spread) == 4


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_rings_are_placed_inside_nodes(seed: int, num_ranks: int, node_size: int, num_stages: int) -> None:
    rng = random.Random(seed)
    degrees = [rng.randint(1, num_ranks) for _ in range(12)]
    stage_s = sorted((rng.uniform(0.1, 2.0) for _ in degrees), reverse=True)
    placing = best_placing(stage_s, degrees, num_ranks=num_ranks, num_stages=num_stages, node_size=node_size)
    for degree, first in zip(degrees, placing.first_ranks, strict=True):
        assert 0 <= first <= num_ranks - degree
        if degree <= node_size:
            assert first % node_size + degree <= node_size
    assert placing.finish_s >= num_stages * max(stage_s) * (1 - 1e-9)


def test_plan_and_runtime_must_agree_on_the_stages() -> None:
    cost = staged_cost(2, 2)
    plan, limits = locals_plan([5, 6], 2, cost), make_limits(kinds=BOTH)
    with pytest.raises(PlanError, match="plan is for 2 pipeline stages, there are 4"):
        compile_rank_program(plan, 0, stage=1, num_stages=4)
    with pytest.raises(PlanError, match="plan is for 2 pipeline stages, the cost model prices 3"):
        verify_plan(plan, step_problem([5, 6], 2, replace(cost, num_stages=3), limits))


def test_what_is_not_priced_with_stages_is_refused() -> None:
    with pytest.raises(SpecError, match="num_stages 2: sharding zero3 is not priced with pipeline stages"):
        replace(staged_cost(2, 2), sharding=Sharding.ZERO3)
    with pytest.raises(SpecError, match="num_stages 2: running in chunks"):
        replace(with_chunks(make_cost(2)), num_stages=2)
    with pytest.raises(SpecError, match="num_stages must be at least 1, got 0"):
        staged_cost(2, 0)


def test_a_derived_stage_is_a_part_of_the_model() -> None:
    cluster, model = load_cluster("h200-64"), load_model("llama-3-8b")
    whole = derive_cost(cluster, model, num_ranks=16)
    stage = derive_cost(cluster, model, num_ranks=16, num_stages=4)
    assert stage.num_stages == 4 and stage.chunks is None
    assert whole.activation is not None and stage.activation is not None
    # 8 of 32 layers: the two in use stay for every microbatch in flight, and all are copied
    assert stage.activation.swap_bytes_per_token == pytest.approx(6 / 30 * whole.activation.swap_bytes_per_token)
    assert stage.activation.copied_bytes_per_token == pytest.approx(8 / 6 * stage.activation.swap_bytes_per_token)
    assert stage.activation.recompute_s_per_token == pytest.approx(8 / 30 * whole.activation.recompute_s_per_token)
    assert whole.activation.host_bytes_per_byte == 1
    assert stage.memory.bytes_per_token == pytest.approx(whole.memory.bytes_per_token / 4)
    assert whole.memory.fixed_bytes / 4 < stage.memory.fixed_bytes < whole.memory.fixed_bytes / 3  # embedding or head
    alone, part = whole.time_fit(LOCAL, 1), stage.time_fit(LOCAL, 1)
    assert part.s_per_token2 == pytest.approx(alone.s_per_token2 / 4)
    head = model.hidden_dim * model.vocab_size / (8 * model.layer_active_params + model.hidden_dim * model.vocab_size)
    assert part.s_per_token > alone.s_per_token / 4 and head < 0.25
    assert any("4 pipeline stages priced alike: 8 layers" in note for note in stage.provenance.notes)
    with pytest.raises(SpecError, match="33 pipeline stages are more than its 32 layers"):
        derive_cost(cluster, model, num_ranks=1, num_stages=33)
    with pytest.raises(SpecError, match="32 data ranks x 1 tensor-parallel x 4 pipeline stages do not fit"):
        derive_cost(cluster, model, num_ranks=32, num_stages=4)
