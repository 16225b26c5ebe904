"""The figures of a run: mixed microbatches, many ranks, losses that were not finite, runs that changed their ranks."""

from __future__ import annotations

import json

import pytest

from planner.measured.step_times import MeasuredStep, MicrobatchTime, RankStep
from planner.pages.run_report import as_json, make_run_report
from planner.plan import AttentionGroup, AttentionKind
from tests.launch.measured_run import record_of
from tests.planner.replay.executed import cost_here, executed_on, make_plan
from tests.plans import verified_plan


def time_of(microbatch, start_s, stop_s, wait_s=0.0):
    return MicrobatchTime(
        microbatch=microbatch, start_s=start_s, middle_s=(start_s + stop_s) / 2, stop_s=stop_s, forward_wait_s=wait_s,
        backward_wait_s=0.0,
    )


def step_of(ranks):
    return MeasuredStep(
        step=0, ranks=tuple(RankStep(gather_s=0.1, reduce_s=0.1, microbatches=times) for times in ranks),
        plan_wait_s=0.0, update_s=0.1,
    )


def test_groups_of_several_shapes_in_one_microbatch_are_called_mixed():
    groups = [
        AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(0,)),
        AttentionGroup(kind=AttentionKind.RING, ranks=(1, 2), sequences=(1,)),
    ]
    after = AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(2,))
    plan = verified_plan([groups, [after]], [9, 30, 4], 3)
    measured = step_of([(time_of(0, 0, 2), time_of(1, 2, 3)), (time_of(0, 0, 4, 1.0),), (time_of(0, 0, 4),)])
    report = make_run_report([record_of((plan, measured))], [(plan, measured)], cost=None)
    assert [(line.name, line.num_microbatches, line.measured_s) for line in report.shapes] == [
        ("local", 1, 1.0), ("mixed", 1, 4.0)
    ]
    assert [(line.compute_s, line.wait_s, line.idle_s) for line in report.ranks] == [(3, 0, 1), (3, 1, 0), (4, 0, 0)]
    busy_s = [sum(m.predicted_s for m in plan.microbatches if rank in m.ranks) for rank in range(3)]
    assert [line.predicted_busy_s for line in report.ranks] == pytest.approx(busy_s)


def test_a_loss_that_was_not_finite_stays_json():
    executed = executed_on(make_plan(0, cost_here()), cost_here())
    records = [record_of(executed) | {"loss": None, "plan_wait_s": None}]
    value = as_json(make_run_report(records, [executed], cost=cost_here()))
    assert json.loads(json.dumps(value, allow_nan=False))["loss_last"] is None
    assert value["parts_s"] == {}, "no means over steps that did not record their parts"


def test_without_recorded_times_the_run_itself_says_how_far_off_it_is():
    executed = executed_on(make_plan(0, cost_here()), cost_here())
    records = [record_of(executed) | {"drift_ratio": 1.8}] * 9
    drift = make_run_report(records, [], cost=None, factor=1.5).drift
    assert (drift.ratio, drift.is_off) == (1.8, True)


def test_ranks_are_those_of_the_last_start():
    old = verified_plan([[AttentionGroup(kind=AttentionKind.LOCAL, ranks=(1,), sequences=(0,))]], [9], 2)
    new = verified_plan([[AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(0,))]], [9], 1)
    steps = [(old, step_of([(), (time_of(0, 0, 7),)])), (new, step_of([(time_of(0, 0, 2),)]))]
    report = make_run_report([record_of(each) for each in steps], steps, cost=None)
    assert [(line.rank, line.compute_s) for line in report.ranks] == [(0, 2.0)]
