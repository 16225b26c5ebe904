"""A priced step as one self-contained HTML page: it contains plotly's script and loads nothing.

plotly is in the extra ``report`` and is imported here only when a page is made.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from planner.pages.explain import group_names, groups_by_rank, shape_name
from planner.pages.html_parts import ALERT, INK, Figure, document, require_plotly, style
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate, fastest_replayed
from planner.pages.policy_words import policy_name
from planner.plan import AttentionKind
from planner.pricing.simulate import Event, step_lengths
from planner.units import GIB, KIB, format_bytes, format_count, format_seconds

MAX_RANKS_SHOWN = 256
"""A screen has no more lines: of larger clusters every n-th rank is drawn, and the one with the highest peak."""

_PLAIN, _STRONG, _FIXED = "#9fb3c8", "#2b6cb0", "#d9e2ec"
_EXCHANGE, _SWAP = "#ed8936", "#805ad5"
# One hue per kind, darker for larger degrees; kinds that are not listed share the last hue.
_HUES = {
    AttentionKind.LOCAL: ("#9fb3c8",),
    AttentionKind.ULYSSES: ("#90cdf4", "#63b3ed", "#4299e1", "#3182ce", "#2b6cb0", "#2c5282", "#1a365d"),
    AttentionKind.RING: ("#fbd38d", "#f6ad55", "#ed8936", "#dd6b20", "#c05621", "#9c4221", "#652b19"),
    AttentionKind.USP: ("#d6bcfa", "#b794f4", "#9f7aea", "#805ad5", "#6b46c1", "#553c9a", "#44337a"),
    AttentionKind.DOUBLE_RING: ("#feb2b2", "#fc8181", "#f56565", "#e53e3e", "#c53030", "#9b2c2c", "#63171b"),
    AttentionKind.GROUP_CAST: ("#9ae6b4", "#68d391", "#48bb78", "#38a169", "#2f855a", "#276749", "#1c4532"),
    AttentionKind.ALL_GATHER: ("#81e6d9", "#4fd1c5", "#38b2ac", "#319795", "#2c7a7b", "#285e61", "#1d4044"),
}
_OTHER_HUES = ("#fbb6ce", "#f687b3", "#ed64a6", "#d53f8c", "#b83280", "#97266d", "#521b41")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Contents of the page. ``lines``: the result in words. ``knobs``: what to change first, a heading and its items.
    ``step``: the step drawn in detail. ``lengths``: tokens of all sequences of all steps. ``candidates``: the
    strategies of a comparison, else empty."""

    title: str
    lines: tuple[str, ...]
    knobs: tuple[str, ...]
    sources: tuple[str, ...]
    step: PlannedStep
    lengths: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    fixed_bytes: int
    budget_bytes: int


def html_page(page: Page) -> str:
    """The whole document. Raises SpecError if plotly is not installed."""
    require_plotly()
    ranks = _shown_ranks(page.step)
    figures = [_timeline(page.step, ranks)]
    if page.step.replay is not None:
        figures.append(_replay(page.step, ranks))
    figures += [_lengths(page.lengths), _memory(page, ranks)]
    if page.candidates:
        figures.append(_comparison(page.candidates))
    knobs = f"<p>{html.escape(page.knobs[0])}</p>\n{_items(page.knobs[1:])}" if page.knobs else ""
    sources = f"<details open>\n<summary>Where the numbers come from</summary>\n{_items(page.sources)}\n</details>"
    footer = f"{knobs}\n{sources}"
    return document(page.title, page.lines, figures, footer=footer)


def _shown_ranks(step: PlannedStep) -> tuple[int, ...]:
    num_ranks, peaks = step.plan.num_ranks, step.simulation.rank_peak_bytes
    stride = math.ceil(num_ranks / MAX_RANKS_SHOWN)
    return tuple(sorted({*range(0, num_ranks, stride), peaks.index(max(peaks))}))


def _timeline(step: PlannedStep, ranks: tuple[int, ...]) -> Figure:
    """One row per rank, one bar per microbatch of it, one colour for each kind and power of two of degrees."""
    import plotly.graph_objects as go

    row_of = {rank: row for row, rank in enumerate(ranks)}
    events: dict[tuple[AttentionKind, int], list[Event]] = defaultdict(list)
    degrees: dict[tuple[AttentionKind, int], set[int]] = defaultdict(set)
    groups = [groups_by_rank(microbatch) for microbatch in step.plan.microbatches]
    for event in step.simulation.events:
        if event.rank in row_of:
            widest = max(groups[event.microbatch][event.rank], key=lambda group: group.degree)
            events[widest.kind, widest.degree.bit_length()].append(event)
            degrees[widest.kind, widest.degree.bit_length()].add(widest.degree)
    hover = _hover_texts(step)
    figure = go.Figure()
    for key in sorted(events, key=lambda found: (-found[1], found[0])):
        bars, few, most = events[key], min(degrees[key]), max(degrees[key])
        figure.add_bar(
            orientation="h", name=shape_name(key[0], few) + (f" to {most}" if most > few else ""),
            y=[row_of[event.rank] for event in bars], x=[event.stop_s - event.start_s for event in bars],
            base=[event.start_s for event in bars], width=1.0,
            marker={"color": _colour(*key), "line": {"color": "white", "width": 0.5 if len(ranks) <= 96 else 0}},
            customdata=[
                f"rank {event.rank}: {group_names(groups[event.microbatch][event.rank])}<br>{hover[event.microbatch]}"
                for event in bars
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    _add_step_end(figure, step, len(ranks))
    shown = "" if len(ranks) == step.plan.num_ranks else f" ({len(ranks)} of {step.plan.num_ranks} drawn)"
    ticks = ranks[:: max(1, math.ceil(len(ranks) / 16))]
    style(figure, height=min(840, 220 + 9 * len(ranks)))
    figure.update_layout(barmode="overlay", bargap=0, legend={"traceorder": "normal"})
    figure.update_xaxes(title="seconds", rangemode="tozero")
    figure.update_yaxes(
        title="rank", tickvals=[row_of[rank] for rank in ticks], ticktext=[str(rank) for rank in ticks],
        range=[len(ranks) - 0.5, -0.5], showgrid=False,
    )
    return Figure(title=f"Step {step.plan.step} as predicted: what each rank does{shown}", plot=figure, is_wide=True)


def _replay(step: PlannedStep, ranks: tuple[int, ...]) -> Figure:
    """The parts of each drawn rank's replayed step, and the predicted step."""
    import plotly.graph_objects as go

    replay = step.replay
    assert replay is not None
    names, figure = [str(rank) for rank in ranks], go.Figure()
    for name, values, colour in (
        ("compute", replay.compute_s, _STRONG), ("exposed communication", replay.exposed_communication_s, _EXCHANGE),
        ("exposed swap", replay.exposed_swap_s, _SWAP), ("waiting for other ranks", replay.idle_s, _FIXED),
    ):
        if any(values):
            figure.add_bar(
                name=name, x=names, y=[values[rank] for rank in ranks], marker={"color": colour, "line": {"width": 0}}
            )
    style(figure, height=340)
    predicted_s = step.plan.predicted_s
    figure.add_hline(
        y=predicted_s, line={"color": ALERT, "width": 1.5, "dash": "dash"},
        annotation={"text": f"predicted {format_seconds(predicted_s)}", "bgcolor": "white", "font": {"color": ALERT}},
        annotation_position="bottom left",
    )
    figure.update_layout(barmode="stack", bargap=0.1 if len(ranks) <= 64 else 0)
    figure.update_traces(hovertemplate="rank %{x}: %{y:.4g} s %{fullData.name}<extra></extra>")
    figure.update_xaxes(title="rank", type="category", nticks=16)
    figure.update_yaxes(title="seconds", range=[0, 1.05 * max(replay.step_s, predicted_s)])
    shown = "" if len(ranks) == step.plan.num_ranks else f" ({len(ranks)} of {step.plan.num_ranks} drawn)"
    title = (
        f"Step {step.plan.step} replayed operation by operation: {format_seconds(replay.step_s)} "
        f"({format_seconds(replay.low_s)} to {format_seconds(replay.high_s)}), seconds of each rank{shown}"
    )
    return Figure(title=title, plot=figure, is_wide=True)


def _add_step_end(figure: Any, step: PlannedStep, num_rows: int) -> None:
    """Add the work that every rank does once per step, after the last microbatch."""
    last_s = max(step.simulation.rank_finish_s)
    fixed_s = step.simulation.step_s - last_s
    if fixed_s <= 0:
        return
    figure.add_bar(
        orientation="h", name="gather, reduce, optimizer", y=list(range(num_rows)), x=[fixed_s] * num_rows,
        base=last_s, width=1.0, marker={"color": _FIXED, "line": {"width": 0}},
        hovertemplate=f"{format_seconds(fixed_s)}, once per step on every rank<extra></extra>",
    )


def _hover_texts(step: PlannedStep) -> list[str]:
    lengths = step_lengths(step.plan)
    texts = []
    for index, microbatch in enumerate(step.plan.microbatches):
        sizes = [lengths[sequence] for group in microbatch.groups for sequence in group.sequences]
        texts.append(
            f"microbatch {index}: {len(sizes)} sequences, {format_count(sum(sizes))} tokens, longest "
            f"{format_count(max(sizes))}<br>{format_seconds(microbatch.predicted_s)}, peak "
            f"{format_bytes(microbatch.peak_bytes)}, activations: {policy_name(microbatch.memory)}"
        )
    return texts


def _colour(kind: AttentionKind, degree_bits: int) -> str:
    hues = _HUES.get(kind, _OTHER_HUES)
    return hues[min(len(hues) - 1, max(0, degree_bits - 2))]


def _lengths(lengths: SequenceOf[int]) -> Figure:
    """Fractions of sequences and of tokens by powers of two of the length."""
    import plotly.graph_objects as go

    bins = [length.bit_length() - (length & (length - 1) == 0) for length in lengths]  # 2^(b-1) < length <= 2^b
    places = range(min(bins), max(bins) + 1)
    total = sum(lengths)
    counts = [sum(place == found for found in bins) / len(bins) for place in places]
    tokens = [
        sum(length for length, found in zip(lengths, bins, strict=True) if found == place) / total for place in places
    ]
    labels = [_tokens_label(2**place) for place in places]
    figure = go.Figure()
    figure.add_bar(name="of sequences", x=labels, y=counts, marker={"color": _PLAIN})
    figure.add_bar(name="of tokens", x=labels, y=tokens, marker={"color": _STRONG})
    style(figure, height=340)
    figure.update_traces(hovertemplate="%{y:.1%} %{fullData.name}, up to %{x}<extra></extra>")
    figure.update_xaxes(title="length up to, in tokens (1K = 1,024)", type="category")
    figure.update_yaxes(title="share", tickformat=".0%")
    return Figure(title=f"{len(lengths)} sequences, {format_count(total)} tokens in all steps", plot=figure)


def _tokens_label(tokens: int) -> str:
    if tokens >= KIB * KIB:
        return f"{tokens // (KIB * KIB)}M"
    return f"{tokens // KIB}K" if tokens >= KIB else str(tokens)


def _memory(page: Page, ranks: tuple[int, ...]) -> Figure:
    """Peak bytes of each drawn rank with the fixed part at the bottom, and the budget."""
    import plotly.graph_objects as go

    peaks = [page.step.simulation.rank_peak_bytes[rank] for rank in ranks]
    names = [str(rank) for rank in ranks]
    figure = go.Figure()
    figure.add_bar(
        name="weights, gradients, optimizer", x=names, y=[page.fixed_bytes / GIB] * len(ranks),
        marker={"color": _PLAIN, "line": {"width": 0}},
    )
    figure.add_bar(
        name="activations", x=names, y=[(peak - page.fixed_bytes) / GIB for peak in peaks],
        marker={"color": _STRONG, "line": {"width": 0}},
    )
    style(figure, height=340)
    figure.add_hline(y=page.budget_bytes / GIB, line={"color": ALERT, "width": 1.5, "dash": "dash"})
    figure.update_layout(barmode="stack", bargap=0.1 if len(ranks) <= 64 else 0)
    figure.update_traces(hovertemplate="rank %{x}: %{y:.2f} GiB %{fullData.name}<extra></extra>")
    figure.update_xaxes(title="rank", type="category", nticks=16)
    figure.update_yaxes(title="GiB", range=[0, 1.05 * max(page.budget_bytes, *peaks) / GIB])
    title = f"Step {page.step.plan.step}: peak memory of each rank, budget {format_bytes(page.budget_bytes)}"
    return Figure(title=title, plot=figure)


def _comparison(candidates: SequenceOf[Candidate]) -> Figure:
    """Mean step of each strategy, the fastest on top, and its first step by prediction and replay. Strategies that
    refuse are named in the page's lines."""
    import plotly.graph_objects as go

    best = best_candidate(candidates)
    planned = sorted((found for found in candidates if found.steps), key=lambda found: -found.mean_step_s)
    best_s = best.mean_step_s if best is not None else 0.0
    figure = go.Figure()
    figure.add_bar(
        orientation="h", y=[found.strategy for found in planned], x=[found.mean_step_s for found in planned],
        marker={"color": [_STRONG if found is best else _PLAIN for found in planned]},
        text=[f"{format_seconds(found.mean_step_s)}, {found.mean_step_s / best_s:.2f}x" for found in planned],
        textposition="auto", hovertemplate="%{y}: %{text}<extra></extra>", name="predicted, mean of the steps",
    )
    replayed = [(found.strategy, found.replayed_s) for found in planned if found.replayed_s is not None]
    if replayed:
        quickest = fastest_replayed(candidates)
        edges = [2 if quickest is not None and name == quickest.strategy else 0 for name, _ in replayed]
        figure.add_scatter(
            mode="markers", name="first step, predicted", y=[found.strategy for found in planned],
            x=[found.steps[0].plan.predicted_s for found in planned],
            marker={"symbol": "line-ns", "size": 16, "line": {"color": INK, "width": 2}},
            hovertemplate="%{y}: %{x:.4g} s, first step predicted<extra></extra>",
        )
        figure.add_scatter(
            mode="markers", name="first step, replayed" + (" (red edge: the fastest)" if quickest is not None else ""),
            y=[name for name, _ in replayed], x=[seconds for _, seconds in replayed],
            marker={"symbol": "diamond", "size": 9, "color": _EXCHANGE, "line": {"color": ALERT, "width": edges}},
            hovertemplate="%{y}: %{x:.4g} s, first step replayed<extra></extra>",
        )
    style(figure, height=110 + 34 * len(planned))
    figure.update_xaxes(title="seconds")
    return Figure(title="Mean step of every strategy on the same batches", plot=figure, is_wide=True)


def _items(lines: SequenceOf[str]) -> str:
    return "<ul>\n{}\n</ul>".format("\n".join(map(_item, lines)))


def _item(line: str) -> str:
    """A line of ``provenance_lines`` or ``knob_lines`` as a list item; guesses are highlighted."""
    text = html.escape(line.removeprefix("  - "))
    for mark in ("guess in ", "guess: "):
        if text.startswith(mark):
            return f'<li><span class="guess">{mark.strip()}</span> {text.removeprefix(mark)}</li>'
    return f"<li>{text}</li>"
