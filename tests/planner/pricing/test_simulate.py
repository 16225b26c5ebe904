"""The simulator against sums done by hand, and its invariants on random plans."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.fits import MemoryFit, Provenance, TimeFit
from planner.cost.model import CostModel
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, Microbatch, Sharding, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, MicrobatchChoice, assemble_plan, makespan_s
from planner.pricing.breakdown import time_split
from planner.pricing.simulate import Event, simulate
from planner.schedules.layout import local_token_counts, shard_spans
from tests.planner.random_plans import random_case, reprice, toy_cost
from tests.plans import step_problem
from tests.work import count_calls

LOCAL, ULYSSES, RING = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING


def second_cost() -> CostModel:
    """One second per token on one rank, and that divided by the degree in a group; 100 bytes, and 10 bytes per
    token."""
    times = [TimeFit(kind=LOCAL, degree=1, s_per_token2=0.0, s_per_token=1.0, s_per_sequence=0.0, fixed_s=0.0)]
    times += [
        TimeFit(kind=kind, degree=d, s_per_token2=0.0, s_per_token=1.0 / d, s_per_sequence=0.0, fixed_s=0.0)
        for kind in (ULYSSES, RING) for d in (2, 4)
    ]
    return CostModel(
        times=tuple(times), memory=MemoryFit(fixed_bytes=100, bytes_per_token=10.0), step_fixed_s=0.5,
        peak_flop_per_s=1.0, provenance=Provenance(source="derived", cluster="hand", model="hand"),
    )


def assemble(lengths: list[int], groups: list[MicrobatchChoice], cost: CostModel, num_ranks: int = 4) -> StepPlan:
    return assemble_plan(
        step=0, strategy="hand", num_ranks=num_ranks, lengths=lengths, groups=groups, cost=cost,
        status=SolveStatus.GREEDY, bound_s=0.0, wall_s=0.0,
    )


def test_a_step_worked_out_by_hand() -> None:
    # Ranks 0-1 share 8 tokens (4 s), rank 2 runs 3 (3 s); then ranks 1-2 share 2 (1 s) once both are free, at 4 s.
    cost = second_cost()
    groups = [GroupChoice(RING, (0, 1), (0,)), GroupChoice(LOCAL, (2,), (1,)), GroupChoice(ULYSSES, (2, 1), (2,))]
    plan = assemble([8, 3, 2], groups, cost)
    simulation = simulate(plan, cost)
    assert simulation.step_s == plan.predicted_s == plan.solver.objective_s == 5.5
    assert simulation.rank_busy_s == (4.0, 5.0, 4.0, 0.0)
    assert simulation.rank_finish_s == (4.0, 5.0, 5.0, 0.0)
    assert simulation.idle_fraction == pytest.approx(1 - 13 / 20)
    assert simulation.rank_peak_bytes == (140, 140, 130, 100)
    assert simulation.peak_bytes == plan.peak_bytes == 140
    assert simulation.events == (
        Event(microbatch=0, rank=0, start_s=0.0, stop_s=4.0),
        Event(microbatch=0, rank=1, start_s=0.0, stop_s=4.0),
        Event(microbatch=1, rank=2, start_s=0.0, stop_s=3.0),
        Event(microbatch=2, rank=2, start_s=4.0, stop_s=5.0),
        Event(microbatch=2, rank=1, start_s=4.0, stop_s=5.0),
    )
    assert [microbatch.predicted_s for microbatch in plan.microbatches] == [4.0, 3.0, 1.0]
    assert [microbatch.peak_bytes for microbatch in plan.microbatches] == [140, 130, 110]


def test_a_rank_in_two_groups_of_one_microbatch_runs_both() -> None:
    cost = second_cost()
    groups = (
        AttentionGroup(kind=RING, ranks=(0, 1, 2, 3), sequences=(0,)),
        AttentionGroup(kind=LOCAL, ranks=(1,), sequences=(1,)),
        AttentionGroup(kind=ULYSSES, ranks=(1, 3), sequences=(2,)),
    )
    plan = assemble([8, 5, 6], [GroupChoice(LOCAL, (0,), (0,))], cost)
    together = Microbatch(ranks=(0, 1, 2, 3), groups=groups, predicted_s=0.0, peak_bytes=0)
    simulation = simulate(replace(plan, microbatches=(together,)), cost)
    assert simulation.step_s == 2.0 + 5.0 + 3.0 + 0.5  # rank 1: 8 / 4, then 5, then 6 / 2
    assert simulation.rank_busy_s == (10.0,) * 4 and simulation.idle_fraction == 0.0
    assert simulation.rank_peak_bytes == (120, 200, 120, 150)  # rank 1 holds 2 + 5 + 3 tokens


def test_layers_are_launched_once_a_microbatch() -> None:
    """A rank in several groups takes their marginal seconds and the largest of their fixed times."""
    fixed_s = {(LOCAL, 1): 0.25, (ULYSSES, 2): 1.0, (RING, 4): 4.0}
    cost = second_cost()
    cost = replace(cost, times=tuple(
        replace(fit, fixed_s=fixed_s.get((fit.kind, fit.degree), 0.0)) for fit in cost.times
    ))
    ring, pair = GroupChoice(RING, (0, 1, 2, 3), (0,)), GroupChoice(ULYSSES, (1, 3), (2,))
    alone, other = GroupChoice(LOCAL, (1,), (1,)), GroupChoice(LOCAL, (0,), (3,))
    plan = assemble([8, 5, 6, 1], [(ring, alone, pair), (alone, pair), other], cost)
    assert [microbatch.predicted_s for microbatch in plan.microbatches] == [2 + 5 + 3 + 4, 5 + 3 + 1, 1 + 0.25]
    split = time_split(plan, simulate(plan, cost), cost, None)
    busy_s = (4 * (2 + 4) + 5 + 2 * 3) + (5 + 3 + 1 + 3 + 1) + 1.25
    assert split.work_s == pytest.approx(busy_s / 4)
    assert split.work_s + split.waiting_s + split.fixed_s == pytest.approx(plan.predicted_s)


def test_order_matters_where_ranks_are_shared() -> None:
    cost = second_cost()
    long, pair = GroupChoice(LOCAL, (0,), (0,)), GroupChoice(RING, (0, 1), (1,))
    alone = GroupChoice(LOCAL, (1,), (2,))
    waits = assemble([6, 4, 6], [long, pair, alone], cost)  # rank 1 waits for rank 0, then works alone
    meets = assemble([6, 4, 6], [long, alone, pair], cost)
    assert (waits.predicted_s, meets.predicted_s) == (6 + 2 + 6 + 0.5, 6 + 2 + 0.5)


def test_a_group_without_coefficients_is_refused() -> None:
    with pytest.raises(PlanError, match="cost model has no ring of degree 3"):
        assemble([9], [GroupChoice(RING, (0, 1, 2), (0,))], second_cost())


def test_a_bound_above_the_plan_by_rounding_only_is_lowered() -> None:
    cost, group = second_cost(), [GroupChoice(LOCAL, (0,), (0,))]
    arguments = {
        "step": 0, "strategy": "hand", "num_ranks": 1, "lengths": [3], "groups": group, "cost": cost,
        "status": SolveStatus.OPTIMAL, "wall_s": 0.0,
    }
    assert assemble_plan(bound_s=3.5 * (1 + 1e-12), **arguments).solver.bound_s == 3.5
    assert assemble_plan(bound_s=3.6, **arguments).solver.bound_s == 3.6  # a wrong bound stays for verify to refuse


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_invariants_on_random_plans(seed: int) -> None:
    case = random_case(random.Random(seed))
    plan, simulation = case.plan, simulate(case.plan, case.cost)
    free = [0.0] * plan.num_ranks
    events = iter(simulation.events)
    for index, microbatch in enumerate(plan.microbatches):
        mine = [next(events) for _ in microbatch.ranks]
        start = max(free[rank] for rank in microbatch.ranks)
        assert [event.rank for event in mine] == list(microbatch.ranks)
        for event in mine:
            assert event.microbatch == index and event.start_s == start
            assert event.stop_s == start + microbatch.predicted_s
            free[event.rank] = event.stop_s
    assert next(events, None) is None
    assert simulation.rank_finish_s == tuple(free)
    assert simulation.step_s == max(free) + case.cost.step_fixed_s == plan.predicted_s
    work = sum(microbatch.predicted_s * len(microbatch.ranks) for microbatch in plan.microbatches)
    assert sum(simulation.rank_busy_s) == pytest.approx(work)
    assert 0 <= simulation.idle_fraction < 1
    assert simulation.peak_bytes == plan.peak_bytes == max(m.peak_bytes for m in plan.microbatches)
    assert reprice(plan, case.cost) == plan


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=12), degree=st.integers(1, 17),
    kind=st.sampled_from(AttentionKind),
)
def test_priced_tokens_are_the_tokens_of_the_layout(lengths: list[int], degree: int, kind: AttentionKind) -> None:
    degree = 1 if kind is LOCAL else degree
    group = AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=tuple(range(len(lengths))))
    held = tuple(sum(span.num_tokens for span in spans) for spans in shard_spans(group, lengths))
    assert local_token_counts(kind, degree, lengths) == held
    assert sum(held) == sum(lengths)


def test_assembling_grows_like_the_plan() -> None:
    def calls(num_sequences: int) -> int:
        rng = random.Random(0)
        lengths = [rng.randint(1, 20_000) for _ in range(num_sequences)]
        cost = toy_cost(rng, 64)
        groups = [GroupChoice(RING, tuple(range(64)), tuple(range(first, num_sequences, 8))) for first in range(8)]
        return count_calls(lambda: assemble_plan(
            step=0, strategy="hand", num_ranks=64, lengths=lengths, groups=groups, cost=cost,
            status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0, cost_digest="known",
        ))

    small = calls(512)
    assert small < 300 * 512
    assert calls(1024) < 2.5 * small


@given(st.integers(0, 10**6), st.sampled_from(list(Sharding)))
@settings(max_examples=40, deadline=None)
def test_the_quick_makespan_is_that_of_the_simulated_plan(seed: int, sharding: Sharding) -> None:
    """To the last bit, lone groups and microbatches of several alike: adaptive compares plans by it."""
    case = random_case(random.Random(seed))
    cost = replace(case.cost, sharding=sharding)
    choices: list[MicrobatchChoice] = []
    for microbatch in case.plan.microbatches:
        groups = tuple(GroupChoice(group.kind, group.ranks, group.sequences) for group in microbatch.groups)
        choices.append(groups[0] if len(groups) == 1 else groups)
    plan = assemble(list(case.lengths), choices, cost, case.num_ranks)
    assert (
        makespan_s(choices, step_problem(case.lengths, case.num_ranks, cost, case.limits))
        == plan.predicted_s - cost.step_fixed_s
    )
