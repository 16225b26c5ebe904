"""Addresses: no overlap, bound <= peak <= first fit, tiny cases against every order, both solvers, both levels."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.addresses import plan as allocation
from planner.addresses.levels import Section, plan_levels, section_shape
from planner.addresses.plan import (
    ALIGNMENT_BYTES,
    GREEDY_ONLY,
    AddressPlan,
    AllocationLimits,
    Method,
    Request,
    live_bytes,
    plan_addresses,
    requests_from_events,
    rounded_bytes,
    verify_addresses,
)
from planner.errors import PlanError

QUICK = AllocationLimits(max_moves=50, uses_packing=False)


@st.composite
def traces(draw, most=14, largest=6000):
    found = []
    for _ in range(draw(st.integers(0, most))):
        start, length = draw(st.integers(0, 20)), draw(st.integers(1, 12))
        found.append(Request(num_bytes=draw(st.integers(0, largest)), start=start, stop=start + length))
    return tuple(found)


def live_at_once(first, second):
    return first.start < second.stop and second.start < first.stop


def overlaps(requests, offsets):
    """Pairs of requests that are live at the same time and share addresses, checked by definition."""
    found = []
    for (a, x), (b, y) in itertools.combinations(list(zip(requests, offsets, strict=True)), 2):
        if live_at_once(a, b) and x < y + b.num_bytes and y < x + a.num_bytes:
            found.append((a, b))
    return found


def most_live(requests):
    times = range(0, max((r.stop for r in requests), default=0))
    return max((sum(rounded_bytes(r.num_bytes) for r in requests if r.start <= t < r.stop) for t in times), default=0)


def first_fit_peak(requests):
    """Peak of an allocator without foresight, which puts each allocation into the lowest hole among the live blocks."""
    live, peak = [], 0
    for request in sorted(requests, key=lambda r: r.start):
        live = [(at, other) for at, other in live if other.stop > request.start]
        at, size = 0, rounded_bytes(request.num_bytes)
        for low, other in sorted(live, key=lambda item: item[0]):
            if low - at >= size:
                break
            at = max(at, low + rounded_bytes(other.num_bytes))
        if size:
            live.append((at, request))
            peak = max(peak, at + size)
    return peak


@settings(max_examples=150, deadline=None)
@given(traces())
def test_plans_are_legal_and_between_bound_and_first_fit(requests):
    plan = plan_addresses(requests, QUICK)
    assert not overlaps(requests, plan.offsets)
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in plan.offsets)
    assert all(o + r.num_bytes <= plan.peak_bytes for r, o in zip(requests, plan.offsets, strict=True))
    assert live_bytes(requests) == most_live(requests) <= plan.bound_bytes <= plan.peak_bytes
    assert plan.peak_bytes <= first_fit_peak(requests)
    assert plan_addresses(requests, QUICK) == plan


@settings(max_examples=60, deadline=None)
@given(traces(most=5, largest=2500))
def test_tiny_plans_are_the_best_of_all_orders(requests):
    neighbours = allocation._neighbours(requests)
    best = min(
        max(o + rounded_bytes(r.num_bytes) for r, o in zip(requests, placed, strict=True))
        for order in itertools.permutations(range(len(requests)))
        for placed in [allocation._place(requests, order, neighbours)]
    ) if requests else 0
    plan = plan_addresses(requests, dataclasses.replace(QUICK, max_moves=300))
    assert plan.peak_bytes == best
    assert plan.bound_bytes <= best


def hard_case(seed=3, number=24):
    """A case where greedy does not reach the bound (which the tests that use it assert)."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        start = rng.randint(0, 30)
        size, length = rng.randint(1, 40) * ALIGNMENT_BYTES, rng.randint(1, 10)
        found.append(Request(num_bytes=size, start=start, stop=start + length))
    return tuple(found)


def test_the_big_m_program_closes_what_greedy_does_not():
    requests = hard_case(seed=10, number=14)
    greedy = plan_addresses(requests, GREEDY_ONLY)
    assert not greedy.is_optimal
    plan = plan_addresses(requests, AllocationLimits(max_moves=0, uses_packing=False))
    assert plan.method is Method.MIP and plan.peak_bytes < greedy.peak_bytes
    assert plan.is_optimal


def test_local_search_needs_no_solver():
    requests = hard_case()
    greedy = plan_addresses(requests, GREEDY_ONLY)
    found = plan_addresses(requests, AllocationLimits(max_mip_pairs=0, uses_packing=False))
    assert found.peak_bytes < greedy.peak_bytes
    assert found.method is Method.LOCAL_SEARCH


def test_cp_sat_closes_what_greedy_does_not():
    pytest.importorskip("ortools", reason="OR-tools is not installed: pip install longhaul[packing]")
    requests = hard_case()
    limits = AllocationLimits(max_moves=0)
    plan = plan_addresses(requests, limits)
    assert plan.peak_bytes < plan_addresses(requests, GREEDY_ONLY).peak_bytes
    assert plan.method is Method.PACKING and plan.is_optimal
    assert plan_addresses(requests, limits) == plan


def test_without_or_tools_the_plan_still_comes():
    requests = hard_case()
    with mock.patch.dict(sys.modules, {"ortools": None, "ortools.sat": None, "ortools.sat.python": None}):
        plan = plan_addresses(requests, AllocationLimits(max_moves=0, max_mip_pairs=0))
    assert plan == plan_addresses(requests, GREEDY_ONLY)


def test_verify_finds_overlap_misplacement_and_miscount():
    block = Request(num_bytes=ALIGNMENT_BYTES, start=0, stop=2)
    good = AddressPlan(offsets=(0, 512), peak_bytes=1024, bound_bytes=1024, method=Method.BY_SIZE)
    verify_addresses((block, block), good)
    for wrong in ((0, 0), (0, 1024), (0, 100), (0,), (-512, 0)):
        with pytest.raises(PlanError):
            verify_addresses((block, block), dataclasses.replace(good, offsets=wrong))


def test_a_request_that_does_not_end_after_its_start_is_refused():
    with pytest.raises(PlanError, match="request 0"):
        plan_addresses([Request(num_bytes=1, start=3, stop=3)])


def test_events_become_requests():
    events = [(7, 100), (8, 50), (7, -1), (7, 30), (99, -1), (8, -1)]
    assert requests_from_events(events) == (
        Request(num_bytes=100, start=0, stop=2),
        Request(num_bytes=50, start=1, stop=5),
        Request(num_bytes=30, start=3, stop=6),
    )


@st.composite
def layered(draw):
    """A trace of equal layers: inner blocks per section, and blocks that outlive their section."""
    blocks = st.tuples(st.integers(1, 3000), st.integers(0, 3), st.integers(1, 4))
    inner = draw(st.lists(blocks, min_size=1, max_size=5))
    kept = draw(st.lists(st.integers(1, 3000), max_size=3))
    num_layers, width = draw(st.integers(1, 4)), 10
    total = 2 * num_layers * width
    requests, sections = [], []
    for layer in range(num_layers):
        at = layer * width
        sections.append(Section(name=f"layer {layer}", start=at, stop=at + width))
        for size, start, length in inner:
            requests.append(Request(num_bytes=size, start=at + start, stop=at + start + length))
        for number, size in enumerate(kept):
            requests.append(Request(num_bytes=size, start=at + number, stop=total - at - number))
    return tuple(requests), tuple(sections)


@settings(max_examples=80, deadline=None)
@given(layered())
def test_two_levels(case):
    requests, sections = case
    plan = plan_levels(requests, sections, QUICK)
    assert not overlaps(requests, plan.whole.offsets)
    assert plan.whole.peak_bytes >= most_live(requests) == plan.whole.bound_bytes
    assert len(plan.inner) == 1, "equal sections share one plan"
    inside = section_shape(requests, sections[0])
    relative = []
    for section in sections:  # the same layout in every layer, shifted by the layer's base
        members = [i for i, r in enumerate(requests) if section.start <= r.start and r.stop < section.stop]
        places = [plan.whole.offsets[i] for i in members]
        relative.append(tuple(place - min(places) for place in places))
        assert section_shape(requests, section) == inside
    assert len(set(relative)) == 1
