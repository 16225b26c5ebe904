"""The trace of priced steps is what the simulation says, and no rank does two things at once."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from planner.inputs.files import load_cluster, load_model
from planner.pages.chrome_trace import chrome_trace
from planner.pages.planned_step import PlannedStep
from planner.plan import MemoryPolicy
from planner.pricing.simulate import simulate
from planner.replay.lanes import LANES, MAX_DRAWN_RANKS
from planner.replay.step import replay_step
from planner.step_planner import plan_step
from tests.planner.pages.trace_rules import check_trace, place_of
from tests.planner.step_cases import RING, ULYSSES, make_cost, make_limits
from tests.plans import step_problem

NUM_RANKS = 12


def planned(strategy: str, num_steps: int = 2) -> list[PlannedStep]:
    draw = random.Random(3)
    cost = make_cost(NUM_RANKS, kinds=(ULYSSES, RING))
    limits = make_limits(kinds=(ULYSSES, RING))
    steps = []
    for index in range(num_steps):
        lengths = [int(draw.paretovariate(0.9) * 100) % 20_000 + 1 for _ in range(60)]
        plan = plan_step(step_problem(lengths, NUM_RANKS, cost, limits), step=index, strategy=strategy)
        steps.append(PlannedStep(plan=plan, simulation=simulate(plan, cost)))
    return steps


@pytest.mark.parametrize("strategy", ["flexsp", "static"])
def test_no_rank_overlaps_and_all_work_is_there(strategy: str) -> None:
    steps, cluster = planned(strategy), load_cluster("h200-64")
    trace = json.loads(json.dumps(chrome_trace(steps, cluster), allow_nan=False))
    check_trace(trace)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    by_rank: dict[int, list[dict]] = {}
    for event in events:
        process, rank = place_of(event)
        assert process == rank // 8, "one process a node"
        by_rank.setdefault(rank, []).append(event)
    assert sorted(by_rank) == list(range(NUM_RANKS))
    for rank, mine in by_rank.items():
        mine.sort(key=lambda event: event["ts"])
        for before, after in zip(mine, mine[1:], strict=False):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3  # a nanosecond of rounding
        busy_s = sum(event["dur"] for event in mine if event["cat"] == "microbatch") / 1e6
        assert busy_s == pytest.approx(sum(step.simulation.rank_busy_s[rank] for step in steps))
    last = max(event["ts"] + event["dur"] for event in events) / 1e6
    assert last == pytest.approx(sum(step.simulation.step_s for step in steps))


def test_events_say_what_they_are() -> None:
    (step,) = planned("flexsp", num_steps=1)
    trace = chrome_trace([step], load_cluster("h200-64"))
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M" and "name" in event["args"]}
    assert {"node 0", "node 1", "rank 0", "rank 11"} <= names and "node 2" not in names
    first = step.plan.microbatches[0]
    mine = [event for event in trace["traceEvents"] if event["args"].get("microbatch") == 0]
    assert sorted(place_of(event)[1] for event in mine) == sorted(first.ranks)
    lengths = [step.plan.sequences[index].num_tokens for group in first.groups for index in group.sequences]
    for event in mine:
        group = next(group for group in first.groups if place_of(event)[1] in group.ranks)
        assert event["name"] == ("local" if group.degree == 1 else f"{group.kind} {group.degree}")
        assert event["args"]["num_tokens"] == sum(lengths) and event["args"]["longest_tokens"] == max(lengths)
        assert event["args"]["peak_bytes"] == first.peak_bytes and event["args"]["num_sequences"] == len(lengths)


def replayed(strategy: str, num_steps: int) -> list[PlannedStep]:
    """A replayed plan on nodes of 4 ranks, so that rings and all-to-alls cross nodes."""
    cluster, model = replace(load_cluster("h200-64"), devices_per_node=4), replace(load_model("tiny"), num_layers=3)
    memory = make_cost(NUM_RANKS).memory
    return [
        replace(step, replay=replay_step(step.plan, cluster, model, memory, draw=True))
        for step in planned(strategy, num_steps)
    ]


@pytest.mark.parametrize("strategy", ["flexsp", "hdp"])
def test_lanes_of_the_replay(strategy: str) -> None:
    """On a lane nothing overlaps, the compute lane holds all the compute there is, and a step fits before the next."""
    steps = replayed(strategy, num_steps=2)
    trace = json.loads(json.dumps(chrome_trace(steps, load_cluster("h200-64")), allow_nan=False))
    check_trace(trace)
    events = [event for event in trace["traceEvents"] if event.get("cat", "").startswith("replay")]
    assert NUM_RANKS <= MAX_DRAWN_RANKS and f"{NUM_RANKS} of {NUM_RANKS} ranks" in trace["otherData"]["replay"]
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    lanes: dict[tuple[str, str], list[dict]] = {}
    for event in events:
        lanes.setdefault((names[event["pid"]], LANES[place_of(event)[1]]), []).append(event)
    assert {rank for rank, _ in lanes} == {f"replay of rank {rank}" for rank in range(NUM_RANKS)}
    assert {lane for _, lane in lanes} == {"compute", "exchange", "nic"}
    for mine in lanes.values():
        mine.sort(key=lambda event: event["ts"])
        for before, after in zip(mine, mine[1:], strict=False):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
    starts_s = [0.0, max(steps[0].simulation.step_s, steps[0].replay.step_s)]
    for rank in range(NUM_RANKS):
        for start_s, step in zip(starts_s, steps, strict=True):
            mine = [event for event in lanes[f"replay of rank {rank}", "compute"]
                    if event["args"]["step"] == step.plan.step]
            assert min(event["ts"] for event in mine) >= start_s * 1e6 - 0.13
            busy_s = sum(event["dur"] for event in mine) / 1e6
            idle_s = step.replay.idle_s[rank] + step.replay.exposed_communication_s[rank]
            grid_s = 1.3e-7 * len(mine)  # starts and stops lie on a grid of 1/8 us
            assert step.replay.compute_s[rank] - grid_s <= busy_s <= step.replay.compute_s[rank] + idle_s + grid_s


def test_copies_have_a_lane() -> None:
    (step,) = planned("static", num_steps=1)
    policy = MemoryPolicy(keep_fraction=0.5, swap_fraction=0.5)
    swapped = replace(step.plan, microbatches=tuple(replace(each, memory=policy) for each in step.plan.microbatches))
    cluster, model = load_cluster("h200-64"), replace(load_model("tiny"), num_layers=3)
    replay = replay_step(swapped, cluster, model, make_cost(NUM_RANKS).memory, draw=True)
    copies = [lane for lane in replay.lanes if lane.lane == "copy"]
    assert {lane.name for lane in copies} == {"to the host", "from the host"} and max(replay.host_bytes) > 0
    assert "copies" in json.dumps(chrome_trace([replace(step, replay=replay)], cluster))
