"""The arena's decisions in C++, driven from here with host memory: planned addresses, and safety whatever comes."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.alloc_trace import record_allocations
from memory.arena import AddressArena, ArenaError, ArenaLibrary, build_arena, replay
from memory.policy import KEEP_ALL, ActivationPolicy
from memory.token_swap import MicrobatchMemory
from planner.addresses.levels import plan_levels
from planner.addresses.plan import GREEDY_ONLY, AddressPlan, Method, Request, plan_addresses
from planner.addresses.rows import UNKNOWN, fit_rows
from planner.errors import PlanError
from planner.units import MIB
from tests.memory.allocation_cases import StepCase
from tests.memory.test_token_swap import build, host_tier, run
from tests.planner.addresses.test_plan import traces

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler to build the arena with"
)


@pytest.fixture(scope="module")
def library():
    built = build_arena()
    built.use_host_memory()
    return built


class Driver:
    """Plays a trace against the library, as torch would: fills each block, checks it when it is freed."""

    def __init__(self, library, stream=0):
        self.functions, self.stream, self.live, self.fill = library.functions, stream, {}, 0

    def allocate(self, name, size, stream=None):
        pointer = self.functions.longhaul_arena_malloc(size, 0, self.stream if stream is None else stream)
        self.fill = self.fill % 250 + 1
        if size:
            ctypes.memset(pointer, self.fill, size)
        self.live[name] = pointer, size, self.fill

    def free(self, name):
        pointer, size, fill = self.live.pop(name)
        if size:
            assert ctypes.string_at(pointer, size) == bytes([fill]) * size, "somebody else wrote here"
        self.functions.longhaul_arena_free(pointer, size, 0, self.stream)

    def play(self, requests, skipped_frees=()):
        moments = [(r.start, 1, i) for i, r in enumerate(requests)] + [(r.stop, 0, i) for i, r in enumerate(requests)]
        for _, is_start, index in sorted(moments):
            if is_start:
                self.allocate(index, requests[index].num_bytes)
            elif index not in skipped_frees:
                self.free(index)

    def free_all(self):
        for name in list(self.live):
            self.free(name)


def in_order(requests):
    """As a log has them: by the time of allocation."""
    return tuple(sorted(requests, key=lambda r: r.start))


def change(library, before):
    after = library.stats()
    return {
        field.name: getattr(after, field.name) - getattr(before, field.name) for field in dataclasses.fields(after)
    }


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(requests=traces())
def test_the_planned_sequence_gets_the_planned_addresses(library, requests):
    requests = in_order(requests)
    plan = plan_addresses(requests, GREEDY_ONLY)
    before = library.stats()
    assert library.begin([r.num_bytes for r in requests], plan.offsets, plan.peak_bytes, 0)
    driver = Driver(library)
    driver.play(requests)
    library.end()
    found = change(library, before)
    assert found["num_hits"] == sum(r.num_bytes > 0 for r in requests)
    assert found["num_misses"] == found["num_refused"] == found["live_bytes"] == 0


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(planned=traces(), came=traces(), data=st.data())
def test_any_other_sequence_is_safe_and_counted(library, planned, came, data):
    """Another trace than the planned one, and some blocks are not freed: every block keeps its contents."""
    planned, came = in_order(planned), in_order(came)
    mixed = data.draw(st.booleans())
    came = in_order((*planned, *came)) if mixed else came
    kept = data.draw(st.sets(st.integers(0, max(0, len(came) - 1)), max_size=3))
    plan = plan_addresses(planned, GREEDY_ONLY)
    before = library.stats()
    library.begin([r.num_bytes for r in planned], plan.offsets, plan.peak_bytes, 0)
    driver = Driver(library)
    driver.play(came, skipped_frees=kept)
    driver.live = {(0, name): block for name, block in driver.live.items()}
    library.begin([r.num_bytes for r in planned], plan.offsets, plan.peak_bytes, 0)  # while some still live
    driver.play(came)
    library.end()
    driver.free_all()
    found = change(library, before)
    counted = sum(found[name] for name in ("num_hits", "num_misses", "num_refused", "num_unplanned", "num_outside"))
    assert counted == 2 * sum(r.num_bytes > 0 for r in came)
    assert found["live_bytes"] == 0


@needs_compiler
def test_another_stream_is_never_served(library):
    library.begin([512], [0], 512, 0)
    before = library.stats()
    driver = Driver(library)
    driver.allocate("other", 512, stream=7)
    driver.allocate("own", 512)
    library.end()
    driver.free_all()
    assert (change(library, before)["num_misses"], change(library, before)["num_hits"]) == (1, 1)


@needs_compiler
def test_a_block_used_by_another_stream_makes_its_own_wait():
    """The device's functions are Python's here: what is called, in which order."""
    library, calls = build_arena(), []
    memory = {}

    def device_malloc(out, size, stream):
        block = ctypes.create_string_buffer(size)
        memory[ctypes.addressof(block)] = block
        out[0] = ctypes.addressof(block)
        return 0

    def event_create(event, _flags):
        event[0] = 99
        return 0

    handle, integer = ctypes.c_void_p, ctypes.c_int
    functions = (
        ctypes.CFUNCTYPE(integer, ctypes.POINTER(handle), ctypes.c_size_t, handle)(device_malloc),
        ctypes.CFUNCTYPE(integer, handle, handle)(lambda pointer, stream: calls.append(("free", stream)) or 0),
        ctypes.CFUNCTYPE(integer, ctypes.POINTER(handle), ctypes.c_uint)(event_create),
        ctypes.CFUNCTYPE(integer, handle, handle)(lambda event, stream: calls.append(("record", event, stream)) or 0),
        ctypes.CFUNCTYPE(integer, handle, handle, ctypes.c_uint)(
            lambda stream, event, _: calls.append(("wait", stream, event)) or 0
        ),
        ctypes.CFUNCTYPE(integer, handle)(lambda event: calls.append(("destroy", event)) or 0),
    )
    library.functions.longhaul_arena_device(*(ctypes.cast(function, handle) for function in functions))
    pointer = library.functions.longhaul_arena_malloc(512, 0, 5)
    for stream in (5, 6, 6):  # its own stream needs no wait, the other one only once
        library.functions.longhaul_arena_record_stream(pointer, stream)
    library.functions.longhaul_arena_free(pointer, 512, 0, 5)
    assert calls == [("record", 99, 6), ("wait", 5, 99), ("destroy", 99), ("free", 5)]


@needs_compiler
@pytest.mark.usefixtures("lone_rank")
def test_real_microbatches_are_learned_and_then_served(library):
    """Rows 137 and 140 are recorded; then 138 is served without ever having been seen, and 141 is not."""
    seen = {rows: _requests_of(rows) for rows in (137, 138, 140)}
    arena = AddressArena(library)
    first = library.stats()
    for rows in (137, 140, 138, 140, 137):
        arena.begin("layer stack", rows)
        driver = Driver(library)
        driver.play(seen[rows])
        arena.end()
    assert (arena.num_recorded, arena.num_served) == (2, 3)
    found = change(library, first)
    assert found["num_misses"] == found["num_refused"] == 0
    assert found["num_hits"] == 3 * sum(r.num_bytes > 0 for r in seen[137])
    arena.begin("layer stack", 141)
    arena.end()
    assert arena.num_recorded == 3
    assert "of 3 planned microbatches" in arena.describe() and "3 microbatches ran without" in arena.describe()


def _requests_of(rows):
    return record_allocations(StepCase((40, 7, rows - 47)).run).requests


@needs_compiler
def test_blocks_that_outlive_the_microbatch_get_no_place(library):
    arena, driver = AddressArena(library), Driver(library)
    for number in range(2):
        before = library.stats()
        arena.begin("grads", 1)
        driver.allocate("inner", 1000)
        driver.allocate(("grad", number), 700)
        driver.free("inner")
        arena.end()
    found = change(library, before)
    assert (found["num_hits"], found["num_unplanned"]) == (1, 1)
    driver.free_all()


def test_without_a_compiler_it_says_so_in_one_line(tmp_path):
    with mock.patch.object(shutil, "which", return_value=None), pytest.raises(ArenaError, match="no C\\+\\+ compiler"):
        ArenaLibrary(tmp_path)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    with mock.patch.object(shutil, "which", return_value=str(broken)), pytest.raises(ArenaError, match="it is broken"):
        ArenaLibrary(tmp_path)


@settings(max_examples=40, deadline=None)
@given(traces())
def test_replay_of_any_plan_finds_every_block_intact(requests):
    plan = plan_addresses(requests, GREEDY_ONLY)
    assert replay(requests, plan) == sum(r.num_bytes for r in requests)


def test_replay_sees_an_overlap():
    requests = (Request(num_bytes=600, start=0, stop=3), Request(num_bytes=100, start=1, stop=2))
    wrong = AddressPlan(offsets=(0, 512), peak_bytes=1024, bound_bytes=1024, method=Method.BY_SIZE)
    with pytest.raises(PlanError, match="request 0 was overwritten"):
        replay(requests, wrong)


@pytest.mark.usefixtures("lone_rank")
def test_a_real_step_replays_at_both_kinds_of_addresses():
    case = StepCase()
    trace = record_allocations(case.run, case.model.layers.values())
    for plan in (plan_addresses(trace.requests), plan_levels(trace.requests, trace.sections).whole):
        assert replay(trace.requests, plan) == sum(r.num_bytes for r in trace.requests)


def test_a_swapped_microbatch_replays_too():
    """Among its blocks are those that the memory manager makes for rows that come back."""
    bounds = []
    for policy in (KEEP_ALL, ActivationPolicy(swap_fraction=0.5, keep_fraction=0.25, swap_pair=True)):
        layers, (tier, _) = build(8), host_tier(4 * MIB)
        memory = MicrobatchMemory(policy, tier, num_layers=8, num_rows=128)
        requests = record_allocations(functools.partial(run, layers, 128, memory)).requests
        plan = plan_addresses(requests, GREEDY_ONLY)
        assert replay(requests, plan) == sum(r.num_bytes for r in requests)
        bounds.append(plan.bound_bytes)
    assert bounds[1] < 0.7 * bounds[0], bounds


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)), min_size=1, max_size=5), st.data())
def test_rows_are_fitted_exactly(lines, data):
    rows = data.draw(st.lists(st.integers(1, 10**5), min_size=2, max_size=2, unique=True))
    first, second = (
        [Request(num_bytes=fixed + slope * n, start=i, stop=i + 2) for i, (fixed, slope) in enumerate(lines)]
        for n in rows
    )
    found = fit_rows(rows[0], first, rows[1], second)
    assert found is not None
    assert found.sizes(777) == tuple(fixed + slope * 777 for fixed, slope in lines)
    assert fit_rows(rows[0], first, rows[1], second[:-1]) is None
    assert fit_rows(rows[0], first, rows[0], first) is None


def test_sizes_that_are_no_line_in_the_rows_stay_unknown():
    def sized(*sizes):
        return [Request(num_bytes=size, start=i, stop=i + 1) for i, size in enumerate(sizes)]

    assert fit_rows(10, sized(100), 20, sized(90)) is None, "nothing but unknown sizes"
    found = fit_rows(10, sized(10000, 12), 20, sized(20000, 17))
    assert found is not None
    assert found.sizes(13) == (13000, UNKNOWN)


@needs_compiler
def test_a_block_of_unknown_size_gets_no_place_and_keeps_the_order(library):
    before = library.stats()
    library.begin([1000, UNKNOWN, 512], [0, -1, 1024], 1536, 0)
    driver = Driver(library)
    for name, size in enumerate((1000, 512, 512)):
        driver.allocate(name, size)
    library.end()
    driver.free_all()
    found = change(library, before)
    assert (found["num_hits"], found["num_unplanned"], found["num_misses"]) == (2, 1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_step_is_served_and_right():
    """In a process of its own: the allocator is changed for good."""
    code = """
import torch
from memory.arena import install_on_cuda
arena = install_on_cuda(0)
weight = torch.randn(512, 512, device="cuda", requires_grad=True)
for rows in (300, 400, 350, 300):
    x = torch.ones(rows, 512, device="cuda")
    arena.begin("step", rows, torch.cuda.current_stream().cuda_stream)
    y = (x @ weight).relu()
    (y * y).sum().backward()
    del y
    arena.end()
    expected = 2 * x.double().T @ (x.double() @ weight.detach().double()).relu()
    assert torch.allclose(weight.grad.double(), expected, rtol=1e-3, atol=1e-2)
    weight.grad = None
stats = arena.library.stats()
assert arena.num_served == 2 and stats.num_hits > 0 and stats.num_refused == 0, arena.describe()
print(arena.describe())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
