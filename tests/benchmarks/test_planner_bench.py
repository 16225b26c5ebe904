"""The planner benchmark's peers: every plan legal, barriers never cheaper, partitions right; then one small row."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peers.karmarkar_karp import karmarkar_karp
from benchmarks.peers.planners import (
    PeerFailureError,
    Step,
    barrier_step_s,
    flexsp_published,
    karmarkar_karp_plan,
    megatron_core,
    megatron_core_rounds,
    peers,
    priced_rounds,
)
from benchmarks.planner import (
    COLUMNS,
    PUBLISHED,
    SCENARIOS,
    Result,
    Scenario,
    goal_lines,
    main,
    measure,
    read_batches,
)
from benchmarks.planner_any_ranks import random_batches, tally
from planner.plan import AttentionKind
from planner.pricing.assemble import GroupChoice
from planner.step_planner import STRATEGIES
from tests.planner.step_cases import LOCAL, RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem

weights = st.lists(st.integers(1, 10**6), min_size=1, max_size=40)


def step_of(lengths: list[int], num_ranks: int, *, rank_tokens: int = 4096, fixed_s: float = 2e-3) -> Step:
    kinds = (ULYSSES, RING)
    cost = make_cost(num_ranks, kinds=kinds, fixed_s=fixed_s)
    limits = make_limits(rank_tokens=rank_tokens, kinds=kinds, time_limit_s=60.0)
    return Step(0, step_problem(lengths, num_ranks, cost, limits))


@given(weights, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_karmarkar_karp_places_everything_within_the_largest_weight(sizes: list[int], num_parts: int) -> None:
    parts = karmarkar_karp(sizes, num_parts)
    assert len(parts) == num_parts
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in part) for part in parts]
    assert max(totals) - min(totals) <= max(sizes)
    assert karmarkar_karp(sizes, num_parts) == parts


def test_karmarkar_karp_by_hand() -> None:
    # 8 - 7 = 1, 6 - 5 = 1; 4, 1, 1: 4 - 1 = 3; 3 - 1 = 2: parts of 16 and 14 (the best are 15 and 15).
    sizes = [8, 7, 6, 5, 4]
    assert sorted(sum(sizes[index] for index in part) for part in karmarkar_karp(sizes, 2)) == [14, 16]
    assert karmarkar_karp([], 3) == [[], [], []]
    with pytest.raises(ValueError, match="at least 1 part"):
        karmarkar_karp(sizes, 0)


@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.sampled_from([2e-3, 0.2]))
@settings(max_examples=5, deadline=None)
def test_every_peer_runs_every_sequence_once(seed: int, num_ranks: int, fixed_s: float) -> None:
    lengths = skewed_lengths(seed, 24, 3 * num_ranks * 1024)
    step = step_of(lengths, num_ranks, fixed_s=fixed_s)
    for name, plan_peer in peers(solver_s=0.3).items():
        found = plan_peer(step)  # verified inside
        placed = [index for batch in found.plan.microbatches for group in batch.groups for index in group.sequences]
        assert sorted(placed) == list(range(len(lengths))), name
        assert found.step_s >= found.plan.predicted_s * (1 - 1e-12), name
        if name in ("karmarkar-karp", "static"):
            assert found.step_s == pytest.approx(found.plan.predicted_s, rel=1e-12)


def test_a_barrier_waits_for_the_slowest_group_of_each_round() -> None:
    step = step_of([4000, 1000, 1000, 4000], 2)
    rounds = [
        [GroupChoice(LOCAL, (0,), (0,)), GroupChoice(LOCAL, (1,), (1,))],
        [GroupChoice(LOCAL, (0,), (2,)), GroupChoice(LOCAL, (1,), (3,))],
    ]
    found = priced_rounds(step, "hand-made", rounds, 0.0)
    long_s, short_s = (step.problem.cost.group_s(LOCAL, 1, [size]) for size in (4000, 1000))
    assert found.step_s == pytest.approx(step.problem.cost.step_fixed_s + 2 * long_s)
    assert found.plan.predicted_s == pytest.approx(step.problem.cost.step_fixed_s + long_s + short_s)
    together = priced_rounds(step, "hand-made", [[group for groups in rounds for group in groups]], 0.0)
    assert together.step_s == pytest.approx(together.plan.predicted_s)
    with pytest.raises(ValueError, match="rounds of 2 microbatches in a plan of 4"):
        barrier_step_s(found.plan, [2], step.problem.cost)


def test_published_flexsp_pays_the_sum_of_its_rounds() -> None:
    # Memory allows one sequence of 4096 a rank: two rounds, each of them four times the same local group.
    step = step_of([4096] * 8, 4)
    found = flexsp_published(step, solver_s=5.0)
    alone_s = step.problem.cost.group_s(LOCAL, 1, [4096])
    assert found.step_s == pytest.approx(step.problem.cost.step_fixed_s + 2 * alone_s)


def test_published_flexsp_without_time_has_no_plan() -> None:
    with pytest.raises(PeerFailureError, match="no number of rounds"):
        flexsp_published(step_of([100] * 9, 4), solver_s=-1.0)


@given(st.integers(0, 10**6), st.sampled_from([4, 8]))
@settings(max_examples=10, deadline=None)
def test_megatron_core_keeps_its_own_assignment(seed: int, num_ranks: int) -> None:
    lengths = skewed_lengths(seed, 30, 4095 * num_ranks)
    step = step_of(lengths, num_ranks)
    rounds = megatron_core_rounds(lengths, num_ranks, max_rank_tokens=4095)
    plan = megatron_core(step).plan
    expected = Counter(
        (index, tuple(rank for rank in range(num_ranks) if index in assigned[rank]))
        for assigned in rounds for index in {index for sequences in assigned for index in sequences}
    )
    assert Counter((batch.groups[0].sequences[0], batch.ranks) for batch in plan.microbatches) == expected
    for batch in plan.microbatches:
        (group,) = batch.groups
        assert len(group.sequences) == 1  # one forward and backward for each sequence
        assert group.kind is (AttentionKind.RING if group.degree > 1 else AttentionKind.LOCAL)
        assert group.degree & (group.degree - 1) == 0
        assert lengths[group.sequences[0]] <= 4095 * group.degree


def test_megatron_core_fails_beyond_the_largest_power_of_two() -> None:
    lengths = [5000, 100, 100]  # five ranks' worth: 8 ranks or nothing
    with pytest.raises(PeerFailureError, match="Error"):
        megatron_core_rounds(lengths, 6, max_rank_tokens=1000)
    assert megatron_core_rounds(lengths, 8, max_rank_tokens=1000)


def test_karmarkar_karp_keeps_the_token_cap_and_refuses_what_fits_no_single_degree() -> None:
    step = step_of([4000, 3000, 2000, 1000, 900, 800], 2)
    for batch in karmarkar_karp_plan(step).plan.microbatches:
        assert sum(step.problem.lengths[index] for index in batch.groups[0].sequences) <= 4096 * len(batch.ranks)
    with pytest.raises(PeerFailureError, match="no single degree"):
        karmarkar_karp_plan(step_of([9000], 2))


def test_ours_plans_what_megatron_core_cannot() -> None:
    found = tally(6, 4, seed=1)
    assert found.our_failures == 0
    assert found.peer_failures.total() > 0
    assert found.row.startswith("| 6 | 4 | ")
    first, again = list(random_batches(3, 10_000, seed=5)), list(random_batches(3, 10_000, seed=5))
    assert first == again
    assert all(1 <= size <= 10_000 for lengths in first for size in lengths)


def test_held_out_batches_differ_and_repeat() -> None:
    tuned, held_out, again = (list(islice(read_batches(SCENARIOS[0], "github", seed), 2)) for seed in (0, 1, 1))
    assert held_out == again
    assert tuned != held_out
    assert all(len(step) == SCENARIOS[0].batch_sequences for step in tuned + held_out)
    with pytest.raises(SystemExit):
        main(["--seed", "0"])


def result_of(step_s: dict[str, list[float]], batches: str = "held out") -> Result:
    return Result(
        scenario=SCENARIOS[0], batches=batches, lengths="made-up", steps=[[10, 20], [30]], step_s=step_s,
        failures={"hdp": 1}, gaps=[0.0, 0.5], plan_s=[0.1, 0.3],
    )


def test_ratios_are_against_the_best_single_published_strategy() -> None:
    result = result_of({
        "adaptive": [1.0, 2.0], "static": [1.5, 2.4], "karmarkar-karp": [1.2, 3.6], "flexsp": [1.0, 2.0],
    })
    assert result.best_published == ("static", pytest.approx(1.3))  # not flexsp: that one is ours
    assert result.least_ratio == pytest.approx(1.2)
    assert result.headroom == pytest.approx(3.9 / 2.0)
    assert result.others(published=True) == "static 1.300, karmarkar-karp 1.600, hdp fails 1 of 2"
    assert result.others(published=False) == "flexsp 1.000"
    assert result.row.count(" | ") == len(COLUMNS) - 1
    (line,) = goal_lines([result])
    assert "1.300 in the mean over 1 length sets, goal 1.15 met" in line
    assert "never below 1: yes" in line
    (line,) = goal_lines([result_of({"adaptive": [1.0, 2.0], "static": [0.9, 2.4]})])
    assert "goal 1.15 NOT met" in line
    assert "least in a batch 0.9000, never below 1: NO" in line
    assert goal_lines([result_of({"adaptive": [1.0, 2.0]})]) == []


def test_a_small_row_has_every_strategy_and_peer() -> None:
    scenario = Scenario(cluster="h200-64", model="llama-3-8b", num_ranks=16, batch_sequences=24, max_tokens=2**15,
                      num_batches=1)
    steps = list(islice(read_batches(scenario, "prolong", 3), scenario.num_batches))
    result = measure(scenario, "held out", "prolong", steps, solver_s=0.3)
    assert set(result.step_s) | set(result.failures) == set(STRATEGIES) | set(PUBLISHED)
    assert set(PUBLISHED) <= set(result.step_s)
    assert result.headroom >= (result.least_ratio or 0.0)
