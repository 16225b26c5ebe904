"""Measured peak memory of this process's device, per step."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from memory.arena import AddressArena
from planner.units import KIB


def give_back_freed_memory() -> None:
    """Return the C library's free memory to the system. It keeps freed blocks of up to 32 MiB for later; aligned ones
    of equal size often do not fit the holes they left, and the resident set grows although nothing leaks (glibc; does
    nothing elsewhere)."""
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
