"""What people read about a plan says what the plan says."""

from __future__ import annotations

from dataclasses import replace

from planner.assemble import GroupChoice, assemble_plan
from planner.explain import (
    GROUP_COLUMNS,
    STEP_COLUMNS,
    PlannedStep,
    group_rows,
    provenance_lines,
    rank_ranges,
    shape_line,
    solver_line,
    step_row,
    verdict,
)
from planner.plan import AttentionKind, SolveStatus
from planner.simulate import simulate
from tests.planner.test_simulate import second_cost

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
        "bound": "4.4 s", "gap": "20.0%", "idle": "20.0%", "peak": "140 B", "status": "feasible",
    }
    unknown = dict(zip(STEP_COLUMNS, step_row(planned(bound_s=0.0, status=SolveStatus.GREEDY)), strict=True))
    assert (unknown["bound"], unknown["gap"], unknown["status"]) == ("-", "-", "greedy")


def test_group_rows_follow_execution_order() -> None:
    rows = [dict(zip(GROUP_COLUMNS, row, strict=True)) for row in group_rows(planned())]
    assert [row["attention"] for row in rows] == ["ring 2", "local", "ulysses 2", "local"]
    assert rows[2] == {
        "microbatch": "2", "attention": "ulysses 2", "ranks": "1-2", "seqs": "1", "tokens": "2", "longest": "2",
        "start": "4 s", "seconds": "1 s", "peak": "110 B",
    }


def test_lines() -> None:
    step = planned()
    assert shape_line(step.plan) == "ring 2, ulysses 2, 2 x local"
    assert solver_line(step.plan) == (
        "solver: not proven optimal, gap 20.00% to the proven bound of 4.4 s, found in 250 ms (why)"
    )
    greedy = planned(bound_s=0.0, status=SolveStatus.GREEDY).plan
    assert "no lower bound known" in solver_line(greedy) and "greedy" in solver_line(greedy)
    line = verdict([step, step], num_devices=4)
    for part in ("flexsp: 5.5 s a step over 2 steps", "3 tokens/s (1 per device)", "idle 20.0%", "peak 140 B", "20.0%"):
        assert part in line
    assert "no bound known" in verdict([step, planned(bound_s=0.0)], num_devices=4)


def test_every_status_has_words() -> None:
    lines = {solver_line(planned(bound_s=5.5, status=status).plan) for status in SolveStatus}
    assert len(lines) == len(SolveStatus)


def test_provenance_marks_guesses() -> None:
    cost = second_cost()
    assert provenance_lines(cost) == ["cost model: derived for hand on hand"]
    origin = replace(cost.provenance, notes=("guess: 4 us", "data-sheet FLOPs"))
    lines = provenance_lines(replace(cost, provenance=origin), ("host",))
    assert lines[1:] == ["  - data-sheet FLOPs", "  - guess: host", "  - guess: 4 us"]
    measured = replace(
        cost.provenance, source="measured", num_samples=40, measured_on="box", mean_relative_error=0.03,
        max_relative_error=0.2,
    )
    head = provenance_lines(replace(cost, provenance=measured))[0]
    assert head == "cost model: measured for hand on hand, 40 samples on box, mean error 3.0%, worst 20.0%"


def test_rank_ranges() -> None:
    assert rank_ranges((0, 1, 2, 9, 4, 5)) == "0-2,9,4-5"
    assert rank_ranges((3,)) == "3"
