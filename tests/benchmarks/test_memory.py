"""The memory benchmark: verdicts, picture and trace on made-up results, and one small measurement."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.memory import longest_table, predict_table, ways_table
from benchmarks.memory_picture import picture, trace
from benchmarks.memory_run import Course, Measured, Predicted
from planner.measured.copy_times import LAYERS, OUT, Interval
from planner.units import MIB


def measured(way, step_s=1.0, fits=True):
    return Measured(way=way, length=800, fits=fits, peak_bytes=MIB, resident_bytes=2 * MIB, step_s=step_s, cpu_s=step_s)


def predicted(over, tier_over=None, way="keep"):
    tier = {} if tier_over is None else {"tier_predicted_bytes": int(1000 * tier_over), "tier_measured_bytes": 1000}
    return Predicted(way=way, length=10, predicted_bytes=int(1000 * over), measured_bytes=1000, **tier)


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([predicted(1.0), predicted(1.05)], True),
        ([predicted(1.02), predicted(0.999)], False),
        ([predicted(1.051)], False),
        ([predicted(1.02, 1.04)], True),
        ([predicted(1.02, 1.06)], False),
        ([predicted(1.02, 0.99)], False),
        ([predicted(1.02), predicted(0.97, way="keep ample")], True),
    ],
)
def test_predictions_are_never_below_and_little_above(rows, met):
    (goal,) = predict_table(rows)[1]
    assert goal.met is met and str(goal).startswith("goal met" if met else "goal NOT met")


@pytest.mark.parametrize(
    ("swap", "met"),
    [(measured("swap 0", 1.4), [True, True]), (measured("swap 0", 1.41), [True, False]),
     (measured("swap 0", fits=False), [False, False])],
)
def test_the_longest_sequence_must_fit_and_be_quick(swap, met):
    found = {"swap 0": swap, "checkpoint": measured("checkpoint")}
    assert [goal.met for goal in longest_table(100, MIB, MIB, found)[1]] == met


def test_torchs_ways_are_named_as_torchs():
    lines = ways_table({way: measured(way) for way in ("keep", "checkpoint")})
    assert "| torch: checkpoint |" in "\n".join(lines) and "| keep |" in "\n".join(lines)


def interval(lane, start_s, stop_s, name="forward 0"):
    return Interval(lane=lane, name=name, start_s=start_s, stop_s=stop_s, num_bytes=7)


def made_up():
    intervals = (interval(LAYERS, 0, 1), interval(OUT, 0.5, 1.5, "layer 0"), interval(LAYERS, 1, 2, "backward 0"))
    return [
        Course(way="keep", length=64, samples=((0.1, 3 * MIB), (1.9, 2 * MIB))),
        Course(way="swap 0", length=64, samples=((0.1, MIB), (2.0, 0)), intervals=intervals, hidden_share=0.75),
    ]


def test_the_picture_is_an_svg_with_every_way_and_lane():
    root = ElementTree.fromstring(picture(made_up()))
    words = " ".join(text.text for text in root.iter("{http://www.w3.org/2000/svg}text"))
    for word in ("keep: 3 MiB", "swap 0: 1 MiB", "75%", "layers", "waiting", "to disk", "from disk"):
        assert word in words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


def test_the_trace_has_a_thread_per_lane_and_microseconds():
    value = json.loads(json.dumps(trace(made_up()[1])))
    slices = [event for event in value["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["tid"], event["ts"], event["dur"]) for event in slices] == [
        ("forward 0", 0, 0, 1e6), ("layer 0", 1, 5e5, 1e6), ("backward 0", 0, 1e6, 1e6)
    ]
    assert {event["args"]["name"] for event in value["traceEvents"] if event["name"] == "thread_name"} == {
        "layers", "waiting", "to disk", "from disk"
    }
