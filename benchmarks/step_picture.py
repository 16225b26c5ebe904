"""One step of very unequal documents, drawn twice as planned: under one fixed group size, and by ``adaptive``.

    python -m benchmarks.step_picture --out docs/step_picture.svg

Both plans come from the planner, for the same documents and under the same cost model, which is derived from data
sheets. The fixed size is the smallest power of two that holds the step's longest document; the last line of the picture
says what the best fixed size for this one step would take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import groupby, islice
from pathlib import Path

from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.errors import InfeasibleError
from planner.inputs.files import load_cluster, load_model
from planner.inputs.length_generators import generate_lengths
from planner.plan import StepPlan
from planner.pricing.problem import StepProblem
from planner.pricing.simulate import Event, simulate
from planner.schedules.exchange import attention_kinds
from planner.step_planner import plan_step

CLUSTER, MODEL, CORPUS = "h200-64", "llama-3-8b", "byted"
MAX_TOKENS, NUM_DOCUMENTS = 512 * 1024, 256

# Group sizes up to the first number of each pair have the second one's colour: light for one rank, dark for many.
_COLOURS = ((1, "#fee391"), (2, "#c2e699"), (4, "#7fcdbb"), (8, "#41b6c4"), (16, "#1d91c0"), (32, "#225ea8"),
            (1 << 20, "#0c2c84"))
_NAMES = ("1 GPU", "2", "3-4", "5-8", "9-16", "17-32", "33 and more")
_IDLE, _INK, _GREY = "#e4e4e4", "#1f2933", "#5c6873"
_WIDTH, _LEFT, _PANEL, _GAP = 800, 50, 345, 40
_BARS_TOP, _BARS, _TOP, _ROW = 64, 56, 190, 4.5


def picture_problem() -> StepProblem:
    """The step that is drawn: the first documents of the corpus, as ``longhaul plan`` draws them with seed 0."""
    cluster, model = load_cluster(CLUSTER), load_model(MODEL)
    lengths = islice((size for size in generate_lengths(CORPUS, seed=0) if size <= MAX_TOKENS), NUM_DOCUMENTS)
    return StepProblem(
        lengths=tuple(lengths),
        num_ranks=cluster.num_ranks,
        cost=derive_cost(cluster, model, num_ranks=cluster.num_ranks),
        limits=PlanLimits(
            device_budget_bytes=cluster.device.memory_bytes - cluster.device.reserved_bytes,
            max_ulysses_degree=model.num_query_heads, kinds=attention_kinds("auto"),
            devices_per_node=cluster.devices_per_node,
        ),
    )


def fixed_plans(problem: StepProblem) -> dict[int, StepPlan]:
    """The plan of every fixed group size, a power of two, that holds the longest document."""
    plans = {}
    for degree in (1 << power for power in range(problem.num_ranks.bit_length())):
        try:
            plans[degree] = plan_step(problem, step=0, strategy="static", degree=degree)
        except InfeasibleError:  # too small for the longest document
            continue
    return plans


def draw(problem: StepProblem) -> str:
    """The picture as SVG text."""
    fixed = fixed_plans(problem)
    degree = min(fixed)
    best = min(fixed, key=lambda size: fixed[size].predicted_s)
    planned = plan_step(problem, step=0, strategy="adaptive")
    longest_s = max(fixed[degree].predicted_s, planned.predicted_s)
    height = round(_TOP + problem.num_ranks * _ROW + 78)
    also = f"; the best fixed size for this step, {best}: {fixed[best].predicted_s:.1f} s" if best != degree else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="{_INK}">'
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 22, f"One training step: {len(problem.lengths)} documents of {min(problem.lengths):,} to "
              f"{max(problem.lengths):,} tokens", size=15, weight="bold"),
        _text(_LEFT, 42, f"{MODEL} on {problem.num_ranks} H200. Each bar is a document, in the colour of its group on "
              "the right.", fill=_GREY),
        *_documents(planned),
    ]
    for place, (title, plan) in enumerate(
        ((f"Fixed: every document on {degree} GPUs", fixed[degree]), ("Planned by Longhaul", planned))
    ):
        parts += _panel(plan, problem, _LEFT + place * (_PANEL + _GAP), title, longest_s)
    parts += _legend(height - 34, {group.degree for plan in (fixed[degree], planned)
                                   for microbatch in plan.microbatches for group in microbatch.groups})
    parts.append(_text(_LEFT, height - 10, f"Seconds as predicted from data sheets, not measured{also}.", fill=_GREY))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _documents(plan: StepPlan) -> Iterator[str]:
    """The step's documents, longest first, each in the colour of its group."""
    colour = {
        sequence: _colour(group.degree) for microbatch in plan.microbatches for group in microbatch.groups
        for sequence in group.sequences
    }
    ordered = sorted(plan.sequences, key=lambda sequence: -sequence.num_tokens)
    step = (_WIDTH - _LEFT - 20) / len(ordered)
    for place, sequence in enumerate(ordered):
        size = max(0.6, _BARS * sequence.num_tokens / ordered[0].num_tokens)
        yield _box(_LEFT + place * step, _BARS_TOP + _BARS - size, max(0.8, step - 0.6), size, colour[sequence.index])
    yield _text(_LEFT + 8, _BARS_TOP + 10, f"{ordered[0].num_tokens:,} tokens", fill=_GREY, size=11)
    median = ordered[len(ordered) // 2].num_tokens
    words = f"half of them have fewer than {median:,} tokens"
    yield _text(_LEFT + step * len(ordered) / 2, _BARS_TOP + _BARS - 8, words, fill=_GREY, size=11)


def _panel(plan: StepPlan, problem: StepProblem, left: float, title: str, longest_s: float) -> Iterator[str]:
    height = problem.num_ranks * _ROW
    scale = (_PANEL - 6) / longest_s
    yield _text(left, _TOP - 30, title, size=14, weight="bold")
    simulation = simulate(plan, problem.cost)
    words = f"{plan.predicted_s:.1f} s per step, {simulation.idle_fraction:.0%} of it idle"
    yield _text(left, _TOP - 12, words, fill=_GREY)
    end_s = max(simulation.rank_finish_s)
    yield _box(left, _TOP, end_s * scale, height, _IDLE)
    yield from _boxes(plan, simulation.events, left, scale)
    for row in range(0, problem.num_ranks + 1, problem.node_size):
        y = _TOP + row * _ROW
        yield f'<line x1="{left - 4:.1f}" x2="{left + end_s * scale:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#fff"/>'
        if left == _LEFT and row < problem.num_ranks:
            middle = y + problem.node_size * _ROW / 2 + 4
            yield _text(left - 6, middle, f"node {row // problem.node_size}", anchor="end", size=11, fill=_GREY)
    bottom = _TOP + height
    for second in range(0, int(longest_s) + 1, 2):
        x = left + second * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="{_GREY}"/>'
        yield _text(x, bottom + 16, f"{second} s", anchor="middle", size=11, fill=_GREY)


def _boxes(plan: StepPlan, events: SequenceOf[Event], left: float, scale: float) -> Iterator[str]:
    """A box for each microbatch, one for each stretch of neighbouring ranks where its ranks are not all neighbours."""
    times = {event.microbatch: (event.start_s, event.stop_s) for event in events}
    for index, microbatch in enumerate(plan.microbatches):
        start_s, stop_s = times[index]
        colour = _colour(max(group.degree for group in microbatch.groups))
        width = max(0.5, (stop_s - start_s) * scale - 0.7)
        for _, neighbours in groupby(enumerate(sorted(microbatch.ranks)), key=lambda pair: pair[1] - pair[0]):
            ranks = [rank for _, rank in neighbours]
            yield _box(left + start_s * scale, _TOP + ranks[0] * _ROW, width, len(ranks) * _ROW - 0.7, colour)


def _legend(y: float, degrees: set[int]) -> Iterator[str]:
    used = {_colour(degree) for degree in degrees}
    names = [(colour, name) for (_, colour), name in zip(_COLOURS, _NAMES, strict=True) if colour in used]
    yield _text(_LEFT, y, "GPUs that share a document:", size=11, fill=_GREY)
    x = _LEFT + 175.0
    for colour, name in (*names, (_IDLE, "idle")):
        yield _box(x, y - 9, 10, 10, colour)
        yield _text(x + 14, y, name, size=11)
        x += 28 + 7.2 * len(name)


def _colour(degree: int) -> str:
    return next(colour for most, colour in _COLOURS if degree <= most)


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(
    x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", fill: str = _INK, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}">{words}</text>'
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_picture", description="Draw one step, planned twice."
    )
    parser.add_argument("--out", type=Path, default=Path("docs/step_picture.svg"), help="the SVG file to write")
    out = parser.parse_args().out
    out.write_text(draw(picture_problem()), encoding="utf-8")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
