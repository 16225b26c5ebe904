"""Pictures of one step over time: an SVG with the resident memory of several ways above and the layers and copies of a
swapping way below, and the latter as a Chrome trace for ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

from benchmarks.memory_run import Course
from planner.measured.copy_times import BACK, LANES, LAYERS, OUT, WAIT
from planner.units import MIB, MICROSECONDS_PER_S

_COLOURS = ("#4c566a", "#bf616a", "#2e7d32", "#1565c0", "#ef6c00")
_LANE_COLOURS = {"forward": "#90caf9", "backward": "#5c8fd6", "recompute": "#b39ddb"}
_COPY_COLOURS = {WAIT: "#e57373", OUT: "#81c784", BACK: "#ffb74d"}
_LANE_NAMES = {LAYERS: "layers", WAIT: "waiting", OUT: "to disk", BACK: "from disk"}
_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT, _LANE = 860, 78, 20, 46, 240, 24
_MOST_POINTS = 300


def trace(course: Course) -> dict[str, Any]:
    """The step in Chrome's Trace Event Format, as complete events with a thread per lane."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": f"{course.way}, {course.length} tokens"}}
    ]
    for place, lane in enumerate(LANES):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": place, "args": {"name": _LANE_NAMES[lane]}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": place, "args": {"sort_index": place}})
    for each in course.intervals:
        events.append({
            "ph": "X", "name": each.name, "cat": each.lane, "pid": 0, "tid": LANES.index(each.lane),
            "ts": each.start_s * MICROSECONDS_PER_S, "dur": (each.stop_s - each.start_s) * MICROSECONDS_PER_S,
            "args": {"bytes": each.num_bytes},
        })
    events += [
        {"ph": "C", "name": "resident MiB", "pid": 0, "ts": seconds * MICROSECONDS_PER_S, "args": {"MiB": size / MIB}}
        for seconds, size in course.samples
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"hidden_share": f"{course.hidden_share:.3f}"}}


def picture(courses: SequenceOf[Course]) -> str:
    """The SVG. Above, every way is drawn over its own step's duration, because seconds on a busy machine say little."""
    swapped = next((each for each in courses if each.intervals), None)
    height = _TOP + _PLOT + 54 + (len(LANES) * _LANE + 62 if swapped else 0)
    most_mib = max(size for each in courses for _, size in each.samples) / MIB
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#222"><rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        _text(_LEFT, 22, f"Resident memory over one step ({courses[0].length:,} tokens), above its start", size=15),
        *_memory(courses, most_mib),
    ]
    if swapped:
        parts += _lanes(swapped, _TOP + _PLOT + 78)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _memory(courses: SequenceOf[Course], most_mib: float) -> Iterator[str]:
    step = _round_step(most_mib / 4)
    top_mib = (int(most_mib / step) + 2) * step  # room for the legend
    for tick in range(int(top_mib / step) + 1):
        y = _TOP + _PLOT * (1 - tick * step / top_mib)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(_LEFT - 8, y + 4, f"{tick * step:g} MiB", anchor="end")
    for place, word in enumerate(("start", "a quarter", "half of the step", "three quarters", "end")):
        anchor = "end" if place == 4 else "middle"
        yield _text(_x(place, 4), _TOP + _PLOT + 19, word, anchor=anchor)
    for place, course in enumerate(courses):
        own_s = course.samples[-1][0]
        colour = _COLOURS[place % len(_COLOURS)]
        points = " ".join(
            f"{_x(seconds, own_s):.1f},{_TOP + _PLOT * (1 - max(size, 0) / MIB / top_mib):.1f}"
            for seconds, size in _thinned(course.samples)
        )
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        x = _WIDTH - _RIGHT - 190
        y = _TOP + 14 + 18 * place
        highest = max(size for _, size in course.samples) / MIB
        yield f'<rect x="{x - 8}" y="{y - 12}" width="198" height="17" fill="#fff" opacity="0.85"/>'
        yield f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>'
        yield _text(x + 30, y, f"{course.way}: {highest:.0f} MiB at most")


def _lanes(course: Course, top: float) -> Iterator[str]:
    most_s = max(each.stop_s for each in course.intervals)
    title = f"{course.way}: layers and copies ({course.hidden_share:.0%} of the copies' seconds hidden)"
    yield _text(_LEFT, top - 10, title, size=15)
    for place, lane in enumerate(LANES):
        y = top + place * _LANE
        yield _text(_LEFT - 8, y + 15, _LANE_NAMES[lane], anchor="end")
        yield f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_LANE - 4}" fill="#f5f5f5"/>'
        for each in course.intervals:
            if each.lane == lane and each.stop_s > each.start_s:
                x, width = _x(each.start_s, most_s), _x(each.stop_s, most_s) - _x(each.start_s, most_s)
                colour = _LANE_COLOURS[each.name.split()[0]] if lane == LAYERS else _COPY_COLOURS[lane]
                yield (f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.3):.2f}" height="{_LANE - 4}" fill="{colour}" '
                       'stroke="#fff" stroke-width="0.3"/>')
    yield from _seconds_axis(most_s, top + len(LANES) * _LANE)
    for place, (name, colour) in enumerate(list(_LANE_COLOURS.items())[:2]):
        x = _WIDTH - _RIGHT - 180 + 90 * place
        yield f'<rect x="{x}" y="{top - 21}" width="12" height="12" fill="{colour}"/>'
        yield _text(x + 17, top - 11, name)


def _seconds_axis(most_s: float, y: float) -> Iterator[str]:
    step = _round_step(most_s / 6)
    for tick in range(int(most_s / step) + 1):
        x = _x(tick * step, most_s)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}" stroke="#888"/>'
        yield _text(x, y + 19, f"{tick * step:g} s", anchor="middle")


def _thinned(samples: SequenceOf[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most a few hundred samples: the highest one of each slice, so that peaks stay."""
    slices = max(1, -(-len(samples) // _MOST_POINTS))
    return [max(samples[start : start + slices], key=lambda each: each[1]) for start in range(0, len(samples), slices)]


def _round_step(value: float) -> float:
    power = 1.0
    while power > value:
        power /= 10
    while power * 10 <= value:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value)


def _x(seconds: float, most_s: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * seconds / most_s


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escaped}</text>'
