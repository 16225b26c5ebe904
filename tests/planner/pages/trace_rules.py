"""The rules of the Chrome Trace Event Format that a viewer's importer enforces."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from planner.pages.trace_events import FIRST_PROCESS, FIRST_THREAD


def check_trace(trace: dict[str, Any]) -> None:
    """Check a trace: every event has the fields that its phase needs, and every lane and its process has exactly one
    name. Perfetto truncates times to whole nanoseconds and drops a slice that partly overlaps the one before it, so two
    slices on a lane must be disjoint or nested. It also draws lanes on thread 0, or on a thread with its process's
    number, as one, so neither may be used."""
    read = json.loads(json.dumps(trace, allow_nan=False))
    assert read["displayTimeUnit"] in ("ms", "ns") and all(isinstance(v, str) for v in read["otherData"].values())
    lanes, names = defaultdict(list), defaultdict(list)
    for event in read["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["args"], dict)
        if event["ph"] == "M":
            if event["name"] in ("process_name", "thread_name"):
                names[event["pid"], event.get("tid")].append(event["args"]["name"])
            continue
        assert 0 not in (event["pid"], event["tid"]) and event["pid"] != event["tid"]
        assert event["ph"] == "X" and event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["cat"], str)
        start_ns = int(event["ts"] * 1000.0)
        lanes[event["pid"], event["tid"]].append((start_ns, -int(event["dur"] * 1000.0), event["name"]))
    assert all(len(found) == 1 for found in names.values())
    assert {(pid, None) for pid, _ in lanes} | set(lanes) <= set(names)
    for lane, slices in lanes.items():
        open_until: list[int] = []
        for start_ns, minus_ns, name in sorted(slices):
            while open_until and open_until[-1] <= start_ns:
                open_until.pop()
            stop_ns = start_ns - minus_ns
            assert not open_until or stop_ns <= open_until[-1], f"{name} on {lane} begins in a slice and ends after it"
            open_until.append(stop_ns)


def place_of(event: dict[str, Any]) -> tuple[int, int]:
    """(process, thread) of an event, counted from 0."""
    return event["pid"] - FIRST_PROCESS, event["tid"] - FIRST_THREAD
