"""Chunks chosen by plans: shapes, prices and proofs agree, nothing illegal passes, and nothing gets worse."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.chunk_fit import ChunkFit
from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, PlanError, SpecError
from planner.inputs.files import load_cluster, load_model
from planner.pages.policy_words import policy_line, policy_name
from planner.plan import AttentionKind, MemoryAction, MemoryPolicy, Sharding, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.microbatch import price_groups, price_microbatch
from planner.pricing.verify import verify_plan
from planner.replay.step import replay_step
from planner.schedules.layout import local_token_counts
from planner.step_planner import greedy_step, plan_step
from planner.strategies.adaptive.space import every_policy, every_shape, search_space
from planner.strategies.search.bounds import step_bound_s
from planner.strategies.search.chunk_shapes import chunk_sizes, chunked_shapes, in_chunks
from planner.strategies.search.shapes import price_table
from tests.planner.brute_force import Group, GroupsOf, best_makespan_s, kept_groups
from tests.planner.pages.test_policy_words import planned
from tests.planner.random_plans import reprice
from tests.planner.step_cases import (
    RING,
    ULYSSES,
    make_cost,
    make_limits,
    skewed_lengths,
    with_activation,
    with_chunks,
    with_policies,
)
from tests.plans import step_problem
from tests.work import count_calls

KEEP, SWAP, RECOMPUTE, CHUNK = MemoryAction
BOTH = (ULYSSES, RING)
LENGTHS = st.lists(st.integers(1, 60_000), min_size=1, max_size=12)


def plan(
    lengths: list[int], num_ranks: int, cost: CostModel, limits: PlanLimits, strategy: str = "adaptive"
) -> StepPlan:
    return plan_step(step_problem(lengths, num_ranks, cost, limits), step=0, strategy=strategy)


def sizes_of(found: StepPlan) -> set[int]:
    return {microbatch.memory.chunk_tokens for microbatch in found.microbatches} - {0}


@given(LENGTHS, st.sampled_from([600, 4096]), st.sampled_from([0.0, 1e-3, 0.4]), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_what_a_shape_in_chunks_says_is_what_the_plan_costs(
    lengths: list[int], rank_tokens: int, s_per_chunk: float, num_kv_heads: int
) -> None:
    """Loads up to the capacity: the sequences fit the budget in chunks of that size, for the seconds of the table."""
    cost = with_chunks(make_cost(6, kinds=BOTH), s_per_chunk=s_per_chunk, num_kv_heads=num_kv_heads)
    limits = with_policies(make_limits(kinds=BOTH, rank_tokens=rank_tokens), CHUNK)
    shapes = chunked_shapes(every_shape(step_problem([1], 6, cost, limits)), cost, limits)
    assert {shape.chunk_tokens for shape in shapes} == set(chunk_sizes(cost, limits))
    for shape in shapes:
        table = price_table(lengths, (shape,))
        rows = [row for row in range(len(lengths)) if table.load_tokens[: row + 1].sum() <= shape.capacity_tokens]
        if not rows:
            continue
        groups = [GroupChoice(shape.kind, tuple(range(shape.degree)), tuple(rows), in_chunks(shape.chunk_tokens))]
        found = assemble_plan(
            step=0, strategy="test", num_ranks=6, lengths=[lengths[row] for row in rows], groups=groups, cost=cost,
            status=SolveStatus.GREEDY, bound_s=0.0, wall_s=0.0,
        )
        verify_plan(found, step_problem([lengths[row] for row in rows], 6, cost, limits))
        seconds = float(table.marginal_s[rows].sum()) + shape.fit.fixed_s
        assert found.microbatches[0].predicted_s == pytest.approx(seconds, rel=1e-12)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 5000), st.sampled_from(BOTH))
@settings(max_examples=100, deadline=None)
def test_the_price_is_another_forward_and_something_a_chunk(
    lengths: list[int], degree: int, chunk_tokens: int, kind: AttentionKind
) -> None:
    """Counted chunk by chunk, as the runtime cuts them; the price is at most one chunk above."""
    kind = kind if degree > 1 else AttentionKind.LOCAL
    cost = with_chunks(make_cost(5, kinds=BOTH))
    groups = [GroupChoice(kind, tuple(range(degree)), tuple(range(len(lengths))), in_chunks(chunk_tokens))]
    found = assemble_plan(
        step=0, strategy="test", num_ranks=5, lengths=lengths, groups=groups, cost=cost, status=SolveStatus.GREEDY,
        bound_s=0.0, wall_s=0.0,
    )
    (microbatch,) = found.microbatches
    kept = price_microbatch(replace(microbatch, memory=MemoryPolicy()), lengths, cost).seconds
    fit, total = cost.time_fit(kind, degree), sum(lengths)
    num_chunks = -(-total // (chunk_tokens * degree))
    again = 2 / 7 * fit.s_per_token2 * sum(size * size for size in lengths) + fit.s_per_token * total / 3
    assert kept + again + 1e-3 * num_chunks <= microbatch.predicted_s * (1 + 1e-12)
    assert microbatch.predicted_s <= (kept + again + 1e-3 * (num_chunks + 1)) * (1 + 1e-12)
    tokens = max(local_token_counts(kind, degree, lengths))
    wide = degree if kind is RING else 0
    resident = 3000 * (degree / 2 if kind is ULYSSES and degree > 2 and degree % 2 == 0 else 1)
    if kind is not ULYSSES or degree in (2, 4):
        held = min(chunk_tokens, tokens) * (21_000 + 500 * wide) + resident * tokens
        assert microbatch.peak_bytes == pytest.approx(10**8 + held, abs=1)


@given(
    st.integers(0, 10**6), st.integers(1, 10), st.integers(1, 40), st.sampled_from([1e-3, 0.3]),
    st.sampled_from([600, 4096]), st.sampled_from([(CHUNK,), tuple(MemoryAction)]), st.sampled_from(list(Sharding)),
    st.sampled_from([0, 500, 10**6]),
)
@settings(max_examples=40, deadline=None)
def test_plans_with_chunks_are_legal_and_never_worse_than_without(
    seed: int, num_ranks: int, num_sequences: int, fixed_s: float, rank_tokens: int, allowed: tuple[MemoryAction, ...],
    sharding: Sharding, host_tokens: int,
) -> None:
    lengths = skewed_lengths(seed, num_sequences, 3 * rank_tokens * min(num_ranks, 4))
    cost = replace(with_chunks(with_activation(make_cost(num_ranks, kinds=BOTH, fixed_s=fixed_s))), sharding=sharding)
    limits = with_policies(
        make_limits(kinds=BOTH, rank_tokens=rank_tokens, max_nodes=5), *allowed, host_tokens=host_tokens
    )
    without = replace(limits, policies=tuple(action for action in limits.policies if action is not CHUNK))
    ours = plan(lengths, num_ranks, cost, limits)  # plan_step verifies it
    assert sizes_of(ours) <= set(chunk_sizes(cost, limits))
    verify_plan(
        greedy_step(step_problem(lengths, num_ranks, cost, limits), step=0),
        step_problem(lengths, num_ranks, cost, limits),
    )
    try:
        other = plan(lengths, num_ranks, cost, without)
    except InfeasibleError:
        return
    assert ours.predicted_s <= other.predicted_s * (1 + 1e-9)
    assert ours.solver.bound_s <= other.predicted_s * (1 + 1e-9)


@given(
    st.integers(1, 3), st.lists(st.integers(1, 12_000), min_size=1, max_size=3), st.sampled_from([0.0, 2e-3, 0.3]),
    st.sampled_from([700, 2000]), st.sampled_from([(ULYSSES,), (RING,)]), st.sampled_from([0.0, 1e-3]), st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_bound_and_plan_agree_with_every_plan_there_is(
    num_ranks: int, lengths: list[int], fixed_s: float, rank_tokens: int, kinds: tuple[AttentionKind, ...],
    s_per_chunk: float, lockstep: bool,
) -> None:
    lengths = [min(size, 3 * num_ranks * rank_tokens) for size in lengths]
    cost = with_chunks(make_cost(num_ranks, kinds=kinds, fixed_s=fixed_s), s_per_chunk=s_per_chunk)
    if lockstep:
        cost = replace(cost, sharding=Sharding.ZERO3)
    limits = with_policies(make_limits(kinds=kinds, rank_tokens=rank_tokens), CHUNK)
    groups = chunk_groups(num_ranks, rank_tokens, cost, limits)
    best_s = best_makespan_s(lengths, groups, num_ranks, rank_tokens, lockstep=lockstep)
    ours = plan(lengths, num_ranks, cost, limits)
    space = search_space(step_problem(lengths, num_ranks, cost, limits))
    assert space.bound_s <= best_s * (1 + 1e-9)
    if not lockstep:
        assert step_bound_s(lengths, every_policy(step_problem([1], num_ranks, cost, limits)), num_ranks) <= best_s * (
            1 + 1e-9
        )
    assert ours.solver.bound_s - cost.step_fixed_s <= best_s * (1 + 1e-9)
    assert ours.predicted_s >= (best_s + cost.step_fixed_s) * (1 - 1e-6)


def chunk_groups(num_ranks: int, rank_tokens: int, cost: CostModel, limits: PlanLimits) -> GroupsOf:
    """``kept_groups``, and the same groups in chunks of each size that is searched, with about one token of slack."""
    shapes = every_shape(step_problem([1], num_ranks, cost, limits))
    kept, budget = kept_groups(shapes, num_ranks, rank_tokens), limits.device_budget_bytes

    def groups_of(sizes: list[int]) -> list[Group]:
        groups = kept(sizes)
        for shape in shapes:
            tokens = local_token_counts(shape.kind, shape.degree, sizes)
            for size in chunk_sizes(cost, limits):
                num_chunks = sum(sizes) / (size * shape.degree) + 1
                fit = cost.time_fit(shape.kind, shape.degree)
                seconds = fit.s_per_token2 * sum(s * s for s in sizes) * 9 / 7 + fit.s_per_token * sum(sizes) * 4 / 3
                seconds += fit.s_per_sequence * len(sizes) + cost.chunks.s_per_chunk * (num_chunks - 1)
                needed = cost.device_bytes(max(tokens), in_chunks(size), shape.kind, shape.degree)
                groups += [
                    Group(ranks, seconds, fit.fixed_s + cost.chunks.s_per_chunk, tokens, needed <= budget - 30_000,
                          kept=False)
                    for ranks in combinations(range(num_ranks), shape.degree)
                ]
        return groups

    return groups_of


def test_only_chunks_make_it_fit() -> None:
    cost = with_chunks(with_activation(make_cost(1)))
    limits = with_policies(make_limits(rank_tokens=2000), host_tokens=0)
    kept = replace(limits, policies=(KEEP, SWAP, RECOMPUTE))
    for strategy in ("adaptive", "greedy"):
        with pytest.raises(InfeasibleError):
            step(strategy, [9000], cost, kept)
        (microbatch,) = step(strategy, [9000], cost, limits).microbatches
        assert microbatch.memory == in_chunks(476)  # 38 MB: a quarter, 21 kB each, beside 27 MB of K/V
        assert microbatch.peak_bytes <= limits.device_budget_bytes
        (least,) = step(strategy, [4000], cost, limits).microbatches
        assert (least.memory.chunk_tokens, least.memory.recompute_fraction) == (0, 1.0)
        for size, chunk_tokens in ((6600, 952), (2000, 0)):  # the largest that leave room; nothing where all fits
            (alone,) = step(strategy, [size], cost, with_policies(limits, CHUNK)).microbatches
            assert alone.memory.chunk_tokens == chunk_tokens
    with pytest.raises(InfeasibleError, match=r"sequence 0 \(13500 tokens\) fits in no group: local degree 1 needs "):
        step("adaptive", [13_500], cost, limits)


def step(strategy: str, lengths: list[int], cost: CostModel, limits: PlanLimits) -> StepPlan:
    if strategy == "greedy":
        return greedy_step(step_problem(lengths, 1, cost, limits), step=0)
    return plan(lengths, 1, cost, limits)


def test_what_no_single_way_holds_is_refused_by_name() -> None:
    """On one rank all sequences run in one way. The long one hides its copies, the other is too short for that and has
    to run in chunks, which the long one does not fit."""
    cost = with_chunks(with_activation(make_cost(1)))
    fit = replace(cost.activation, recompute_bytes_per_token=0.0, copy_bytes_per_s=9e7)
    limits = with_policies(make_limits(rank_tokens=2000), SWAP, CHUNK)
    for lengths in ([15_000], [4000]):
        assert plan(lengths, 1, replace(cost, activation=fit), limits).microbatches
    with pytest.raises(InfeasibleError, match=r"sequence 0 \(15000 tokens\) fits in no group"):
        plan([15_000, 4000], 1, replace(cost, activation=fit), limits)


def test_chunks_spare_ranks() -> None:
    """Long sequences on ranks alone, where keeping one takes five, whose messages cost more than a forward."""
    slow = make_cost(8, kinds=(RING,))
    slow = replace(slow, times=tuple(
        replace(fit, s_per_token=fit.s_per_token + (3e-4 if fit.degree > 1 else 0)) for fit in slow.times
    ))
    cost, limits = with_chunks(slow), make_limits(kinds=(RING,), rank_tokens=2000)
    lengths = [9000] * 8
    kept, free = plan(lengths, 8, cost, limits), plan(lengths, 8, cost, with_policies(limits, CHUNK))
    assert free.predicted_s < 0.9 * kept.predicted_s
    assert sizes_of(free) and not sizes_of(kept)
    ours = with_policies(limits, CHUNK)
    line = policy_line([planned(lengths, "adaptive", cost, ours, 8)], cost, ours)
    assert "run in chunks of " in line and " tokens per rank: " in line
    assert "to need fewer ranks (1 instead of 5 for 9K tokens)" in line


def test_where_memory_is_ample_no_chunk_is_looked_at() -> None:
    cost, limits = with_activation(make_cost(8, kinds=BOTH)), make_limits(kinds=BOTH, rank_tokens=10**6)
    lengths, allowed = skewed_lengths(5, 100, 9000), with_policies(limits)
    without = search_space(step_problem(lengths, 8, cost, allowed))
    assert search_space(step_problem(lengths, 8, with_chunks(cost), allowed)) == without
    assert plan(lengths, 8, with_chunks(cost), allowed).microbatches == plan(lengths, 8, cost, allowed).microbatches
    problems = [step_problem(lengths, 8, each, allowed) for each in (cost, with_chunks(cost))]
    work = [count_calls(partial(search_space, problem)) for problem in problems]
    assert work[1] <= 1.25 * work[0]  # a few comparisons for each shape; of the whole plan it is 2 %


def test_where_recomputing_does_it_for_less_chunks_are_left_out() -> None:
    cost = with_chunks(with_activation(make_cost(16, kinds=BOTH, fixed_s=0.3)))
    limits = with_policies(make_limits(kinds=BOTH, rank_tokens=1000))
    assert not sizes_of(plan([12_000, 9000, *skewed_lengths(3, 200, 6000)], 16, cost, limits))


CHUNKED = with_chunks(with_activation(make_cost(2, kinds=BOTH)))
SCARCE = with_policies(make_limits(kinds=BOTH, rank_tokens=2000), host_tokens=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": replace(SCARCE, policies=(KEEP, RECOMPUTE))}, "memory policy chunk is not allowed here "
         ".allowed: keep, recompute."),
        ({"cost": replace(CHUNKED, chunks=None)}, "microbatch 0: the cost model does not price chunks of 476 tokens"),
        ({"memory": MemoryPolicy(keep_fraction=0.5, recompute_fraction=0.5, chunk_tokens=476)},
         "microbatch 0: chunks together with swapped or recomputed activations cannot be run"),
        ({"memory": MemoryPolicy(chunk_tokens=-4)}, "microbatch 0: chunk_tokens must be 0 .whole. or more, got -4"),
        ({"memory": MemoryPolicy(chunk_tokens=1900)}, "microbatch 0: rank 0 holds 9000 tokens and needs"),
        ({"limits": replace(SCARCE, device_budget_bytes=10**8)}, "rank 0 holds 9000 tokens and needs"),
    ],
)
def test_illegal_chunks_are_refused_in_one_line(change: dict[str, object], message: str) -> None:
    cost, limits = change.get("cost", CHUNKED), change.get("limits", SCARCE)
    found = chunked_plan([9000, 8000], [(0,), (1,)], CHUNKED)
    verify_plan(found, step_problem([9000, 8000], 2, CHUNKED, SCARCE))
    if "memory" in change:
        first = replace(found.microbatches[0], memory=change["memory"])
        found = replace(found, microbatches=(first, *found.microbatches[1:]))
        if first.memory.chunk_tokens == 1900:
            found = reprice(found, CHUNKED)
    with pytest.raises(PlanError, match=message) as caught:
        verify_plan(found, step_problem([9000, 8000], 2, cost, limits))
    assert "\n" not in str(caught.value)


def chunked_plan(lengths: list[int], ranks: list[tuple[int, ...]], cost: CostModel) -> StepPlan:
    groups = [GroupChoice(AttentionKind.LOCAL, own, (index,), in_chunks(476)) for index, own in enumerate(ranks)]
    return assemble_plan(
        step=0, strategy="test", num_ranks=2, lengths=lengths, groups=groups, cost=cost, status=SolveStatus.GREEDY,
        bound_s=0.0, wall_s=0.0,
    )


def test_a_wrong_price_of_chunks_is_found() -> None:
    found = chunked_plan([9000, 8000], [(0,), (1,)], CHUNKED)
    first = replace(found.microbatches[0], predicted_s=found.microbatches[0].predicted_s * 1.001)
    with pytest.raises(PlanError, match="microbatch 0: predicted_s is stated as"):
        verify_plan(
            replace(found, microbatches=(first, *found.microbatches[1:])),
            step_problem([9000, 8000], 2, CHUNKED, SCARCE),
        )


def test_chunks_with_several_groups_are_neither_priced_nor_legal() -> None:
    found = chunked_plan([9000, 8000], [(0,), (1,)], CHUNKED)
    first, second = found.microbatches
    both = replace(first, ranks=(0, 1), groups=(*first.groups, *second.groups))
    with pytest.raises(PlanError, match="chunks are priced for one group on all of a microbatch's ranks, not with 2"):
        verify_plan(replace(found, microbatches=(both,)), step_problem([9000, 8000], 2, CHUNKED, SCARCE))
    with pytest.raises(PlanError, match="chunks are priced for microbatches of one group on all its ranks"):
        price_groups(both.ranks, both.groups, [9000, 8000], CHUNKED, both.memory)


def test_in_lockstep_chunks_share_no_round_with_what_is_recomputed() -> None:
    cost = replace(CHUNKED, sharding=Sharding.ZERO3)
    found = chunked_plan([9000, 4000], [(0,), (1,)], cost)
    recomputed = replace(found.microbatches[1], memory=MemoryPolicy(keep_fraction=0.0, recompute_fraction=1.0))
    mixed = reprice(replace(found, microbatches=(found.microbatches[0], recomputed)), cost)
    with pytest.raises(PlanError, match="microbatch 1 swaps or recomputes beside microbatch 0, which runs in chunks"):
        verify_plan(mixed, step_problem([9000, 4000], 2, cost, SCARCE))
    after = chunked_plan([9000, 4000], [(0,), (0,)], cost)  # one after the other: two rounds
    later = replace(after.microbatches[1], memory=recomputed.memory)
    apart = reprice(replace(after, microbatches=(after.microbatches[0], later)), cost)
    verify_plan(apart, step_problem([9000, 4000], 2, cost, SCARCE))


def test_in_lockstep_what_is_kept_beside_chunks_has_room_for_moving_queries() -> None:
    """A ring that fits alone, to the token, does not beside chunks; as plans make it, it fits."""
    cost = replace(with_chunks(make_cost(3, kinds=BOTH)), sharding=Sharding.ZERO3)
    limits = with_policies(make_limits(kinds=BOTH, rank_tokens=2000), CHUNK)
    lengths = [4000, 9000]
    groups = [GroupChoice(RING, (0, 1), (0,)), GroupChoice(AttentionKind.LOCAL, (2,), (1,), in_chunks(400))]
    found = assemble_plan(
        step=0, strategy="test", num_ranks=3, lengths=lengths, groups=groups, cost=cost, status=SolveStatus.GREEDY,
        bound_s=0.0, wall_s=0.0,
    )
    with pytest.raises(PlanError, match="microbatch 0: its ring 2 is one chunk in a round of zero3 .* needs 135 MiB"):
        verify_plan(found, step_problem(lengths, 3, cost, limits))
    assert sizes_of(plan(lengths, 3, cost, limits))  # verified by plan_step
    assert sizes_of(greedy_step(step_problem(lengths, 3, cost, limits), step=0))


@pytest.mark.parametrize(
    "change", [{"resident_bytes_per_token": -1.0}, {"again_linear": float("nan")}, {"num_kv_heads": 0}]
)
def test_impossible_chunks_are_refused(change: dict[str, float]) -> None:
    fit = CHUNKED.chunks
    assert fit is not None
    with pytest.raises(SpecError, match=next(iter(change))):
        replace(fit, **change)
    with pytest.raises(SpecError, match="running in chunks is not priced with pipeline stages"):
        replace(make_cost(1), chunks=fit, num_stages=2)


@pytest.mark.parametrize(
    ("num_kv_heads", "degree", "heads"), [(8, 1, 8), (8, 2, 4), (8, 8, 1), (8, 16, 1), (8, 6, 3), (8, 12, 2), (1, 4, 1)]
)
def test_exchanged_heads_that_do_not_suffice_are_kept_several_times(
    num_kv_heads: int, degree: int, heads: int
) -> None:
    fit = ChunkFit(
        resident_bytes_per_token=800.0, num_kv_heads=num_kv_heads, fixed_bytes=0, bytes_per_token=1.0,
        shared_bytes_per_token=0.0, again_attention=0.0, again_linear=0.0, s_per_chunk=0.0,
    )
    assert fit.kept_bytes_per_token(ULYSSES, degree) == 800 * heads * degree / num_kv_heads
    assert fit.kept_bytes_per_token(RING, degree) == 800


def test_derived_prices_are_those_of_the_digest() -> None:
    """Llama-3-8B in bf16: 128 KiB of K/V a token and twice that of fp32 dK/dV, beside 5.5 MiB of activations."""
    cost = derive_cost(load_cluster("h200-8"), load_model("llama-3-8b"), num_ranks=8)
    fit = cost.chunks
    assert fit is not None and fit.resident_bytes_per_token == 3 * 128 * 1024
    assert 1 < fit.bytes_per_token / cost.memory.bytes_per_token < 1.02
    local = cost.time_fit(AttentionKind.LOCAL, 1)
    assert fit.time_fit(local, 4096).fixed_s == pytest.approx(local.fixed_s * 7 / 3)
    assert any(note.startswith("chunks: one more forward") for note in cost.provenance.notes)
    assert derive_cost(load_cluster("h200-8"), load_model("llama-3-8b"), num_ranks=4, num_stages=2).chunks is None


@pytest.mark.parametrize("sharding", list(Sharding))
def test_the_replay_runs_forward_twice_and_holds_one_chunk(sharding: Sharding) -> None:
    """Against the same plan with everything kept, which would not fit: 9/7 of attention and 4/3 of all else."""
    cluster, model = load_cluster("h200-8"), load_model("llama-3-8b")
    cost = derive_cost(cluster, model, num_ranks=8, sharding=sharding)
    limits = PlanLimits(
        device_budget_bytes=128 * 2**30, max_ulysses_degree=32, kinds=BOTH, devices_per_node=8, policies=(CHUNK,)
    )
    found = plan([800_000], 8, cost, limits)
    (size,) = sizes_of(found)
    whole = reprice(replace(found, microbatches=tuple(replace(m, memory=MemoryPolicy()) for m in found.microbatches)),
                    cost)
    chunked, kept = (replay_step(each, cluster, model, cost.memory) for each in (found, whole))
    assert 1.25 < chunked.step_s / kept.step_s < 1.45
    assert 1 / 1.25 < chunked.step_s / found.predicted_s < 1.25
    token_bytes, tokens = cost.memory.bytes_per_token, 100_000
    held = size * token_bytes + tokens * 3 * 128 * 1024
    assert max(chunked.peak_bytes) == pytest.approx(cost.memory.fixed_bytes + held, rel=1e-3)
    assert max(kept.peak_bytes) == pytest.approx(cost.memory.fixed_bytes + tokens * token_bytes, rel=1e-3)


def test_names() -> None:
    assert policy_name(in_chunks(4096)) == "chunks of 4,096"
