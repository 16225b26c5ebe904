"""Events of the Chrome Trace Event Format, written so that every viewer shows them as intended.

Perfetto drops a slice that begins before the previous one has ended, even if only by a rounding error. It also
truncates times to whole nanoseconds. So times are multiples of 1/8 microsecond, which are exact both as binary
fractions and in nanoseconds, and a slice ends exactly where the next one begins.

Callers count processes and threads from 0. In the file no number is 0, and no number is used for both a process and a
thread: Perfetto takes thread 0 for the idle task and the thread with its process's number for the main thread, and
would draw two lanes as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.units import MICROSECONDS_PER_S

FIRST_PROCESS, FIRST_THREAD = 1_000_000, 1
_POINTS_PER_US = 8


def complete_event(
    name: str, category: str, *, process: int, thread: int, start_s: float, stop_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    """A slice (``ph: X``) from ``start_s`` to ``stop_s``, in seconds on the trace's own clock."""
    start_us, stop_us = _on_grid(start_s), _on_grid(stop_s)
    return {
        "ph": "X", "name": name, "cat": category, "pid": FIRST_PROCESS + process,
        "tid": FIRST_THREAD + thread, "ts": start_us, "dur": max(0.0, stop_us - start_us), "args": args,
    }


def name_process(process: int, name: str) -> Iterator[dict[str, Any]]:
    """The process's name and position: processes are shown in the order of their numbers."""
    pid = FIRST_PROCESS + process
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": process}}


def name_thread(process: int, thread: int, name: str) -> Iterator[dict[str, Any]]:
    """The thread's name and position: threads are shown in the order of their numbers."""
    place = {"pid": FIRST_PROCESS + process, "tid": FIRST_THREAD + thread}
    yield {"ph": "M", "name": "thread_name", **place, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": thread}}


def _on_grid(seconds: float) -> float:
    """Microseconds, rounded to the grid."""
    return round(seconds * MICROSECONDS_PER_S * _POINTS_PER_US) / _POINTS_PER_US
