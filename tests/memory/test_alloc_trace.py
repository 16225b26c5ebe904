"""Recorded traces: the same every time, equal in equal layers, in agreement with torch's own profiler."""

from __future__ import annotations

import pytest
import torch

from memory.alloc_trace import record_allocations, requests_from_snapshot
from planner.addresses.levels import plan_levels, section_members, section_shape
from planner.addresses.plan import Request, live_bytes, plan_addresses
from tests.memory.allocation_cases import POLICIES, StepCase

pytestmark = pytest.mark.usefixtures("lone_rank")


@pytest.mark.parametrize("policy", POLICIES)
def test_two_equal_steps_leave_the_same_trace(policy):
    case = StepCase(policy=POLICIES[policy])
    layers = list(case.model.layers.values())
    case.run()  # what is made once is made
    first, second = record_allocations(case.run, layers), record_allocations(case.run, layers)
    assert first == second
    assert len(first.requests) > 100
    assert [section.name for section in first.sections] == [
        *(f"layer {number} forward" for number in range(len(layers))),
        *(f"layer {number} backward" for number in reversed(range(len(layers)))),
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_repeat(policy):
    case = StepCase(policy=POLICIES[policy])
    case.run()
    trace = record_allocations(case.run, case.model.layers.values())
    for kind in ("forward", "backward"):
        sections = [section for section in trace.sections if section.name.endswith(kind)]
        shapes = {section_shape(trace.requests, section) for section in sections}
        assert len(shapes) == 1 and len(next(iter(shapes))) > 5
        plans = [
            plan_addresses([trace.requests[index] for index in section_members(trace.requests, section)])
            for section in sections
        ]
        assert len({plan.offsets for plan in plans}) == 1
    plan = plan_levels(trace.requests, trace.sections)
    assert len(plan.inner) == 2
    assert live_bytes(trace.requests) <= plan.whole.peak_bytes


def test_another_length_is_another_trace_of_as_many_requests():
    shorter, longer = StepCase((40, 7, 90)), StepCase((42, 7, 91))  # the loss has 20 chunks in both
    traces = [record_allocations(case.run).requests for case in (shorter, longer)]
    assert [(r.start, r.stop) for r in traces[0]] == [(r.start, r.stop) for r in traces[1]]
    assert sum(r.num_bytes for r in traces[0]) < sum(r.num_bytes for r in traces[1])


def profiler_blocks(run):
    """Sizes of all blocks that the CPU allocator handed out, and the most bytes at once, by torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    sizes, live, most = [], 0, 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        change = event.nbytes()
        live += change
        most = max(most, live)
        if change > 0:
            sizes.append(change)
    return sizes, most


def test_the_profiler_saw_these_blocks():
    """Not all of the same: see the module on what an active dispatch mode changes."""
    case = StepCase()
    case.run()
    trace = record_allocations(case.run)
    sizes, most = profiler_blocks(case.run)
    large = [r.num_bytes for r in trace.requests if r.num_bytes >= 64]
    assert set(large) <= set(sizes)
    assert sum(large) == pytest.approx(sum(size for size in sizes if size >= 64), rel=0.15)
    live = exact = 0
    events = [(r.start, r.num_bytes) for r in trace.requests] + [(r.stop, -r.num_bytes) for r in trace.requests]
    for _, change in sorted(events):
        live += change
        exact = max(exact, live)
    assert exact == pytest.approx(most, rel=0.15)


def test_snapshot_of_the_cuda_allocator():
    trace = [
        {"action": "segment_alloc", "addr": 0, "size": 2097152},
        {"action": "alloc", "addr": 0, "size": 512},
        {"action": "alloc", "addr": 512, "size": 1024},
        {"action": "free_requested", "addr": 0, "size": 512},
        {"action": "free_completed", "addr": 0, "size": 512},
        {"action": "alloc", "addr": 0, "size": 256},
    ]
    assert requests_from_snapshot(trace) == (
        Request(num_bytes=512, start=0, stop=2),
        Request(num_bytes=1024, start=1, stop=4),
        Request(num_bytes=256, start=3, stop=4),
    )
