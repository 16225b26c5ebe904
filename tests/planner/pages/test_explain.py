"""What people read about a plan says what the plan says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.pages.explain import (
    COMPARISON_COLUMNS,
    GROUP_COLUMNS,
    STEP_COLUMNS,
    band,
    band_text,
    comparison_row,
    group_rows,
    knob_lines,
    memory_line,
    provenance_lines,
    rank_ranges,
    ranking_line,
    replay_lines,
    shape_line,
    solver_line,
    speed_line,
    step_row,
    time_line,
    verdict,
)
from planner.pages.knobs import Knob
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate, fastest_replayed
from planner.plan import AttentionKind, MemoryPolicy, Sharding, SolveStatus
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.breakdown import memory_split, time_split
from planner.pricing.simulate import simulate
from planner.replay.step import Replay
from planner.solver import LinearModel, SolverFailure
from planner.step_planner import plan_step
from tests.planner.pricing.test_simulate import second_cost
from tests.planner.random_plans import reprice
from tests.planner.step_cases import make_cost, make_limits, skewed_lengths, with_activation, with_policies
from tests.plans import step_problem

LOCAL, ULYSSES, RING = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING


def planned(bound_s: float = 4.4, status: SolveStatus = SolveStatus.FEASIBLE) -> PlannedStep:
    cost = second_cost()
    plan = assemble_plan(
        step=7, strategy="flexsp", num_ranks=4, lengths=[8, 3, 2, 3], cost=cost, status=status, bound_s=bound_s,
        wall_s=0.25, note="why",
        groups=[
            GroupChoice(RING, (0, 1), (0,)), GroupChoice(LOCAL, (2,), (1,)), GroupChoice(ULYSSES, (1, 2), (2,)),
            GroupChoice(LOCAL, (3,), (3,)),
        ],
    )
    return PlannedStep(plan=plan, simulation=simulate(plan, cost))


def test_step_row() -> None:
    row = dict(zip(STEP_COLUMNS, step_row(planned()), strict=True))
    assert row == {
        "step": "7", "seqs": "4", "tokens": "16", "longest": "8", "microbatches": "4", "seconds": "5.5 s",
        "replayed": "-", "bound": "4.4 s", "gap": "20.0%", "idle": "20.0%", "peak": "140 B", "status": "feasible",
    }
    unknown = dict(zip(STEP_COLUMNS, step_row(planned(bound_s=0.0, status=SolveStatus.GREEDY)), strict=True))
    assert (unknown["bound"], unknown["gap"], unknown["status"]) == ("-", "-", "greedy")


def test_group_rows_follow_execution_order() -> None:
    rows = [dict(zip(GROUP_COLUMNS, row, strict=True)) for row in group_rows(planned())]
    assert [row["attention"] for row in rows] == ["ring 2", "local", "ulysses 2", "local"]
    assert rows[2] == {
        "microbatch": "2", "attention": "ulysses 2", "ranks": "1-2", "seqs": "1", "tokens": "2", "longest": "2",
        "start": "4 s", "seconds": "1 s", "peak": "110 B", "memory": "keep",
    }


def test_lines() -> None:
    step = planned()
    assert shape_line(step.plan) == "ring 2, ulysses 2, 2 x local"
    assert solver_line(step.plan) == (
        "solver: not optimal in its search, gap 20.00% to the bound of 4.4 s, found in 250 ms, no fallback (why)"
    )
    greedy = planned(bound_s=0.0, status=SolveStatus.GREEDY).plan
    assert "no lower bound known" in solver_line(greedy) and "greedy" in solver_line(greedy)
    line = speed_line([step, step], 4, second_cost())
    for part in ("flexsp: 5.5 s per step over 2 steps", "3 tokens/s (1 per device)", "idle 20.0%", "at most 20.0%"):
        assert part in line
    assert "no bound known" in speed_line([step, planned(bound_s=0.0)], 4, second_cost())


def test_a_fallback_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fallback: the greedy plan (why)" in solver_line(planned(status=SolveStatus.LATE).plan)

    def broken(*_: object, **__: object) -> None:
        raise SolverFailure("made up")

    monkeypatch.setattr(LinearModel, "solve", broken)
    plan = plan_step(
        step_problem(skewed_lengths(4, 40, 9000), 8, make_cost(8, fixed_s=0.03), make_limits(relative_gap=0.0)),
        step=0,
        strategy="flexsp",
    )
    assert "fallback: the best plan made without the solver (" in solver_line(plan)


def test_verdict_names_the_tightest_rank() -> None:
    step = planned()
    split = memory_split(step.simulation, second_cost(), budget_bytes=200)
    assert (split.rank, split.fixed_bytes, split.activation_bytes, split.headroom_bytes) == (0, 100, 40, 60)
    assert verdict([step], split) == "FITS: rank 0 is the tightest of 4, 140 B of 200 B, headroom 60 B (30%)"
    lean = replace(step, plan=replace(step.plan, sharding=Sharding.ZERO3))
    assert verdict([lean], split).startswith("FITS with zero3: ")
    assert "activations 40 B, budget 200 B" in memory_line(split)


def test_the_band_says_where_it_is_from() -> None:
    cost = second_cost()
    assert band_text(5.0, cost) == "4 s to 6 s, +-20% assumed for a derived cost model"
    origin = replace(cost.provenance, source="measured", num_samples=40, max_relative_error=0.1)
    measured = replace(cost, provenance=origin)
    assert (band(cost), band(measured)) == (0.2, 0.1)
    assert band_text(5.0, measured) == "4.5 s to 5.5 s, +-10% worst error of 40 samples"


def test_the_parts_of_a_step_add_up() -> None:
    step, cost = planned(), second_cost()
    free = replace(cost, times=tuple(replace(fit, s_per_token=0.75 * fit.s_per_token) for fit in cost.times))
    split = time_split(step.plan, step.simulation, cost, free)
    # 16 rank seconds of work on 4 ranks (8 tokens twice 4 s, 3, 2 x 1, 3): 4 s each, of 5 s until the last is done.
    assert (split.work_s, split.communication_s, split.waiting_s, split.fixed_s) == (3.0, 1.0, 1.0, 0.5)
    assert (split.recompute_s, split.swap_s) == (0.0, 0.0)
    assert time_line(step.plan, split) == (
        "time of step 7: compute 54.5% (3 s), exposed communication 18.2% (1 s), exposed swap none, imbalance (waiting "
        "for slower ranks) 18.2% (1 s), gather, reduce, optimizer once per step 9.1% (500 ms); planner 250 ms ahead "
        "of it"
    )
    together = time_split(step.plan, step.simulation, cost, None)
    assert together.work_s == 4.0 and together.communication_s is None
    assert "compute and communication (measured together) 72.7% (4 s)" in time_line(step.plan, together)


def test_swapping_and_recomputing_are_parts_of_their_own() -> None:
    cost = with_activation(make_cost(4, kinds=(RING,)))
    limits = with_policies(make_limits(kinds=(RING,), rank_tokens=2000))
    plan = plan_step(step_problem([7000] * 2, 4, cost, limits), step=0, strategy="adaptive")
    memory = MemoryPolicy(keep_fraction=0.1, swap_fraction=0.6, recompute_fraction=0.3)
    slow = replace(cost, activation=replace(cost.activation, copy_bytes_per_s=1e7))
    plan = reprice(replace(plan, microbatches=tuple(replace(m, memory=memory) for m in plan.microbatches)), slow)
    simulation = simulate(plan, slow)
    split = time_split(plan, simulation, slow, slow)
    busy_s = sum(simulation.rank_busy_s) / 4
    assert split.work_s + split.recompute_s + split.swap_s == pytest.approx(busy_s)
    tokens = plan.num_tokens / 4  # a rank
    assert split.recompute_s == pytest.approx(0.3 * tokens * 2e-5)
    assert 0 < split.swap_s < 0.6 * tokens * 18_000 / 1e7 * 2  # there and back, some of it hidden
    line = time_line(plan, split)
    assert "recomputing " in line
    assert f"exposed swap {split.swap_s / simulation.step_s:.1%}" in line


def test_comparison() -> None:
    fast = Candidate(strategy="a", steps=(planned(),))
    slow = Candidate(strategy="b", steps=(replace(planned(), plan=replace(planned().plan, predicted_s=11.0)),))
    refused = Candidate(strategy="c", refusal="step 0: no room")
    assert best_candidate((refused, slow, fast)) is fast and best_candidate((refused,)) is None
    row = dict(zip(COMPARISON_COLUMNS, comparison_row(slow, fast), strict=True))
    assert row == {
        "strategy": "b", "mean step": "11 s", "ratio to best": "2.000", "first step": "11 s", "replayed": "-",
        "idle": "20.0%", "peak": "140 B", "own gap": "20.0%", "plan ms": "250.0",
    }


def test_the_comparison_marks_the_fastest_by_replay() -> None:
    slow = replace(planned(), plan=replace(planned().plan, predicted_s=11.0))
    first = Candidate(strategy="a", steps=(replayed(planned(), 7.0),))
    second, refused = Candidate(strategy="b", steps=(replayed(slow, 6.0),)), Candidate(strategy="c", refusal="no")
    assert fastest_replayed((first, second, refused)) is second and fastest_replayed((refused,)) is None
    assert ranking_line((first, second, refused)) == (
        "fastest: a by predicted steps, b by the replay of the first step (*): 6 s against 7 s, 14.3% less"
    )
    assert ranking_line((first, refused)).startswith("fastest: a, by predicted steps and by the replay")
    rows = [comparison_row(found, first, second) for found in (first, second)]
    assert [dict(zip(COMPARISON_COLUMNS, row, strict=True))["replayed"] for row in rows] == ["7 s", "6 s *"]
    some = (first, Candidate(strategy="b", steps=(slow,)))
    assert fastest_replayed(some) is None and ranking_line(some) == "", "one without a replay could be faster"


def test_knob_lines() -> None:
    knobs = (Knob(change="x", gain=0.9, gain_per_device=-0.05), Knob(change="y", gain=0.1, gain_per_device=0.1))
    head, *lines = knob_lines(knobs, "hdp")
    assert "hdp plans of the first step" in head
    assert lines == ["  - x: +90% tokens/s (-5% per device)", "  - y: +10% tokens/s"]
    even = Knob(change="z", gain=1.0, gain_per_device=-0.001)
    assert knob_lines((even,), "hdp")[1] == "  - z: +100% tokens/s (0% per device)"
    assert "no hdp plan" in knob_lines(None, "hdp")[0]
    assert "no setting tried gains" in knob_lines((), "hdp")[0]


def test_every_status_has_words() -> None:
    lines = {solver_line(planned(bound_s=5.5, status=status).plan) for status in SolveStatus}
    assert len(lines) == len(SolveStatus)


def test_provenance_marks_guesses() -> None:
    cost = second_cost()
    assert provenance_lines(cost) == ["cost model: derived for hand on hand"]
    origin = replace(cost.provenance, notes=("guess: 4 us", "data-sheet FLOPs"))
    sources = (("host", "guess"), ("link", "table; latency is a guess"), ("disk", "guess (slow)"), ("device", "sheet"))
    lines = provenance_lines(replace(cost, provenance=origin), sources)
    assert lines[1:] == [
        "  - device: sheet", "  - data-sheet FLOPs", "  - guess: host", "  - guess in link: table; latency is a guess",
        "  - guess: disk (slow)", "  - guess: 4 us",
    ]
    measured = replace(
        cost.provenance, source="measured", num_samples=40, measured_on="box", mean_relative_error=0.03,
        max_relative_error=0.2,
    )
    head = provenance_lines(replace(cost, provenance=measured))[0]
    assert head == "cost model: measured for hand on hand, 40 samples on box, mean error 3.0%, worst 20.0%"


def test_rank_ranges() -> None:
    assert rank_ranges((0, 1, 2, 9, 4, 5)) == "0-2,9,4-5"
    assert rank_ranges((3,)) == "3"


def replayed(step: PlannedStep, step_s: float) -> PlannedStep:
    quarter = (step_s / 4,) * 4
    return replace(step, replay=Replay(
        step_s=step_s, low_s=0.9 * step_s, high_s=1.2 * step_s, compute_s=quarter, exposed_communication_s=quarter,
        exposed_swap_s=quarter, idle_s=quarter, peak_bytes=(1,) * 4, host_bytes=(0,) * 4, sent_bytes=(0,) * 4,
        received_bytes=(0,) * 4, node_nic_share=(0.1, 0.25), model_flop=1e9, mfu=0.3,
    ))


def test_the_replay_stands_beside_the_prediction() -> None:
    step = planned()
    assert replay_lines(step) == []
    first, second = replay_lines(replayed(step, 6.0))
    assert "6 s (5.4 s to 7.2 s), 1.09 times the predicted 5.5 s" in first
    assert "compute 25.0% (1.5 s), exposed communication 25.0% (1.5 s), exposed swap 25.0%" in second
    assert "MFU 30.0%, NICs of the busiest node sending 25.0%" in second
    row = dict(zip(STEP_COLUMNS, step_row(replayed(step, 6.0)), strict=True))
    assert (row["seconds"], row["replayed"]) == ("5.5 s", "6 s")


def test_models_that_part_are_named() -> None:
    step = planned()
    for factor, parts in ((1.24, False), (1.26, True), (0.81, False), (0.79, True)):
        lines = replay_lines(replayed(step, factor * step.plan.predicted_s))
        assert ("differ by more than 1.25x" in lines[-1]) is parts
