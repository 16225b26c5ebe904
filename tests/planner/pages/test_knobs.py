"""The knobs: what is changed, that gains are real, and that nothing is tried where it would take long."""

from __future__ import annotations

from dataclasses import replace

from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.inputs.cluster import ClusterSpec
from planner.inputs.files import load_cluster, load_model
from planner.pages import knobs
from planner.pages.knobs import Scenario, best_knobs
from planner.plan import AttentionKind, MemoryAction
from planner.step_planner import greedy_step, plan_step
from planner.units import GIB
from tests.plans import step_problem

MODEL = load_model("llama-3-8b")


def price(cluster: ClusterSpec, budget_bytes: int, longest: int) -> CostModel:
    return derive_cost(cluster, MODEL, num_ranks=cluster.num_ranks)


def start(lengths: tuple[int, ...], **changes: object) -> Scenario:
    limits = PlanLimits(device_budget_bytes=135 * GIB, max_ulysses_degree=32, kinds=(AttentionKind.ULYSSES,))
    return Scenario(
        change="", cluster=load_cluster("h200-8"), limits=replace(limits, **changes), lengths=lengths
    )


def test_gains_are_those_of_planning_again() -> None:
    scenario = start((40_000, *(900,) * 60, 8000, 16_000))
    found = best_knobs(scenario, price, num_knobs=9)
    assert found is not None
    gains = [knob.gain for knob in found]
    assert gains == sorted(gains, reverse=True) and min(gains) >= knobs.SMALLEST_GAIN
    nodes = next(knob for knob in found if knob.change == "twice the nodes (2)")
    assert abs((1 + nodes.gain) / 2 - (1 + nodes.gain_per_device)) < 1e-12
    speeds = []
    for cluster in (scenario.cluster, replace(scenario.cluster, num_nodes=2)):
        plan = greedy_step(
            step_problem(scenario.lengths, cluster.num_ranks, price(cluster, 0, 0), scenario.limits), step=0
        )
        speeds.append(plan.num_tokens / plan.predicted_s)
    assert abs(nodes.gain - (speeds[1] / speeds[0] - 1)) < 1e-12
    assert best_knobs(scenario, price, num_knobs=1) == found[:1]


def test_dropping_the_one_long_sequence_is_found() -> None:
    found = best_knobs(start((100_000, *(2000,) * 16)), price)
    assert found and any(knob.change == "--max-length 50000 (1 of 17 dropped)" for knob in found)


def test_changes_that_are_impossible_are_left_out() -> None:
    scenario = start((2000,) * 8)
    words = [change.change for change in knobs._changes(scenario)]
    assert not any("--max-length" in text for text in words)  # nothing would be left
    assert "ring attention allowed as well" in words and "ulysses attention allowed as well" not in words
    assert "links inside the node twice as fast" in words


def test_gains_are_those_of_the_strategy_that_planned() -> None:
    scenario = start((40_000, *(900,) * 20, 8000, 16_000))
    found = best_knobs(replace(scenario, strategy="static", degree=8), price, num_knobs=9)
    assert found is not None
    fewer = next(knob for knob in found if knob.change.startswith("--max-length 20000"))
    speeds = []
    for lengths in (scenario.lengths, scenario.lengths[1:]):
        plan = plan_step(
            step_problem(lengths, 8, price(scenario.cluster, 0, 0), scenario.limits),
            step=0,
            strategy="static",
            degree=8,
        )
        speeds.append(plan.num_tokens / plan.predicted_s)
    assert abs(fewer.gain - (speeds[1] / speeds[0] - 1)) < 1e-12
    assert knobs.usual_planner("static", 8, 100) == "static"
    assert knobs.usual_planner("static", 1024, 100) == knobs.GREEDY


def test_another_memory_policy_is_found() -> None:
    """The model takes 60 of 80 GiB: 16K tokens need more ranks with everything kept."""
    scenario = start((16_000,) * 8, device_budget_bytes=80 * GIB, host_budget_bytes=10**12)
    found = best_knobs(replace(scenario, strategy="adaptive"), price, num_knobs=9)
    assert found and any(knob.change.startswith("--memory auto") and knob.gain > 0.01 for knob in found)
    allowed = replace(scenario, limits=replace(scenario.limits, policies=tuple(MemoryAction)))
    assert not any("--memory" in change.change for change in knobs._changes(allowed))


def test_large_steps_and_steps_without_a_greedy_plan_are_not_tried() -> None:
    assert best_knobs(start((10,) * (knobs.MAX_WORK // 8 + 1)), price) is None
    assert best_knobs(start((10_000_000,)), price) is None
