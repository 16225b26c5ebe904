"""Measured peak memory of this process's device, per step."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from memory.arena import AddressArena
from planner.units import KIB, MIB

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt, man 3 mallopt
_LARGE_BYTES = 2 * MIB  # a huge page
_FINE_BYTES = 64 * KIB  # glibc begins with 128 KiB and raises that up to 32 MiB as blocks are freed
_KEPT_TOP_BYTES = 8 * MIB


def map_large_blocks(*, fine: bool) -> None:
    """From now on this process maps every block of 2 MiB and more (``fine``: 64 KiB) by itself and unmaps it when it
    is freed (glibc; does nothing elsewhere). By default glibc carves blocks of up to 32 MiB out of its heap: aligned
    tensors of equal size often do not fit the holes they left, the resident set grows though nothing leaks, by a third
    where activations are recomputed, and no plan can predict it. The price is a page fault per page of each block; huge
    pages (``glibc.malloc.hugetlb=1``, see ``launch.environment``) make that small for blocks of 2 MiB and more."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _FINE_BYTES if fine else _LARGE_BYTES)
            mallopt(_TRIM_THRESHOLD, _KEPT_TOP_BYTES)


def give_back_freed_memory() -> None:
    """Return the C library's free memory to the system: before a peak is measured, what was freed earlier must not
    count (glibc; does nothing elsewhere)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """``reset`` before a step, ``read_bytes`` after it.

    CUDA: the allocator's peak, the arena's own where there is one (torch then counts nothing). CPU: the process's peak
    resident set, which Linux can reset; elsewhere it is the peak since the process began.
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
