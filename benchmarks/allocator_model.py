"""A simulation of torch's CUDA caching allocator, from its published rules, to replay traces where there is no CUDA.

One stream, no memory limit, default settings. Blocks are rounded to 512 B; requests up to 1 MiB share segments of
2 MiB, those below 10 MiB take segments of 20 MiB, larger ones a segment of their own, rounded to 2 MiB. A request gets
the smallest free block that holds it (lowest address among equals); the rest of that block stays free if it is at least
512 B (small) or more than 1 MiB (large). Free neighbours in a segment merge. With expandable segments each of the two
pools is one segment that grows by mapping pages (2 MiB small, 20 MiB large) where its free space does not suffice.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from planner.allocation import ALIGNMENT_BYTES, Request, live_bytes, rounded_bytes
from planner.units import MIB

_SMALL_BYTES = MIB
_SMALL_SEGMENT_BYTES = 2 * MIB
_LARGE_SEGMENT_BYTES = 20 * MIB
_OWN_SEGMENT_BYTES = 10 * MIB
_ROUND_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """``reserved_bytes``: taken from the device at the end, which is the most, as nothing is given back.
    ``allocated_bytes``: most in blocks at once, padding included. ``num_device_mallocs``: times the device was asked.
    """

    reserved_bytes: int
    allocated_bytes: int
    num_device_mallocs: int

    @property
    def fragmentation(self) -> float:
        """Share of the reserved bytes that is no block at the peak."""
        return 1 - self.allocated_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


@dataclass(slots=True)
class _Pool:
    """Address ranges; ``free``: sorted (size, start); a segment's end stops merging."""

    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)  # free: start -> end
    ends: dict[int, int] = field(default_factory=dict)  # free: end -> start
    borders: set[int] = field(default_factory=set)

    def add(self, start: int, end: int) -> None:
        """A range becomes free; it merges with its free neighbours of the same segment."""
        if start not in self.borders and start in self.ends:
            before = self.ends[start]
            self._remove(before, start)
            start = before
        if end not in self.borders and end in self.starts:
            after = self.starts[end]
            self._remove(end, after)
            end = after
        self.starts[start], self.ends[end] = end, start
        bisect.insort(self.free, (end - start, start))

    def take(self, size: int) -> int | None:
        """Best fit. What is left over stays free only if it is worth it."""
        place = bisect.bisect_left(self.free, (size, -1))
        if place == len(self.free):
            return None
        found, start = self.free[place]
        self._remove(start, start + found)
        rest = found - size
        if rest >= ALIGNMENT_BYTES if self.is_small else rest > _SMALL_BYTES:
            self.add(start + size, start + found)
        return start

    def _remove(self, start: int, end: int) -> None:
        del self.starts[start], self.ends[end]
        del self.free[bisect.bisect_left(self.free, (end - start, start))]


class CachingAllocator:
    """The simulation. Addresses are numbers in one endless space per pool."""

    def __init__(self, *, expandable: bool) -> None:
        self._expandable = expandable
        self._pools = {is_small: _Pool(is_small) for is_small in (True, False)}
        self._tops = {True: 0, False: 0}
        self._live: dict[int, tuple[bool, int, int]] = {}  # request -> pool, start, end
        self.reserved_bytes = 0
        self.num_device_mallocs = 0

    def allocate(self, name: int, num_bytes: int) -> None:
        size = max(ALIGNMENT_BYTES, rounded_bytes(num_bytes))
        is_small = size <= _SMALL_BYTES
        pool = self._pools[is_small]
        free_before = dict(pool.starts)
        start = pool.take(size)
        if start is None:
            self._grow(pool, size)
            free_before = dict(pool.starts)
            start = pool.take(size)
            assert start is not None
        end = free_before[start]
        self._live[name] = is_small, start, min(end, start + size if start + size in pool.starts else end)

    def free(self, name: int) -> None:
        is_small, start, end = self._live.pop(name)
        self._pools[is_small].add(start, end)

    def _grow(self, pool: _Pool, size: int) -> None:
        self.num_device_mallocs += 1
        top = self._tops[pool.is_small]
        page = _SMALL_SEGMENT_BYTES if pool.is_small else _LARGE_SEGMENT_BYTES
        if self._expandable:
            missing = size - (top - pool.ends[top] if top in pool.ends else 0)
            num_bytes = -(-missing // page) * page
        else:
            num_bytes = page if size < _OWN_SEGMENT_BYTES else -(-size // _ROUND_BYTES) * _ROUND_BYTES
            pool.borders.add(top)
            pool.borders.add(top + num_bytes)
        self.reserved_bytes += num_bytes
        self._tops[pool.is_small] = top + num_bytes
        pool.add(top, top + num_bytes)


def simulate(traces: SequenceOf[SequenceOf[Request]], *, expandable: bool) -> Reserved:
    """Play traces one after the other through one allocator, as the microbatches of a run."""
    allocator = CachingAllocator(expandable=expandable)
    for requests in traces:
        moments = [(r.start, 1, index) for index, r in enumerate(requests)]
        moments += [(r.stop, 0, index) for index, r in enumerate(requests)]
        for _, is_start, index in sorted(moments):
            if not requests[index].num_bytes:
                continue
            if is_start:
                allocator.allocate(index, requests[index].num_bytes)
            else:
                allocator.free(index)
    return Reserved(
        reserved_bytes=allocator.reserved_bytes, allocated_bytes=max(map(live_bytes, traces), default=0),
        num_device_mallocs=allocator.num_device_mallocs,
    )
