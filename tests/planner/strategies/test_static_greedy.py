"""Shapes, bounds, the greedy plan and the static baseline."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, SpecError
from planner.plan import AttentionKind, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.schedules.layout import local_token_counts, peak_team_tokens
from planner.step_planner import greedy_step, plan_step
from planner.strategies.greedy import greedy_schedule
from planner.strategies.search.bounds import makespan_bound_s
from planner.strategies.search.shapes import GroupShape, allowed_shapes, price_table
from planner.strategies.static import possible_degrees
from tests.planner.step_cases import LOCAL, RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem
from tests.work import count_calls

BOTH = (ULYSSES, RING)
lengths_lists = st.lists(st.integers(1, 4096), min_size=1, max_size=30)


def static(
    lengths: list[int], num_ranks: int, degree: int | None, cost: CostModel | None = None,
    limits: PlanLimits | None = None,
) -> StepPlan:
    return plan_step(
        step_problem(lengths, num_ranks, cost or make_cost(num_ranks), limits or make_limits()),
        step=0,
        strategy="static",
        degree=degree,
    )


def group_degrees(plan: StepPlan) -> set[int]:
    return {group.degree for microbatch in plan.microbatches for group in microbatch.groups}


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_ring_peak_is_the_layouts(lengths: list[int], degree: int) -> None:
    peaks = peak_team_tokens(np.array(lengths), np.array(degree))
    assert peaks.tolist() == [max(local_token_counts(RING, degree, [size])) for size in lengths]
    assert peaks.tolist() == [peak_team_tokens(size, degree) for size in lengths]


@given(lengths_lists, st.integers(1, 9), st.sampled_from([(ULYSSES,), (RING,), BOTH]))
@settings(max_examples=60, deadline=None)
def test_greedy_is_legal_bounded_and_priced_as_simulated(
    lengths: list[int], num_ranks: int, kinds: tuple[AttentionKind, ...]
) -> None:
    cost, limits = make_cost(num_ranks, kinds=kinds), make_limits(kinds=kinds)
    plan = greedy_step(step_problem(lengths, num_ranks, cost, limits), step=3)  # verifies itself
    schedule = greedy_schedule(
        price_table(lengths, allowed_shapes(step_problem([1], num_ranks, cost, limits))), num_ranks
    )
    assert plan.predicted_s == pytest.approx(schedule.makespan_s + cost.step_fixed_s)
    assert plan.solver.status is SolveStatus.GREEDY
    assert 0 < plan.solver.bound_s <= plan.predicted_s


@given(lengths_lists, st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_static_degrees_are_legal_and_the_best_wins(lengths: list[int], num_ranks: int, data: st.DataObject) -> None:
    kinds = data.draw(st.sampled_from([(ULYSSES,), BOTH]))
    cost, limits = make_cost(num_ranks, kinds=kinds), make_limits(kinds=kinds, max_ulysses_degree=6)
    given_degree = data.draw(st.sampled_from(possible_degrees(step_problem([1], num_ranks, cost, limits))))
    plan = static(lengths, num_ranks, given_degree, cost, limits)
    assert plan.solver.status is SolveStatus.STATIC
    assert group_degrees(plan) <= {given_degree, num_ranks % given_degree}
    best = static(lengths, num_ranks, None, cost, limits)
    powers = [d for d in (1, 2, 4, 8) if d in possible_degrees(step_problem([1], num_ranks, cost, limits))]
    each = [static(lengths, num_ranks, d, cost, limits).predicted_s for d in powers]
    assert best.predicted_s <= min(each) + 1e-12


def test_degree_three_on_four_ranks_leaves_a_group_of_one() -> None:
    plan = static([700] * 8, 4, 3)
    groups = {(group.kind, group.ranks) for microbatch in plan.microbatches for group in microbatch.groups}
    assert groups == {(ULYSSES, (0, 1, 2)), (LOCAL, (3,))}


def test_best_static_follows_the_lengths() -> None:
    assert group_degrees(static([300] * 16, 4, None)) == {1}
    assert group_degrees(static([16_000], 4, None)) == {4}


@pytest.mark.parametrize(
    ("degree", "reason"),
    [(0, "at least 1"), (-2, "at least 1"), (5, "more ranks than there are"), (4, "query head per rank"),
     (3, "calibrate")],
)
def test_impossible_degree_names_the_possible_ones(degree: int, reason: str) -> None:
    full = make_cost(4)
    cost = CostModel(
        times=tuple(fit for fit in full.times if fit.degree != 3), memory=full.memory, step_fixed_s=0.0,
        peak_flop_per_s=1.0, provenance=full.provenance,
    )
    limits = make_limits(max_ulysses_degree=3)
    with pytest.raises(SpecError, match=rf"degree {degree} is not possible.*{reason}.*possible: 1, 2\)") as caught:
        static([100] * 4, 4, degree, cost, limits)
    assert "\n" not in str(caught.value)


def test_a_sequence_that_fits_nowhere_is_named_with_its_bytes() -> None:
    cost, limits = make_cost(4), make_limits(rank_tokens=1000)
    static([4000, 10], 4, 4, cost, limits)  # exactly full
    for plan in (
        lambda: greedy_step(step_problem([10, 4001], 4, cost, limits), step=0),
        lambda: static([10, 4001], 4, None, cost, limits),
        lambda: plan_step(step_problem([10, 4001], 4, cost, limits), step=0, strategy="flexsp"),
    ):
        with pytest.raises(InfeasibleError, match=r"sequence 1 \(4001 tokens\).*ulysses degree 4.*lower") as caught:
            plan()
        assert caught.value.binding == "device memory"
        assert caught.value.needed_bytes == cost.device_bytes(1001)
        assert caught.value.available_bytes == limits.device_budget_bytes == cost.device_bytes(1000)
    with pytest.raises(InfeasibleError, match=r"sequence 0 \(2001 tokens\).*degrees allowed: 2"):
        static([2001], 4, 2, cost, limits)


def test_a_budget_below_the_fixed_part_is_infeasible() -> None:
    limits = PlanLimits(device_budget_bytes=10**7, max_ulysses_degree=4)
    with pytest.raises(InfeasibleError, match="device"):
        greedy_step(step_problem([1], 4, make_cost(4), limits), step=0)


def test_the_greedy_plan_grows_like_the_step() -> None:
    """It is the plan of a late planner: 512 sequences on 64 ranks in about 10 ms of a quiet core."""
    def calls(num_ranks: int, num_sequences: int) -> int:
        lengths, limits = skewed_lengths(1, num_sequences, 100_000), make_limits()
        table = price_table(lengths, allowed_shapes(step_problem([1], num_ranks, make_cost(num_ranks), limits)))
        return count_calls(lambda: greedy_schedule(table, num_ranks))

    small = calls(64, 512)
    assert small < 150 * 512
    assert calls(128, 1024) < 3 * small


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for index in range(len(rest)):
            yield [*rest[:index], [items[0], *rest[index]], *rest[index + 1 :]]


def every_step_s(
    lengths: list[int], shapes: tuple[GroupShape, ...], num_ranks: int, cost: CostModel
) -> Iterator[float]:
    """Step times of all plans: every partition into groups, every shape and aligned block of ranks. Larger groups come
    first without loss of generality: groups on nested blocks can be reordered so without a later finish."""

    def places(parts: list[list[int]]) -> Iterator[list[GroupChoice]]:
        if not parts:
            yield []
            return
        for shape in shapes:
            if max(local_token_counts(shape.kind, shape.degree, [lengths[i] for i in parts[0]])) > 4096:
                continue
            for first in range(0, num_ranks - shape.degree + 1, shape.degree):
                group = GroupChoice(shape.kind, tuple(range(first, first + shape.degree)), tuple(parts[0]))
                for rest in places(parts[1:]):
                    yield [group, *rest]

    for parts in partitions(list(range(len(lengths)))):
        for groups in places(parts):
            groups.sort(key=lambda group: -len(group.ranks))
            plan = assemble_plan(
                step=0, strategy="all", num_ranks=num_ranks, lengths=lengths, groups=groups, cost=cost,
                status=SolveStatus.FEASIBLE, bound_s=0.0, wall_s=0.0, cost_digest="",
            )
            yield plan.predicted_s


@given(st.lists(st.integers(1, 8192), min_size=1, max_size=4), st.sampled_from([0.0, 2e-3, 0.3]))
@settings(max_examples=25, deadline=None)
def test_no_plan_at_all_beats_the_bound(lengths: list[int], fixed_s: float) -> None:
    cost, limits = make_cost(2, fixed_s=fixed_s), make_limits()
    shapes = allowed_shapes(step_problem([1], 2, cost, limits))
    best_s = min(every_step_s(lengths, shapes, 2, cost))
    bound_s = makespan_bound_s(price_table(lengths, shapes), 2) + cost.step_fixed_s
    assert bound_s <= best_s * (1 + 1e-9)
    for strategy in ("flexsp", "static"):
        plan = plan_step(step_problem(lengths, 2, cost, limits), step=0, strategy=strategy)
        assert plan.predicted_s >= best_s * (1 - 1e-9)
        assert plan.solver.bound_s >= bound_s * (1 - 1e-9)


def test_bound_is_tight_where_it_can_be() -> None:
    cost, limits = make_cost(4, fixed_s=0.0), make_limits()
    plan = greedy_step(step_problem([1000] * 8, 4, cost, limits), step=0)
    assert plan.solver.bound_s == pytest.approx(plan.predicted_s)
