"""zero3: all ranks move in lockstep, every plan is priced so, and adaptive stays ahead."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.model import CostModel
from planner.measured.drift import planned_span_s, planned_times
from planner.plan import AttentionKind, Sharding, SolveStatus
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.lockstep import lockstep_rounds
from planner.pricing.simulate import simulate
from planner.step_planner import plan_step
from planner.strategies.adaptive.lockstep import SHARES, SKIPPED, SLACKS, STRETCHES, in_order
from planner.strategies.adaptive.priced_step import Batch, PricedStep
from planner.strategies.adaptive.rounds import Packer, Round, rounds_s
from planner.strategies.adaptive.shorten import Schedule
from planner.strategies.adaptive.space import every_shape
from planner.strategies.search.shapes import price_table
from tests.planner.random_plans import random_case, reprice
from tests.planner.step_cases import LOCAL, RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.planner.strategies.test_adaptive import adaptive, others
from tests.plans import step_problem

BOTH = (ULYSSES, RING)


def lockstep_cost(num_ranks: int, kinds: tuple[AttentionKind, ...] = BOTH, fixed_s: float = 2e-3) -> CostModel:
    return replace(make_cost(num_ranks, kinds=kinds, fixed_s=fixed_s), sharding=Sharding.ZERO3)


def test_rounds_worked_out_by_hand() -> None:
    """Rank 0: 3 s, then 2 s. Rank 1: 1 s. Rank 2: 4 s. Rounds of 4 s and 2 s; without lockstep it would be 5 s."""
    cost = lockstep_cost(3, fixed_s=1.0)
    flat = tuple(replace(fit, s_per_token2=0.0, s_per_token=1.0, s_per_sequence=0.0, fixed_s=0.0) for fit in cost.times)
    cost = replace(cost, times=flat, step_fixed_s=0.5)
    choices = [GroupChoice(LOCAL, (rank,), (index,)) for index, rank in enumerate((0, 0, 1, 2))]
    plan = assemble_plan(
        step=0, strategy="hand", num_ranks=3, lengths=[3, 2, 1, 4], groups=choices, cost=cost,
        status=SolveStatus.GREEDY, bound_s=0.0, wall_s=0.0,
    )
    simulation = simulate(plan, cost)
    assert plan.predicted_s == simulation.step_s == 4 + 2 + 0.5
    assert simulation.rank_finish_s == (6.0, 6.0, 6.0)
    assert simulation.rank_busy_s == (5.0, 1.0, 4.0)
    assert simulation.idle_fraction == pytest.approx(1 - 10 / 18)
    assert planned_times(plan) == ((0.0, 3.0), (4.0, 6.0), (0.0, 1.0), (0.0, 4.0))
    assert planned_span_s(plan) == 6.0
    assert simulate(replace(plan, sharding=Sharding.GATHER_ONCE), replace(cost, sharding=Sharding.GATHER_ONCE)).step_s \
        == 5.5


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_invariants_on_random_plans(seed: int) -> None:
    case = random_case(random.Random(seed))
    cost = replace(case.cost, sharding=Sharding.ZERO3)
    plan = reprice(replace(case.plan, sharding=Sharding.ZERO3), cost)
    simulation = simulate(plan, cost)
    seconds = [microbatch.predicted_s for microbatch in plan.microbatches]
    rounds = lockstep_rounds(microbatch.ranks for microbatch in plan.microbatches)
    total_s = sum(max(seconds[index] for index in members) for members in rounds)
    assert simulation.step_s == pytest.approx(total_s + cost.step_fixed_s)
    assert simulation.rank_finish_s == (max(simulation.rank_finish_s),) * plan.num_ranks
    assert simulation.step_s >= case.plan.predicted_s * (1 - 1e-9)  # a barrier only adds
    assert simulation.rank_busy_s == pytest.approx(simulate(case.plan, case.cost).rank_busy_s)
    assert simulation.peak_bytes == case.plan.peak_bytes
    # an idle rank's empty microbatch takes the least fixed time there is: never longer than the round
    empty_s = min(fit.fixed_s for fit in cost.times)
    assert all(max(seconds[index] for index in members) >= empty_s for members in rounds)


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 40), st.sampled_from([(RING,), BOTH]),
    st.sampled_from([1e-4, 5e-3, 5e-2]),
)
@settings(max_examples=20, deadline=None)
def test_adaptive_is_never_behind_any_other_strategy(
    seed: int, num_ranks: int, num_sequences: int, kinds: tuple[AttentionKind, ...], fixed_s: float
) -> None:
    lengths = skewed_lengths(seed, num_sequences, 3 * 4096 if num_ranks > 3 else 4096)
    cost, limits = lockstep_cost(num_ranks, kinds, fixed_s), make_limits(kinds=kinds, max_nodes=10)
    plan = adaptive(lengths, num_ranks, cost, limits)
    for name, other in others(lengths, num_ranks, cost, limits).items():
        spare = limits.relative_gap if name.startswith("flexsp") and plan.solver.status is SolveStatus.OPTIMAL else 0
        assert plan.predicted_s <= other.predicted_s * (1 + spare) * (1 + 1e-9), name
        assert plan.solver.bound_s <= other.predicted_s * (1 + 1e-9), name


def test_equal_rounds_beat_unequal_counts() -> None:
    """What is best without barriers is far from it with them, and adaptive knows."""
    lengths = skewed_lengths(5, 300, 12_000)
    limits = make_limits(kinds=BOTH, rank_tokens=2048)
    cost = lockstep_cost(16)
    free = adaptive(lengths, 16, replace(cost, sharding=Sharding.GATHER_ONCE), limits)
    plan = adaptive(lengths, 16, cost, limits)
    assert plan.predicted_s < 0.9 * simulate(replace(free, sharding=Sharding.ZERO3), cost).step_s
    for name in ("hdp", "static", "flexsp", "zeppelin"):
        other = plan_step(step_problem(lengths, 16, cost, limits), step=0, strategy=name)
        assert plan.predicted_s <= other.predicted_s, name


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 5, 8, 12]), st.sampled_from([2, 4, 8, 64]), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_shortened_rounds_hold_the_same_sequences_in_no_more_time(
    seed: int, num_ranks: int, node_size: int, num_sequences: int
) -> None:
    rng = random.Random(seed)
    lengths = sorted(skewed_lengths(seed, num_sequences, 4000))
    shapes = every_shape(step_problem([1], num_ranks, lockstep_cost(num_ranks), make_limits(kinds=BOTH)))
    table = price_table(lengths, shapes)
    batches: list[Batch] = []
    for row in range(len(lengths)):
        roomy = [
            each for each in batches
            if each.load + int(table.load_tokens[row, each.column]) <= table.capacity_tokens[each.column]
        ]
        if not roomy or rng.random() < 0.4:
            column = rng.randrange(len(shapes))
            roomy = [Batch(column, shapes[column].degree, shapes[column].fit.fixed_s)]
            batches += roomy
        batch = rng.choice(roomy)
        batch.add(row, int(table.load_tokens[row, batch.column]), float(table.marginal_s[row, batch.column]))
    rounds: list[Round] = []
    for batch in batches:
        if not any(each.take(batch) for each in rounds):
            rounds.append(Round(num_ranks, min(node_size, num_ranks)))
            assert rounds[-1].take(batch)  # one group alone always fits
    check_schedule(Schedule(table, rounds), num_ranks, min(node_size, num_ranks))
    shortened = Schedule(table, rounds)
    shortened.shorten(SHARES)
    assert shortened.seconds <= rounds_s(rounds) * (1 + 1e-9)
    check_schedule(shortened, num_ranks, min(node_size, num_ranks))
    for schedule in (Schedule(table, rounds), shortened):
        before_s = schedule.seconds
        schedule.exchange(40)
        assert schedule.seconds <= before_s * (1 + 1e-9)
        check_schedule(schedule, num_ranks, min(node_size, num_ranks))


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 5, 8, 12, 24]), st.sampled_from([2, 4, 8, 64]), st.integers(1, 60),
    st.sampled_from(SLACKS), st.sampled_from(STRETCHES), st.sampled_from(SKIPPED),
    st.sampled_from([1e-4, 5e-3, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_packed_rounds_hold_every_sequence_within_time_and_memory(
    seed: int, num_ranks: int, node_size: int, num_sequences: int, slack: float, stretch: float, skipped: int,
    fixed_s: float,
) -> None:
    lengths = sorted(skewed_lengths(seed, num_sequences, 4096 * min(num_ranks, 5) - 40))
    limits = replace(make_limits(kinds=BOTH), devices_per_node=node_size)
    problem = step_problem(lengths, num_ranks, lockstep_cost(num_ranks, fixed_s=fixed_s), limits)
    packer = Packer(PricedStep(problem, every_shape(problem)))
    rounds = packer.pack(slack, stretch, skipped)
    assert rounds is not None
    again = packer.pack(slack, stretch, skipped, rounds_s(rounds))
    assert again == rounds  # it gives up on nothing that would be quick enough
    assert packer.pack(slack, stretch, skipped, 0.0) is None
    schedule = Schedule(packer.table, rounds)
    assert schedule.seconds == pytest.approx(rounds_s(rounds))
    check_schedule(schedule, num_ranks, min(node_size, num_ranks))


def check_schedule(schedule: Schedule, num_ranks: int, node_size: int) -> None:
    """Every row once, within memory, its ranks inside a node where they fit one, and no longer when played."""
    table = schedule.table
    ordered = in_order(schedule)
    assert sorted(row for batch in ordered for row in batch.rows) == list(range(table.num_rows))
    seconds = []
    for batch in ordered:
        assert table.load_tokens[batch.rows, batch.column].sum() <= table.capacity_tokens[batch.column]
        assert 0 <= batch.first_rank <= num_ranks - batch.degree
        if 1 < batch.degree <= node_size:
            assert batch.first_rank // node_size == (batch.first_rank + batch.degree - 1) // node_size
        seconds.append(batch.fixed_s + float(table.marginal_s[batch.rows, batch.column].sum()))
    ranks = [tuple(range(batch.first_rank, batch.first_rank + batch.degree)) for batch in ordered]
    played_s = sum(max(seconds[index] for index in members) for members in lockstep_rounds(ranks))
    assert played_s <= schedule.seconds * (1 + 1e-9)


@given(st.lists(st.integers(2, 20), max_size=10), st.integers(1, 64), st.integers(1, 16))
@settings(max_examples=80, deadline=None)
def test_groups_of_a_round_lie_side_by_side(degrees: list[int], num_ranks: int, node_size: int) -> None:
    degrees = sorted((degree for degree in degrees if degree <= num_ranks), reverse=True)
    found = Round(num_ranks, min(node_size, num_ranks))
    placed = [batch for batch in (Batch(0, degree, 0.0) for degree in degrees) if found.take(batch)]
    assert len(placed) >= min(len(degrees), 1)  # one group alone always fits
    taken = np.zeros(num_ranks, dtype=int)
    for batch in placed:
        taken[batch.first_rank : batch.first_rank + batch.degree] += 1
    assert taken.sum() == sum(batch.degree for batch in placed) and taken.max(initial=0) <= 1
    assert found.ranks_of_one() == np.flatnonzero(taken == 0).tolist() and found.num_free == (taken == 0).sum()
