"""Measured peak memory of this process's device, per step."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from memory.arena import AddressArena
from planner.units import KIB, MIB

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's constants for mallopt, man 3 mallopt
_LARGE_BYTES = 2 * MIB  # a huge page
_FINE_BYTES = 64 * KIB  # glibc starts at 128 KiB and raises the threshold to 32 MiB as blocks are freed
_KEPT_TOP_BYTES = 8 * MIB


def map_large_blocks(*, fine: bool) -> None:
    """From now on this process maps every block of 2 MiB and more (``fine``: 64 KiB) on its own and unmaps it when it
    is freed (glibc; does nothing elsewhere).

    By default glibc takes blocks of up to 32 MiB from its heap. Aligned tensors often do not fit the holes that freed
    ones of equal size left, so the resident set grows without a leak, by a third where activations are recomputed, and
    no plan can predict it. Mapping costs one page fault per page of each block; huge pages
    (``glibc.malloc.hugetlb=1``, see ``launch.environment``) make that cheap for blocks of 2 MiB and more."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _FINE_BYTES if fine else _LARGE_BYTES)
            mallopt(_TRIM_THRESHOLD, _KEPT_TOP_BYTES)


def give_back_freed_memory() -> None:
    """Return the C library's free memory to the system, so that memory freed earlier does not count in the next peak
    (glibc; does nothing elsewhere)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """``reset`` before a step, ``read_bytes`` after it.

    CUDA: the allocator's peak, or the arena's where there is one, because torch then counts nothing. CPU: the process's
    peak resident set, which Linux can reset; on other systems it is the peak since the process began.
    """

    def __init__(self, device: torch.device, arena: AddressArena | None = None) -> None:
        self._device = device
        self._arena = arena
        self._clear = Path("/proc/self/clear_refs")
        self._status = Path("/proc/self/status")

    def reset(self) -> None:
        if self._arena is not None:
            self._arena.library.reset_peak()
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._clear.exists():
            self._clear.write_text("5")  # 5 resets the peak resident set (man 5 proc)

    def read_bytes(self) -> int:
        if self._arena is not None:
            return self._arena.library.stats().peak_bytes
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._status.exists():
            return 0
        for line in self._status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
        return 0
