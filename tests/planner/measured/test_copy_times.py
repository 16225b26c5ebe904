"""Layers and copies over time: seconds hidden and seen, sums over ranks, the file's columns."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.measured.copy_times import (
    BACK,
    LANES,
    LAYERS,
    OUT,
    WAIT,
    Interval,
    RankLanes,
    StepLanes,
    copy_seconds,
    lanes_from_plain,
    lanes_to_plain,
    rank_to_plain,
    summarize_copies,
)


def interval(lane, start_s, stop_s, num_bytes=0, name="x"):
    return Interval(lane=lane, name=name, start_s=start_s, stop_s=stop_s, num_bytes=num_bytes)


HAND_MADE = (
    interval(LAYERS, 0, 5), interval(OUT, 0, 2, 100), interval(OUT, 1, 3, 200), interval(BACK, 5, 6, 300),
    interval(WAIT, 2.5, 4), interval(WAIT, 5, 5.5),
)
"""Copies run in 0 .. 3 and 5 .. 6; in half a second of each somebody waits for them."""


def test_hidden_are_the_seconds_of_copies_in_which_nobody_waited():
    assert copy_seconds(HAND_MADE) == pytest.approx((4.0, 3.0))
    assert copy_seconds([interval(LAYERS, 0, 9), interval(WAIT, 0, 9)]) == (0.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from(LANES), st.integers(0, 30), st.integers(0, 9)), max_size=20))
def test_seconds_are_those_of_a_count_second_by_second(drawn):
    intervals = [interval(lane, start, start + length) for lane, start, length in drawn]

    def covers(lanes, second):
        return any(each.lane in lanes and each.start_s <= second < each.stop_s for each in intervals)

    copied = [second for second in range(40) if covers((OUT, BACK), second)]
    hidden = [second for second in copied if not covers((WAIT,), second)]
    assert copy_seconds(intervals) == pytest.approx((len(copied), len(hidden)))


def test_means_are_over_ranks_and_steps():
    quiet = RankLanes(rank=1, intervals=(interval(LAYERS, 0, 1),))
    steps = [StepLanes(step=step, ranks=(RankLanes(rank=0, intervals=HAND_MADE), quiet)) for step in (3, 4)]
    found = summarize_copies(steps)
    assert (found.num_steps, found.num_ranks, found.hidden_share) == (2, 2, pytest.approx(0.75))
    assert dataclasses.astuple(found)[2:] == pytest.approx((2.0, 1.5, 1.0, 2.0, 0.5, 150, 150))
    assert summarize_copies([StepLanes(step=0, ranks=())]) is None
    assert summarize_copies([StepLanes(step=0, ranks=(quiet,))]).hidden_share == 1.0


def test_a_line_of_the_file_comes_back():
    ranks = (RankLanes(rank=0, intervals=HAND_MADE), RankLanes(rank=2, intervals=(), num_left_out=7))
    line = json.dumps(lanes_to_plain(5, [rank_to_plain(rank) for rank in ranks]))
    found = lanes_from_plain(json.loads(line))
    assert found.step == 5 and found.ranks[1] == ranks[1]
    assert sorted(map(str, found.ranks[0].intervals)) == sorted(
        str(dataclasses.replace(each, start_s=float(each.start_s), stop_s=float(each.stop_s))) for each in HAND_MADE
    )
    starts = [each.start_s for each in found.ranks[0].intervals]
    assert starts == sorted(starts), "a layer comes before what lies within it"


def test_what_takes_no_microsecond_and_moves_nothing_is_left_out():
    tiny = RankLanes(rank=0, intervals=(interval(WAIT, 1, 1 + 1e-8), interval(OUT, 1, 1 + 1e-8, 8)))
    assert rank_to_plain(tiny)["num_bytes"] == [8]


@pytest.mark.parametrize(
    "change",
    [{"lane": [9]}, {"name": []}, {"stop_us": [-5]}, {"start_us": ["x"]}, {"rank": -1}, {"num_bytes": None}],
)
def test_anything_else_is_refused(change):
    plain = rank_to_plain(RankLanes(rank=0, intervals=(interval(OUT, 1, 2, 3),)))
    assert lanes_from_plain(lanes_to_plain(0, [plain])).ranks
    with pytest.raises(ValueError, match="not the memory lanes"):
        lanes_from_plain(lanes_to_plain(0, [{**plain, **change}]))
