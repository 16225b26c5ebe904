"""The simulated caching allocator keeps the rules it names, and the benchmark's traces are those of a real run."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fragmentation
from benchmarks.allocator_model import CachingAllocator, simulate
from planner.addresses.plan import Request, live_bytes
from planner.units import KIB, MIB
from tests.ranks import RankPool


def test_segments():
    allocator = CachingAllocator(expandable=False)
    allocator.allocate(0, 1)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(1, MIB)
    assert allocator.reserved_bytes == 2 * MIB, "what is left of the small segment"
    allocator.allocate(2, MIB)
    assert allocator.reserved_bytes == 4 * MIB
    allocator.allocate(3, 3 * MIB)
    assert allocator.reserved_bytes == 24 * MIB, "a shared large segment"
    allocator.allocate(4, 11 * MIB)
    assert allocator.reserved_bytes == 24 * MIB, "fits beside it"
    allocator.allocate(5, 11 * MIB)
    assert allocator.reserved_bytes == 24 * MIB + 12 * MIB, "one of its own, rounded to 2 MiB"
    assert allocator.num_device_mallocs == 4


def test_large_rests_of_a_mebibyte_stay_with_their_block():
    allocator = CachingAllocator(expandable=False)
    allocator.allocate(0, 12 * MIB)
    allocator.free(0)
    start, end = allocator.allocate(1, 11 * MIB)
    assert end - start == 12 * MIB
    allocator.free(1)
    start, end = allocator.allocate(2, 11 * MIB - KIB)
    assert end - start == 11 * MIB - KIB


def test_best_fit_and_merging():
    allocator = CachingAllocator(expandable=False)
    blocks = [allocator.allocate(i, 4 * MIB) for i in range(5)]  # one segment of 20 MiB
    allocator.free(0)
    allocator.free(2)
    allocator.free(3)
    assert allocator.allocate(5, 4 * MIB) == blocks[0], "the hole of 4, not the one of 8"
    assert allocator.allocate(6, 8 * MIB) == (blocks[2][0], blocks[3][1])
    assert allocator.num_device_mallocs == 1


def test_segments_do_not_merge_but_expandable_ones_are_one():
    for expandable, calls in ((False, 3), (True, 2)):
        allocator = CachingAllocator(expandable=expandable)
        for name in range(2):
            allocator.allocate(name, 20 * MIB)
        for name in range(2):
            allocator.free(name)
        allocator.allocate(2, 40 * MIB)
        assert allocator.num_device_mallocs == calls
        assert allocator.reserved_bytes == (40 if expandable else 80) * MIB


def test_at_the_limit_free_segments_go_back_and_it_tries_again():
    def blocks(*sizes):
        return [Request(num_bytes=size * MIB, start=2 * i, stop=2 * i + 1) for i, size in enumerate(sizes)]

    ample, tight = (simulate([blocks(20, 30, 20)], expandable=False, limit_bytes=limit * MIB) for limit in (50, 49))
    assert (ample.num_retries, ample.num_device_mallocs, ample.fits) == (0, 2, True)
    assert (tight.num_retries, tight.fits) == (1, True), "30 fits after 20 went back, and is used for the last 20"
    assert not simulate([blocks(20, 30)], expandable=False, limit_bytes=29 * MIB).fits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_blocks_never_overlap_and_reserved_covers_the_live_ones(seed, expandable):
    rng = random.Random(seed)
    allocator, live, pools = CachingAllocator(expandable=expandable), {}, {}
    for name in range(120):
        if live and rng.random() < 0.45:
            victim = rng.choice(list(live))
            live.pop(victim), pools.pop(victim)
            allocator.free(victim)
        size = rng.choice([rng.randint(1, 4000), rng.randint(1, 2 * MIB), rng.randint(1, 40 * MIB)])
        start, end = allocator.allocate(name, size)
        is_small = size <= MIB
        assert end - start >= size
        assert all(end <= s or e <= start for n, (s, e) in live.items() if pools[n] == is_small)
        live[name], pools[name] = (start, end), is_small
        assert sum(e - s for s, e in live.values()) <= allocator.reserved_bytes


def test_a_repeated_trace_asks_the_device_once():
    requests = [Request(num_bytes=(i % 7 + 1) * MIB, start=i, stop=i + 3) for i in range(30)]
    once, often = (simulate([requests] * count, expandable=False) for count in (1, 5))
    assert once.reserved_bytes == often.reserved_bytes >= live_bytes(requests)
    assert once.num_device_mallocs == often.num_device_mallocs
    assert 0 <= once.fragmentation < 1


def call_main(rank, world_size, init_method, arguments):
    fragmentation.main(arguments)


def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "report.md"
    arguments = f"--model tiny --layers 2 --budget 256 --microbatches 3 --out {out}".split()
    pool = RankPool(1)  # a process of its own, but with torch already loaded
    try:
        pool.run(call_main, arguments)
    finally:
        pool.close()
    text = out.read_text()
    assert "found intact" in text and "| 3 ragged, up to 256 |" in text
    assert "Served from plans" in text or "no C++ compiler" in text
