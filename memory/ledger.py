"""Memory accounts: reserve bytes first, allocate after. Also a first-fit allocator of places in a range."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from planner.errors import EXIT_INFEASIBLE, LonghaulError
from planner.units import format_bytes


class MemoryFullError(LonghaulError):
    """A reservation does not fit: ``needed_bytes`` were requested from ``account``, ``available_bytes`` are left."""

    exit_code = EXIT_INFEASIBLE

    def __init__(self, message: str, *, account: str, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.account = account
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class MemoryLedger:
    """Accounts with a fixed capacity (bytes). Every allocation is reserved first, so exceeding a limit is an error with
    numbers and never a failed allocation. Safe to use from several threads."""

    def __init__(self, capacity_bytes: Mapping[str, int]) -> None:
        self._capacity_bytes = dict(capacity_bytes)
        self._used_bytes = dict.fromkeys(capacity_bytes, 0)
        self._peak_bytes = dict.fromkeys(capacity_bytes, 0)
        self._lock = threading.Lock()

    def reserve(self, account: str, num_bytes: int, what: str, remedy: str = "") -> None:
        """Reserve ``num_bytes`` for ``what``. Raises MemoryFullError with needed and available bytes and ``remedy``."""
        with self._lock:
            available = self._capacity_bytes[account] - self._used_bytes[account]
            if num_bytes > available:
                raise MemoryFullError(
                    f"{account}: need {format_bytes(num_bytes)} for {what}, have {format_bytes(available)} of "
                    f"{format_bytes(self._capacity_bytes[account])}{remedy}",
                    account=account, needed_bytes=num_bytes, available_bytes=available,
                )
            self._used_bytes[account] += num_bytes
            self._peak_bytes[account] = max(self._peak_bytes[account], self._used_bytes[account])

    def release(self, account: str, num_bytes: int) -> None:
        """Return reserved bytes to the account."""
        with self._lock:
            if num_bytes > self._used_bytes[account]:
                raise ValueError(f"{account}: release of {num_bytes} bytes, only {self._used_bytes[account]} are used")
            self._used_bytes[account] -= num_bytes

    def used_bytes(self, account: str) -> int:
        """Bytes reserved now."""
        return self._used_bytes[account]

    def peak_bytes(self, account: str) -> int:
        """Most bytes reserved at once since ``restart_peak``, or since the start."""
        return self._peak_bytes[account]

    def restart_peak(self, account: str) -> None:
        """Start a new peak at the bytes reserved now."""
        with self._lock:
            self._peak_bytes[account] = self._used_bytes[account]


class Regions:
    """First-fit allocation in one range of ``capacity_bytes``; adjacent free places merge. Places start at multiples of
    ``alignment_bytes``; ``size_bytes`` is the size of a request with its padding."""

    def __init__(self, capacity_bytes: int, *, alignment_bytes: int) -> None:
        self._alignment_bytes = alignment_bytes
        whole = capacity_bytes // alignment_bytes * alignment_bytes
        self._free = [(0, whole)] if whole else []

    def size_bytes(self, num_bytes: int) -> int:
        return -(-max(num_bytes, 1) // self._alignment_bytes) * self._alignment_bytes

    def take(self, num_bytes: int) -> int | None:
        """Offset of a free place; None if no free place is large enough."""
        size = self.size_bytes(num_bytes)
        for place, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[place : place + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def give(self, offset: int, num_bytes: int) -> None:
        """Free the place that ``take`` returned for the same ``num_bytes``."""
        spans = sorted([*self._free, (offset, offset + self.size_bytes(num_bytes))])
        merged = [spans[0]]
        for start, stop in spans[1:]:
            if start < merged[-1][1]:
                raise ValueError(f"place {offset} is free already")
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free = merged

    @property
    def largest_free_bytes(self) -> int:
        return max((stop - start for start, stop in self._free), default=0)
