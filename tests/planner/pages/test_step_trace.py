"""One step's trace: predicted lanes as planned, measured lanes as measured, on one time axis."""

from __future__ import annotations

import dataclasses
import json

import pytest

from planner.cost.fits import ActivationFit
from planner.measured.copy_times import BACK, LANES, LAYERS, OUT, WAIT, Interval, RankLanes, StepLanes
from planner.measured.drift import planned_times
from planner.pages.step_trace import LANES_PER_RANK, MEASURED, PREDICTED, step_trace
from planner.plan import MemoryPolicy
from planner.step_planner import plan_step
from tests.planner.pages.trace_rules import check_trace, place_of
from tests.planner.replay.executed import cost_here, executed_on, make_plan, slower
from tests.planner.step_cases import RING, ULYSSES, make_limits
from tests.plans import step_problem

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
        step_problem((4000, 900, 2500, 700, 3000, 100, 1200, 800), 4, cost, make_limits(kinds=(ULYSSES, RING))),
        step=0,
        strategy="hdp-pp",
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


def lane_of(event):
    """(rank, lane) of a slice in a trace with copies. Lane None is the rank's own lane."""
    rank, place = divmod(place_of(event)[1], LANES_PER_RANK)
    return rank, None if place == 0 else LANES[place - 1]


def recorded_lanes(plan, measured):
    """Recorded lanes of every rank but the last: a layer as long as a pass, recomputation inside the backward, and
    copies at the same time."""
    ranks = []
    for rank, times in enumerate(measured.ranks[:-1]):
        found = []
        for each in times.microbatches:
            middle_s, half_s = each.middle_s, (each.stop_s - each.middle_s) / 2
            for lane, name, start_s, stop_s, num_bytes in (
                (LAYERS, "forward 0", each.start_s, middle_s, 0), (LAYERS, "backward 0", middle_s, each.stop_s, 0),
                (LAYERS, "recompute mlp", middle_s + half_s / 3, middle_s + half_s, 0),
                (OUT, "layer 0", each.start_s, middle_s + half_s / 3, 3000), (WAIT, "for copies out", middle_s,
                middle_s + half_s / 3, 0), (BACK, "layer 0", middle_s + half_s / 3, each.stop_s, 2000),
            ):
                found.append(Interval(lane=lane, name=name, start_s=start_s, stop_s=stop_s, num_bytes=num_bytes))
        ranks.append(RankLanes(rank=rank, intervals=tuple(found), num_left_out=rank))
    return StepLanes(step=plan.step, ranks=tuple(ranks))


@pytest.mark.parametrize("seed", range(8))
def test_copies_lie_below_their_ranks_measured_lane(seed):
    plan, measured = executed_on(make_plan(seed, cost_here(), seed), slower(cost_here(), 1.1 + seed / 7))
    lanes = recorded_lanes(plan, measured)
    trace = step_trace(plan, measured, lanes)
    check_trace(trace)
    zero_us = 1e6 * max(rank.gather_s for rank in measured.ranks)
    events = slices(trace, MEASURED)
    for rank in lanes.ranks:
        for lane in LANES:
            mine = [event for event in events if lane_of(event) == (rank.rank, lane)]
            wanted = [each for each in rank.intervals if each.lane == lane]
            assert [event["name"] for event in mine] == [each.name for each in wanted]
            for event, each in zip(mine, wanted, strict=True):
                assert event["ts"] == pytest.approx(zero_us + 1e6 * each.start_s, abs=GRID_US)
                assert event["dur"] == pytest.approx(1e6 * (each.stop_s - each.start_s), abs=2 * GRID_US)
                if lane in (OUT, BACK):
                    assert event["args"]["bytes"] == each.num_bytes
                    speed = each.num_bytes / (each.stop_s - each.start_s)
                    assert event["args"]["bytes_per_s"] == pytest.approx(speed, rel=1e-3)
        own = {event["cat"] for event in events if lane_of(event) == (rank.rank, None)}
        assert "reduce" in {event["name"] for event in events if lane_of(event) == (rank.rank, None)} and "step" in own
    assert not any(lane_of(event)[0] == plan.num_ranks - 1 and lane_of(event)[1] for event in events)
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"]
    assert "rank 0: layers" in names and "rank 0: copies out" in names and "rank 0: waiting for copies" in names
    num_left_out = sum(rank.num_left_out for rank in lanes.ranks)
    assert trace["otherData"]["lanes"].startswith(f"{num_left_out} layers and copies")


def test_copies_that_the_plan_asks_for_are_predicted():
    fit = ActivationFit(
        swap_bytes_per_token=0.5, recompute_bytes_per_token=0.4, recompute_s_per_token=1e-6, copy_bytes_per_s=1e6,
        hidden_share=0.3,
    )
    cost = dataclasses.replace(cost_here(), activation=fit)
    plan = make_plan(2, cost)
    half = MemoryPolicy(keep_fraction=0.5, swap_fraction=0.5)
    swapping = dataclasses.replace(plan.microbatches[0], memory=half)
    plan = dataclasses.replace(plan, microbatches=(swapping, *plan.microbatches[1:]))
    trace = step_trace(plan, None, cost=cost)
    check_trace(trace)
    start_s, stop_s = planned_times(plan)[0]
    copies = [event for event in slices(trace, PREDICTED) if lane_of(event)[1] is not None]
    assert {lane_of(event) for event in copies} == {(rank, lane) for rank in swapping.ranks for lane in (OUT, BACK)}
    for event in copies:
        assert 1e6 * start_s - GRID_US <= event["ts"]
        assert event["ts"] + event["dur"] <= 1e6 * stop_s + 2 * GRID_US
        assert event["args"]["bytes"] > 0
        assert event["args"]["bytes_per_s"] == pytest.approx(1e6, rel=1e-3)
    first = next(event for event in slices(trace, PREDICTED) if event["cat"] == "microbatch")
    assert first["args"]["memory"] == "swap 50%"
    assert len(step_trace(plan, None)["traceEvents"]) < len(trace["traceEvents"]), "only where prices are known"
