"""A simulation of torch's CUDA caching allocator by its published rules, to replay traces where there is no CUDA.

It covers one stream and default settings. Requests are rounded up to 512 B. Those up to 1 MiB share segments of 2 MiB,
those below 10 MiB take segments of 20 MiB, and larger ones take a segment of their own, rounded up to 2 MiB. A request
gets the smallest free block that holds it, at the lowest address among equals. What is left of that block stays free if
it is at least 512 B (small pool) or more than 1 MiB (large pool). Free neighbours in a segment merge.

With expandable segments each pool is one segment, which grows by pages (2 MiB small, 20 MiB large) where no free block
suffices, and whatever is left of a block stays free. With a memory limit (not supported here for expandable segments) a
segment that would exceed it makes the allocator give all its free segments back and try once more. On a device such a
retry also waits until all queued work is done.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from planner.addresses.plan import ALIGNMENT_BYTES, Request, live_bytes, rounded_bytes
from planner.units import MIB

_SMALL_BYTES = MIB
_SMALL_SEGMENT_BYTES = 2 * MIB
_LARGE_SEGMENT_BYTES = 20 * MIB
_OWN_SEGMENT_BYTES = 10 * MIB
_ROUND_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Result of a simulation. ``reserved_bytes``: peak bytes taken from the device. ``allocated_bytes``: peak bytes in
    blocks, padding included. ``num_device_mallocs``: allocations from the device. ``fits``: whether the limit sufficed;
    otherwise the trace was not finished."""

    reserved_bytes: int
    allocated_bytes: int
    num_device_mallocs: int
    num_retries: int
    fits: bool

    @property
    def fragmentation(self) -> float:
        """Share of the peak reserved bytes that the peak of the blocks leaves unused."""
        return 1 - self.allocated_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


@dataclass(slots=True)
class _Pool:
    """The address ranges of one pool. ``free``: sorted (size, start). Free ranges do not merge across ``borders``
    between segments."""

    least_rest_bytes: int
    free: list[tuple[int, int]] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)  # free: start -> end
    ends: dict[int, int] = field(default_factory=dict)  # free: end -> start
    borders: set[int] = field(default_factory=set)
    top: int = 0

    def add(self, start: int, end: int) -> None:
        """Free a range and merge it with its free neighbours in the same segment."""
        if start not in self.borders and start in self.ends:
            start = self.remove(self.ends[start])[0]
        if end not in self.borders and end in self.starts:
            end = self.remove(end)[1]
        self.starts[start], self.ends[end] = end, start
        bisect.insort(self.free, (end - start, start))

    def take(self, size: int) -> tuple[int, int] | None:
        """Start and end of a block for ``size`` bytes by best fit, or None. A rest too small to split off stays in the
        block."""
        place = bisect.bisect_left(self.free, (size, -1))
        if place == len(self.free):
            return None
        start, end = self.remove(self.free[place][1])
        if end - start - size < self.least_rest_bytes:
            return start, end
        self.add(start + size, end)
        return start, start + size

    def remove(self, start: int) -> tuple[int, int]:
        end = self.starts.pop(start)
        del self.ends[end]
        del self.free[bisect.bisect_left(self.free, (end - start, start))]
        return start, end


class LimitReached(Exception):
    """There is no room, even after all free segments were given back."""


class CachingAllocator:
    """The simulated allocator. Addresses are numbers in one unbounded space per pool."""

    def __init__(self, *, expandable: bool, limit_bytes: float = math.inf) -> None:
        assert limit_bytes == math.inf or not expandable
        self._expandable = expandable
        self._limit_bytes = limit_bytes
        self._segments: list[tuple[_Pool, int, int]] = []
        least_large = ALIGNMENT_BYTES if expandable else _SMALL_BYTES + ALIGNMENT_BYTES
        self._small, self._large = _Pool(ALIGNMENT_BYTES), _Pool(least_large)
        self._live: dict[int, tuple[_Pool, tuple[int, int]]] = {}
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_device_mallocs = self.num_retries = 0

    def allocate(self, name: int, num_bytes: int) -> tuple[int, int]:
        """Allocate a block. Returns its start and end; raises LimitReached."""
        size = max(ALIGNMENT_BYTES, rounded_bytes(num_bytes))
        pool = self._small if size <= _SMALL_BYTES else self._large
        block = pool.take(size)
        if block is None:
            self._grow(pool, size)
            block = pool.take(size)
            assert block is not None
        self._live[name] = pool, block
        return block

    def free(self, name: int) -> None:
        pool, block = self._live.pop(name)
        pool.add(*block)

    def _grow(self, pool: _Pool, size: int) -> None:
        self.num_device_mallocs += 1
        page = _SMALL_SEGMENT_BYTES if pool is self._small else _LARGE_SEGMENT_BYTES
        if self._expandable:
            missing = size - (pool.top - pool.ends.get(pool.top, pool.top))
            num_bytes = -(-missing // page) * page
        else:
            num_bytes = page if size < _OWN_SEGMENT_BYTES else -(-size // _ROUND_BYTES) * _ROUND_BYTES
            if self.reserved_bytes + num_bytes > self._limit_bytes:
                self._give_back()
                if self.reserved_bytes + num_bytes > self._limit_bytes:
                    raise LimitReached
            pool.borders.update((pool.top, pool.top + num_bytes))
            self._segments.append((pool, pool.top, pool.top + num_bytes))
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        pool.top += num_bytes
        pool.add(pool.top - num_bytes, pool.top)


    def _give_back(self) -> None:
        """Give segments without a block in them back to the device."""
        self.num_retries += 1
        kept = []
        for pool, start, end in self._segments:
            if pool.starts.get(start) == end:
                pool.remove(start)
                self.reserved_bytes -= end - start
            else:
                kept.append((pool, start, end))
        self._segments = kept


def simulate(
    traces: SequenceOf[SequenceOf[Request]], *, expandable: bool, limit_bytes: float = math.inf
) -> Reserved:
    """Play traces, one per microbatch of a run, one after the other through one allocator."""
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit_bytes)
    fits = True
    try:
        _play(allocator, traces)
    except LimitReached:
        fits = False
    return Reserved(
        reserved_bytes=allocator.peak_reserved_bytes, allocated_bytes=max(map(live_bytes, traces), default=0),
        num_device_mallocs=allocator.num_device_mallocs, num_retries=allocator.num_retries, fits=fits,
    )


def _play(allocator: CachingAllocator, traces: SequenceOf[SequenceOf[Request]]) -> None:
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
