"""Remapping in the planner: priced by hand, chosen only where it pays, refused where illegal, never below the bound."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.data_sheet import derive_cost
from planner.cost.fits import RemapFit
from planner.cost.model import CostModel
from planner.errors import PlanError, SpecError
from planner.inputs.files import load_cluster, load_model
from planner.plan import StepPlan, plan_digest, plan_from_json, plan_to_json
from planner.pricing.assemble import GroupChoice, price_choice
from planner.pricing.simulate import simulate
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from planner.strategies.search.bounds import step_bound_s
from planner.strategies.search.linear_balance import price_with_moves, remap_bound_s
from planner.strategies.search.shapes import shape_of
from tests.planner.random_plans import Case, random_case, with_moves
from tests.planner.step_cases import LOCAL, RING, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem


def remap_cost(num_ranks: int, *, inter_s: float = 1e-6, node_size: int = 4) -> CostModel:
    """``make_cost`` where the token-wise layers take 8e-5 of local's 1e-4 seconds per token."""
    fit = RemapFit(
        linear_s_per_token=8e-5, intra_s_per_token=1e-7, inter_s_per_token=inter_s, fixed_s=1e-5, node_size=node_size
    )
    return replace(make_cost(num_ranks, kinds=(RING,)), remap=fit)


def plan_zeppelin(lengths: list[int], num_ranks: int, cost: CostModel, rank_tokens: int = 20_000) -> StepPlan:
    limits = replace(make_limits(rank_tokens=rank_tokens, kinds=(RING,)), devices_per_node=4)
    return plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy="zeppelin")


def moved(plan: StepPlan) -> int:
    return sum(tokens for microbatch in plan.microbatches for _, _, tokens in microbatch.moves)


def test_a_price_worked_out_by_hand() -> None:
    cost = remap_cost(8)
    groups = (GroupChoice(LOCAL, (0,), (0,)), GroupChoice(LOCAL, (1,), (1,)), GroupChoice(LOCAL, (4,), (2,)))
    lengths = [1000, 100, 50]
    plain = price_choice(groups, lengths, cost)
    price = price_choice(groups, lengths, cost, ((0, 1, 300), (0, 4, 200)))
    exchange_s = 300 * 1e-7 + 200 * 1e-6
    assert price.ranks == (0, 1, 4) and price.rank_tokens == (1000, 400, 250)  # the fuller layout
    assert [after - before for after, before in zip(price.rank_s, plain.rank_s, strict=True)] == pytest.approx(
        [-500 * 8e-5 + exchange_s + 1e-5, 300 * 8e-5 + 300 * 1e-7 + 1e-5, 200 * 8e-5 + 200 * 1e-6 + 1e-5]
    )
    with pytest.raises(PlanError, match="does not price moving tokens"):
        price_choice(groups, lengths, replace(cost, remap=None), ((0, 1, 300),))


def test_moves_are_planned_where_they_pay_and_only_there() -> None:
    """One long sequence whose work outweighs its tokens leaves its ranks with few tokens and the others with many."""
    lengths = [14_000, *[700] * 90]
    cheap, dear = remap_cost(8), remap_cost(8, inter_s=1e-3)
    dear = replace(dear, remap=replace(dear.remap, intra_s_per_token=1e-3))  # type: ignore[type-var]
    none = replace(cheap, remap=None)
    plans = {name: plan_zeppelin(lengths, 8, cost) for name, cost in (("cheap", cheap), ("dear", dear), ("no", none))}
    assert moved(plans["cheap"]) > 0 == moved(plans["dear"]) == moved(plans["no"])
    assert plans["cheap"].predicted_s < plans["no"].predicted_s == plans["dear"].predicted_s
    assert "tokens moved for the token-wise layers" in plans["cheap"].solver.note
    for microbatch in plans["cheap"].microbatches:
        after = dict.fromkeys(microbatch.ranks, 0)
        for group in microbatch.groups:
            for index in group.sequences:
                for rank in group.ranks:
                    after[rank] += lengths[index] / group.degree
        for source, destination, tokens in microbatch.moves:
            after[source] -= tokens
            after[destination] += tokens
        assert max(after.values()) - min(after.values()) < 2 + len(microbatch.groups)
    equal = plan_zeppelin([700] * 80, 8, cheap)
    assert moved(equal) == 0  # nothing to even out


def test_a_plan_with_moves_is_stored_and_one_without_is_what_it_was() -> None:
    plan = plan_zeppelin([14_000, *[700] * 90], 8, remap_cost(8))
    assert plan_from_json(plan_to_json(plan)) == plan
    bare = replace(plan, microbatches=tuple(replace(each, moves=()) for each in plan.microbatches))
    assert '"moves"' in plan_to_json(plan) and '"moves"' not in plan_to_json(bare)
    assert plan_digest(bare) != plan_digest(plan)


@given(st.integers(0, 10**6), st.sampled_from([2, 5, 8, 16]), st.integers(1, 50), st.sampled_from([400, 3000, 50_000]))
@settings(max_examples=40, deadline=None)
def test_zeppelin_with_remap_is_legal_and_never_below_its_bound(
    seed: int, num_ranks: int, num_sequences: int, rank_tokens: int
) -> None:
    lengths = skewed_lengths(seed, num_sequences, rank_tokens * num_ranks)
    plan = plan_zeppelin(lengths, num_ranks, remap_cost(num_ranks), rank_tokens)  # verified
    assert 0 < plan.solver.bound_s <= plan.predicted_s * (1 + 1e-9)
    plain = plan_zeppelin(lengths, num_ranks, replace(remap_cost(num_ranks), remap=None), rank_tokens)
    assert plan.predicted_s <= plain.predicted_s * (1 + 1e-9)


def with_remap(case: Case) -> Case:
    least_s = min(fit.degree * fit.s_per_token for fit in case.cost.times)
    fit = RemapFit(
        linear_s_per_token=least_s, intra_s_per_token=0.0, inter_s_per_token=0.0, fixed_s=0.0, node_size=3
    )
    cost = replace(case.cost, remap=fit)
    return replace(case, cost=cost, plan=replace(case.plan, cost_digest=cost.digest))


@given(st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_no_moves_of_any_plan_beat_the_bound(seed: int) -> None:
    """Free moves of nearly all linear work, the hardest case."""
    rng = random.Random(seed)
    case = with_moves(rng, with_remap(random_case(rng)))
    limits = replace(case.limits, device_budget_bytes=max(case.limits.device_budget_bytes, case.plan.peak_bytes))
    verify_plan(case.plan, step_problem(case.lengths, case.num_ranks, case.cost, limits))
    kinds = {(fit.kind, fit.degree) for fit in case.cost.times if fit.degree <= case.num_ranks}
    shapes = [shape_of(kind, degree, case.cost, limits) for kind, degree in sorted(kinds)]
    bound_s = remap_bound_s(
        step_problem(case.lengths, case.num_ranks, case.cost, limits), [shape for shape in shapes if shape]
    )
    simulation = simulate(case.plan, case.cost)
    assert 0 < bound_s <= (simulation.step_s - case.cost.step_fixed_s) * (1 + 1e-9)
    busy_s = sum(
        sum(price_choice(
            tuple(GroupChoice(g.kind, g.ranks, g.sequences) for g in batch.groups), case.lengths, case.cost, batch.moves
        ).rank_s) for batch in case.plan.microbatches
    )
    bare_s = sum(
        sum(price_choice(
            tuple(GroupChoice(g.kind, g.ranks, g.sequences) for g in batch.groups), case.lengths, case.cost
        ).rank_s) for batch in case.plan.microbatches
    )
    assert busy_s == pytest.approx(bare_s, rel=1e-6)  # moves are free here: work changes hands, it does not shrink


def test_moves_beat_the_bound_of_plans_without_them() -> None:
    """One sequence on one of eight ranks, which gives its token-wise work away: the bound has to allow for it."""
    cost, limits, lengths = remap_cost(8, inter_s=0.0), make_limits(), [1000]
    local = shape_of(LOCAL, 1, cost, limits)
    assert local is not None
    groups = (GroupChoice(LOCAL, (0,), (0,)),)
    price = price_choice(groups, lengths, cost)
    attention_s = price.seconds - 1000 * 8e-5
    assert step_bound_s(lengths, [local], 8) == pytest.approx(price.seconds)
    assert remap_bound_s(step_problem(lengths, 8, cost, limits), [local]) == pytest.approx(attention_s)


ILLEGAL = {
    "does not price moving tokens": ((0, 1, 5),),
    "names rank 9, which is not a rank of the microbatch": ((0, 9, 5),),
    "rank 1 both sends and receives": ((0, 1, 5), (1, 2, 5)),
    "two moves between the same ranks": ((0, 1, 5), (0, 1, 6)),
    "move 0 -> 1 of 0 tokens": ((0, 1, 0),),
    r"rank 0 moves 100000 tokens, it holds \d+": ((0, 1, 100_000),),
    "microbatch 0: predicted_s is stated as": ((0, 1, 5),),
}


@pytest.mark.parametrize("message", ILLEGAL)
def test_illegal_moves_are_refused(message: str) -> None:
    cost, lengths = remap_cost(8), [14_000, *[700] * 90]
    plan = plan_zeppelin(lengths, 8, cost)
    microbatches = (replace(plan.microbatches[0], moves=ILLEGAL[message]), *plan.microbatches[1:])
    checked = replace(cost, remap=None) if message.startswith("does not price") else cost
    illegal = replace(plan, microbatches=microbatches, cost_digest=checked.digest)
    limits = replace(make_limits(rank_tokens=20_000, kinds=(RING,)), devices_per_node=4)
    with pytest.raises(PlanError, match=message):
        verify_plan(illegal, step_problem(lengths, 8, checked, limits))


def test_a_full_rank_takes_no_tokens() -> None:
    """Memory counts the fuller of both layouts."""
    cost, lengths = remap_cost(4), [2000, 100]
    limits = make_limits(rank_tokens=2000, kinds=(RING,))
    plan = plan_step(step_problem(lengths, 2, cost, limits), step=0, strategy="zeppelin")
    groups = (GroupChoice(LOCAL, (0,), (0,)), GroupChoice(LOCAL, (1,), (1,)))
    price, moves = price_with_moves(groups, step_problem(lengths, 2, cost, limits))
    assert moves == ((0, 1, 950),) and price.rank_tokens == (2000, 1050)
    assert max(price_choice(groups, lengths, cost, ((1, 0, 100),)).rank_tokens) == 2100
    assert plan.peak_bytes <= limits.device_budget_bytes


def test_derived_cost_models_price_remap() -> None:
    cost = derive_cost(load_cluster("h200-64"), load_model("llama-3-8b"), num_ranks=64)
    fit, local = cost.remap, cost.time_fit(LOCAL, 1)
    assert fit is not None and fit.linear_s_per_token == local.s_per_token and fit.node_size == 8
    # q, k, v and the output, forward and backward: 2 * (2 * 32 + 2 * 8) heads of 128, 2 bytes, 32 layers
    assert fit.intra_s_per_token * 360e9 == pytest.approx(2 * 80 * 128 * 2 * 32)
    assert fit.inter_s_per_token * 47e9 == pytest.approx(2 * 80 * 128 * 2 * 32)
    with pytest.raises(SpecError, match="linear_s_per_token is above all of local 1's s_per_token"):
        replace(cost, remap=replace(fit, linear_s_per_token=2 * local.s_per_token))
    with pytest.raises(SpecError, match="a node needs at least 1 data rank"):
        replace(fit, node_size=0)
