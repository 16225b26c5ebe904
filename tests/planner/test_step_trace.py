"""One step's trace: predicted lanes as planned, measured lanes as measured, on one time axis."""

from __future__ import annotations

import dataclasses
import json

import pytest

from planner.drift import planned_times
from planner.step_planner import plan_step
from planner.step_trace import MEASURED, PREDICTED, step_trace
from tests.planner.executed import cost_here, executed_on, make_plan, slower
from tests.planner.step_cases import RING, ULYSSES, make_limits
from tests.planner.trace_rules import check_trace, place_of

GRID_US = 0.13
"""Times lie on a grid of 1/8 us."""


def slices(trace, process):
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and place_of(event)[0] == process]


@pytest.mark.parametrize("seed", range(4))
def test_both_sides_are_there_and_start_together(seed):
    plan, measured = executed_on(make_plan(5, cost_here(), seed), slower(cost_here(), 1.5))
    trace = json.loads(json.dumps(step_trace(plan, measured), allow_nan=False))
    zero_us = 1e6 * max(rank.gather_s for rank in measured.ranks)
    wanted = {(index, rank) for index, microbatch in enumerate(plan.microbatches) for rank in microbatch.ranks}
    for process, factor in ((PREDICTED, 1.0), (MEASURED, 1.5)):
        found = [event for event in slices(trace, process) if event["cat"] == "microbatch"]
        assert {(event["args"]["microbatch"], place_of(event)[1]) for event in found} == wanted
        for event in found:
            start_s, stop_s = planned_times(plan)[event["args"]["microbatch"]]
            assert event["ts"] == pytest.approx(zero_us + 1e6 * factor * start_s, abs=GRID_US)
            assert event["dur"] == pytest.approx(1e6 * factor * (stop_s - start_s), abs=GRID_US)
    last_us = max(event["ts"] + event["dur"] for event in slices(trace, PREDICTED))
    assert last_us == pytest.approx(zero_us + 1e6 * plan.predicted_s, abs=GRID_US)


def test_no_lane_overlaps_and_passes_lie_in_their_microbatch():
    plan, measured = executed_on(make_plan(1, cost_here()), slower(cost_here(), 1.5))
    events = slices(step_trace(plan, measured), MEASURED)
    assert min(event["ts"] for event in events) == 0
    for rank in range(plan.num_ranks):
        mine = [event for event in events if place_of(event)[1] == rank]
        outer = sorted((event for event in mine if event["cat"] != "pass"), key=lambda event: event["ts"])
        for before, after in zip(outer, outer[1:], strict=False):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
        passes = [event for event in mine if event["cat"] == "pass"]
        work = [event for event in outer if event["cat"] == "microbatch"]
        assert len(passes) == 2 * len(work)
        for event in work:
            stop_us = event["ts"] + event["dur"] - 1e-3
            inside = [each for each in passes if event["ts"] - 1e-3 <= each["ts"] < stop_us]
            assert [each["name"] for each in inside] == ["forward", "backward"]
            assert sum(each["dur"] for each in inside) == pytest.approx(event["dur"])
            waits_s = sum(each["args"]["wait_s"] for each in inside)
            assert event["args"]["compute_s"] + waits_s == pytest.approx(event["args"]["measured_s"])
    names = {event["name"] for event in events}
    assert {"gather", "reduce", "update"} <= names


def test_a_step_that_was_not_recorded_has_its_prediction_only():
    trace = step_trace(make_plan(1, cost_here()), None)
    assert slices(trace, MEASURED) == [] and len(slices(trace, PREDICTED)) > 0
    processes = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert processes == ["predicted"]


@pytest.mark.parametrize("seed", range(20))
def test_a_viewer_drops_nothing(seed):
    """The times of these machines are no round numbers: float rounding must not make slices overlap."""
    plan, measured = executed_on(make_plan(seed, cost_here(), seed), slower(cost_here(), 1.1 + seed / 7))
    check_trace(step_trace(plan, measured))


def test_pipeline_stages_show_forward_and_backward_apart():
    cost = dataclasses.replace(cost_here(), num_stages=2)
    plan = plan_step(
        (4000, 900, 2500, 700, 3000, 100, 1200, 800), step=0, num_ranks=4, cost=cost,
        limits=make_limits(kinds=(ULYSSES, RING)), strategy="hdp-pp",
    )
    trace = step_trace(plan, None)
    check_trace(trace)
    work = [event for event in slices(trace, PREDICTED) if event["cat"] == "microbatch"]
    assert len(plan.microbatches) > 1
    for index, microbatch in enumerate(plan.microbatches):
        mine = [event for event in work if event["args"]["microbatch"] == index]
        assert sorted(place_of(event)[1] for event in mine) == sorted([*microbatch.ranks] * 2)
        names = {event["name"].rpartition(", ")[2] for event in mine}
        assert names == {"forward", "backward"}
