"""Measured steps: their line in the file, and what they say about a microbatch."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.measured.step_times import (
    MeasuredStep,
    MicrobatchTime,
    RankStep,
    measured_from_plain,
    measured_to_plain,
    microbatch_places,
)
from tests.planner.replay.executed import cost_here, executed_on, make_plan

SECONDS = st.integers(0, 10**9).map(lambda micros: micros / 1e6)
TIMES = st.builds(
    MicrobatchTime, microbatch=st.integers(0, 50), start_s=SECONDS, middle_s=SECONDS, stop_s=SECONDS,
    forward_wait_s=SECONDS, backward_wait_s=SECONDS,
)
RANKS = st.builds(RankStep, gather_s=SECONDS, reduce_s=SECONDS, microbatches=st.lists(TIMES, max_size=4).map(tuple))
STEPS = st.builds(
    MeasuredStep, step=st.integers(0, 10**6), ranks=st.lists(RANKS, min_size=1, max_size=5).map(tuple),
    plan_wait_s=SECONDS, update_s=SECONDS,
)


def time_of(microbatch: int, start_s: float, stop_s: float) -> MicrobatchTime:
    return MicrobatchTime(
        microbatch=microbatch, start_s=start_s, middle_s=start_s, stop_s=stop_s, forward_wait_s=0.0,
        backward_wait_s=0.0,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_a_line_gives_the_step_back_to_the_microsecond(step: MeasuredStep) -> None:
    assert measured_from_plain(json.loads(json.dumps(measured_to_plain(step), allow_nan=False))) == step


@pytest.mark.parametrize(
    "change",
    [{"rank": [9]}, {"gather_s": []}, {"start_s": [None]}, {"stop_s": [1.0, 2.0]}, {"step": "x"}, {"update_s": None}],
)
def test_another_line_is_refused(change: dict[str, Any]) -> None:
    step = MeasuredStep(
        step=0, ranks=(RankStep(gather_s=0.1, reduce_s=0.1, microbatches=(time_of(0, 0.0, 1.0),)),), plan_wait_s=0.0,
        update_s=0.0,
    )
    with pytest.raises(ValueError, match="not the measured times of a step"):
        measured_from_plain({**measured_to_plain(step), **change})


def test_a_microbatch_lasts_from_its_last_start_to_its_last_end() -> None:
    """Rank 0 waited two seconds for rank 1, which was still busy: that is no part of the microbatch."""
    ranks = (
        RankStep(gather_s=0.3, reduce_s=0.9, microbatches=(time_of(1, 0.0, 5.0),)),
        RankStep(gather_s=0.2, reduce_s=0.4, microbatches=(time_of(0, 0.0, 2.0), time_of(1, 2.0, 5.5))),
    )
    step = MeasuredStep(step=0, ranks=ranks, plan_wait_s=0.0, update_s=0.1)
    assert step.microbatch_s() == {0: 2.0, 1: 3.5}
    assert step.span_s == 5.5
    assert step.fixed_s == pytest.approx(0.2 + 0.4 + 0.1)


def test_places_are_every_rank_of_every_microbatch_once() -> None:
    plan, measured = executed_on(make_plan(0, cost_here()), cost_here())
    places = microbatch_places(plan)
    assert len(set(places)) == len(places)
    assert set(places) == {
        (each.microbatch, rank) for rank, times in enumerate(measured.ranks) for each in times.microbatches
    }
