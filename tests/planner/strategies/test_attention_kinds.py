"""Kinds of attention as planners see them: who holds what, what it costs, which of them are worth trying."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import SpecError
from planner.inputs.files import load_cluster, load_model
from planner.plan import (
    AttentionGroup,
    AttentionKind,
    Microbatch,
    Sequence,
    SolveReport,
    SolveStatus,
    StepPlan,
    plan_digest,
    plan_from_json,
    plan_to_json,
)
from planner.pricing.verify import verify_plan
from planner.schedules.exchange import attention_kinds, attention_names
from planner.schedules.layout import local_token_counts, shard_spans, team_spans
from planner.schedules.wire_price import WireSetting
from planner.step_planner import plan_step
from planner.strategies.search.shapes import price_table, shape_of, shapes_of_degree
from tests.plans import step_problem

LOCAL, ULYSSES, RING, USP = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING, AttentionKind.USP
DOUBLE_RING, GROUP_CAST, ALL_GATHER = AttentionKind.DOUBLE_RING, AttentionKind.GROUP_CAST, AttentionKind.ALL_GATHER
KINDS = tuple(kind for kind in AttentionKind if kind is not LOCAL)
ROUTED_RING = AttentionKind.ROUTED_RING
RANK_TOKENS = 4096
lengths_lists = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 3000)), min_size=1, max_size=12)


def derived(num_ranks: int = 64, model: str = "llama-3-8b") -> CostModel:
    return derive_cost(load_cluster("h200-64"), load_model(model), num_ranks=num_ranks)


def limits_of(cost: CostModel, kinds: tuple[AttentionKind, ...] = KINDS, rank_tokens: int = RANK_TOKENS) -> PlanLimits:
    return PlanLimits(
        device_budget_bytes=cost.device_bytes(rank_tokens), max_ulysses_degree=32, kinds=kinds, devices_per_node=8
    )


@given(st.integers(1, 12), lengths_lists)
@settings(max_examples=60, deadline=None)
def test_members_of_a_team_share_its_rows_evenly(degree: int, lengths: list[int]) -> None:
    for inner_degree in (size for size in range(1, degree + 1) if degree % size == 0):
        group = AttentionGroup(
            kind=USP, ranks=tuple(range(degree)), sequences=tuple(range(len(lengths))), inner_degree=inner_degree
        )
        shards, teams = shard_spans(group, lengths), team_spans(group, lengths)
        counts = tuple(sum(span.num_tokens for span in spans) for spans in shards)
        assert counts == local_token_counts(USP, degree, lengths, inner_degree) and sum(counts) == sum(lengths)
        for team, spans in enumerate(teams):
            members = range(team * inner_degree, (team + 1) * inner_degree)
            tokens = [(s.sequence, t) for i in members for s in shards[i] for t in range(s.start_token, s.stop_token)]
            assert tokens == [(s.sequence, t) for s in spans for t in range(s.start_token, s.stop_token)]
            sizes = [counts[index] for index in members]
            assert max(sizes) - min(sizes) <= 1


@given(lengths_lists, st.sampled_from(KINDS), st.sampled_from([2, 3, 8, 12, 16, 24, 64]))
@settings(max_examples=150, deadline=None)
def test_what_loads_say_fits_does_fit(lengths: list[int], kind: AttentionKind, degree: int) -> None:
    cost = derived()
    shape = shape_of(kind, degree, cost, limits_of(cost))
    if shape is None:
        assert kind is ULYSSES
        return
    table = price_table(lengths, (shape,))
    counts = local_token_counts(kind, degree, lengths, shape.fit.inner_degree)
    if int(table.load_tokens[:, 0].sum()) <= shape.capacity_tokens:
        assert max(counts) <= RANK_TOKENS
    if len(lengths) == 1:  # exact for one sequence
        assert (max(counts) <= RANK_TOKENS) == bool(table.fits[0, 0])


@given(lengths_lists, st.integers(2, 64))
@settings(max_examples=100, deadline=None)
def test_a_shape_left_out_is_never_the_better_one(lengths: list[int], degree: int) -> None:
    cost = derived()
    limits = limits_of(cost)
    kept = shapes_of_degree(degree, cost, limits)
    assert kept
    totals = {}
    for shape in (shape_of(kind, degree, cost, limits) for kind in KINDS):
        if shape is not None:
            table = price_table(lengths, (shape,))
            fits = int(table.load_tokens.sum()) <= shape.capacity_tokens
            totals[shape.kind] = (fits, float(table.marginal_s.sum()) + shape.fit.fixed_s)
    best = {shape.kind for shape in kept}
    for fits, seconds in totals.values():
        if fits:
            assert any(totals[kind][0] and totals[kind][1] <= seconds for kind in best)


def test_each_kind_is_priced_for_what_it_is_good_at() -> None:
    cost = derived()
    token_s = cost.time_fit(LOCAL, 1).s_per_token

    def wire_s(kind: AttentionKind, degree: int) -> float:
        """Seconds that sharing one token in the group adds to its compute, times the degree."""
        return cost.time_fit(kind, degree).s_per_token * degree - token_s

    assert wire_s(GROUP_CAST, 8) == pytest.approx(wire_s(RING, 8))  # one node: its last rank needs all keys as well
    assert 8 / 15 < wire_s(GROUP_CAST, 16) / wire_s(RING, 16) < 0.6  # 8 remote blocks by its own NIC
    assert wire_s(DOUBLE_RING, 16) < 0.4 * wire_s(RING, 16)  # each block enters a node once
    assert wire_s(ROUTED_RING, 64) <= wire_s(DOUBLE_RING, 64) < wire_s(RING, 64)  # all NICs instead of one
    assert wire_s(ROUTED_RING, 8) == wire_s(RING, 8) and wire_s(ROUTED_RING, 13) == wire_s(RING, 13)  # none routed
    assert wire_s(USP, 16) < min(wire_s(RING, 16), wire_s(ULYSSES, 16))
    setting = WireSetting(
        cluster=load_cluster("h200-64"), model=load_model("llama-3-8b"), tensor_parallel=1, element_bytes=2
    )
    transfer_s = 4 * 7 / 8 * setting.kv_bytes / setting.cluster.intra_node.bytes_per_s
    assert wire_s(RING, 8) == pytest.approx(8 * setting.rounds_s(8, 1))  # in one node all is hidden
    assert wire_s(ALL_GATHER, 8) == pytest.approx(wire_s(RING, 8) + 8 * transfer_s)  # nothing hidden ...
    assert cost.time_fit(ALL_GATHER, 8).fixed_s < cost.time_fit(RING, 8).fixed_s  # ... but few messages in a row
    assert cost.time_fit(USP, 16).inner_degree == cost.time_fit(DOUBLE_RING, 16).inner_degree == 8
    assert cost.time_fit(USP, 13).s_per_token == cost.time_fit(RING, 13).s_per_token  # no team fits: a ring


def test_where_cards_are_slow_all_of_them_pay_off() -> None:
    """Slow enough that transfers, not kernels, decide."""
    cluster = load_cluster("h200-64")
    slow = replace(cluster, inter_node=replace(cluster.inter_node, bytes_per_s=cluster.inter_node.bytes_per_s / 4))
    cost = derive_cost(slow, load_model("llama-3-8b"), num_ranks=64)
    ring, double, routed = (cost.time_fit(kind, 64).s_per_token for kind in (RING, DOUBLE_RING, ROUTED_RING))
    assert routed < double < ring / 4  # stages overlap, hops do not


def test_uneven_heads_slow_a_team_down() -> None:
    model = replace(load_model("llama-3-8b"), num_query_heads=12, num_kv_heads=4)
    cost = derive_cost(load_cluster("h200-64"), model, num_ranks=64)
    attention_s = cost.time_fit(LOCAL, 1).s_per_token2
    assert cost.time_fit(USP, 16).s_per_token2 * 16 == pytest.approx(attention_s * 16 / 12)  # 2 heads on some


def test_more_kinds_never_make_a_worse_plan() -> None:
    cost = derived()
    lengths = [200_000, 60_000, *[9000] * 6, *[700] * 50]
    predicted = {}
    for kinds in ((RING,), (ULYSSES, RING), attention_kinds("auto")):
        limits = limits_of(cost, kinds, rank_tokens=16_000)
        for strategy in ("adaptive", "static"):
            plan = plan_step(step_problem(lengths, 64, cost, limits), step=0, strategy=strategy)
            verify_plan(plan, step_problem(lengths, 64, cost, limits))
            predicted[kinds, strategy] = plan.predicted_s
            used = {group.kind for microbatch in plan.microbatches for group in microbatch.groups}
            assert used <= {LOCAL, *kinds}
    for strategy in ("adaptive", "static"):
        ring, both, every = (seconds for (_, name), seconds in predicted.items() if name == strategy)
        assert every < both <= ring


def test_names() -> None:
    names = ("ulysses", "ring", "usp", "double_ring", "group_cast", "all_gather", "routed_ring")
    assert attention_names() == ("auto", *names)
    assert attention_kinds("auto") == tuple(kind for kind in map(AttentionKind, names) if kind is not ALL_GATHER)
    assert all(attention_kinds(name) == (AttentionKind(name),) for name in attention_names()[1:])
    with pytest.raises(SpecError, match="--attention: 'local' is none of auto, ulysses"):
        attention_kinds("local")


def test_stored_plans_and_cost_models_keep_their_digests() -> None:
    """Digests made before ``inner_degree`` existed; where it is not 1 it counts."""
    group = AttentionGroup(kind=RING, ranks=(0, 1), sequences=(0,))
    plan = StepPlan(
        step=1, strategy="x", num_ranks=2, sequences=(Sequence(0, 5),),
        microbatches=(Microbatch(ranks=(0, 1), groups=(group,), predicted_s=1.0, peak_bytes=3),), predicted_s=1.5,
        peak_bytes=3, cost_digest="c", solver=SolveReport(status=SolveStatus.GREEDY, objective_s=1.5, bound_s=0.5),
    )
    text = plan_to_json(plan)
    assert "inner_degree" not in text and plan_from_json(text) == plan
    assert plan_digest(plan) == "223ceb669cb36bf2c869f539ed64941820af9a681cbefe52d322ea67cc800889"
    cost = derived()
    old = replace(
        cost, times=tuple(fit for fit in cost.times if fit.kind in (LOCAL, ULYSSES)),
        provenance=replace(cost.provenance, notes=()), activation=None, remap=None, chunks=None,
    )
    assert old.digest == "5ec0b3c342fcbfe424354ff7deca28d304a7f2917c9b95a6f6676ca08fc8b295"
    inner = replace(group, kind=USP, inner_degree=2)
    other = replace(plan, microbatches=(replace(plan.microbatches[0], groups=(inner,)),))
    assert '"inner_degree":2' in plan_to_json(other) and plan_from_json(plan_to_json(other)) == other


def test_an_inner_degree_that_does_not_divide_is_refused() -> None:
    fit = derived().time_fit(USP, 16)
    with pytest.raises(SpecError, match="usp of degree 16: inner_degree 3 does not divide it"):
        replace(fit, inner_degree=3)
