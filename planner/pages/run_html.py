"""A run as one self-contained HTML page: predicted against measured, by step, by rank and within one step.

plotly is in the extra ``report`` and is imported here only when a page is made.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence as SequenceOf

from planner.measured.drift import Executed, planned_times
from planner.measured.step_times import MeasuredStep
from planner.pages.explain import group_names, groups_by_rank
from planner.pages.html_parts import MUTED, Figure, document, require_plotly, style
from planner.pages.plan_html import MAX_RANKS_SHOWN
from planner.pages.run_report import RankLine, RunReport
from planner.plan import StepPlan
from planner.units import format_seconds

MAX_POINTS = 5_000
"""How many steps are drawn at most, so that the page stays small; of longer runs every n-th step."""

_PREDICTED, _MEASURED, _WAIT, _IDLE = "#9fb3c8", "#2b6cb0", "#dd6b20", "#e4e7eb"
_TOP = 40


def run_page(title: str, lines: SequenceOf[str], report: RunReport, shown: Executed | None) -> str:
    """The whole document. ``lines``: the result in words, the first one large. ``shown``: the step drawn in detail;
    None if no step was recorded. Raises SpecError if plotly is not installed."""
    require_plotly()
    figures = [_scatter(report), _over_time(report)]
    if report.ranks:
        figures.append(_ranks(report.ranks))
    if shown is not None:
        figures.append(_timeline(*shown))
    return document(title, lines, figures)


def _scatter(report: RunReport) -> Figure:
    """One point per step: on the diagonal the prediction was right, above it the step took longer."""
    import plotly.graph_objects as go

    steps = report.judged[:: math.ceil(len(report.judged) / MAX_POINTS)]
    most_s = 1.05 * max(max(step.predicted_s, step.measured_s) for step in steps)
    figure = go.Figure()
    figure.add_scatter(
        x=[0, most_s], y=[0, most_s], mode="lines", name="as predicted", line={"color": MUTED, "dash": "dash"},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[step.predicted_s for step in steps], y=[step.measured_s for step in steps], mode="markers", name="steps",
        marker={"color": _MEASURED, "size": 6, "opacity": 0.7},
        text=[f"step {step.step}: {step.error:+.1%}, {html.escape(step.groups)}" for step in steps],
        hovertemplate="%{text}<br>predicted %{x:.3g} s, measured %{y:.3g} s<extra></extra>",
    )
    style(figure, height=380, top=_TOP)
    figure.update_xaxes(title="predicted seconds", range=[0, most_s])
    figure.update_yaxes(title="measured seconds", range=[0, most_s])
    title = f"Step time: mean error {report.absolute_error:.1%}, bias {report.bias:+.1%}"
    return Figure(title=title, plot=figure)


def _over_time(report: RunReport) -> Figure:
    import plotly.graph_objects as go

    steps = report.steps[:: math.ceil(len(report.steps) / MAX_POINTS)]
    numbers = [step.step for step in steps]
    figure = go.Figure()
    for name, colour, values in (
        ("predicted", _PREDICTED, [step.predicted_s for step in steps]),
        ("measured", _MEASURED, [step.measured_s for step in steps]),
    ):
        figure.add_scatter(
            x=numbers, y=values, mode="lines+markers" if len(steps) <= 200 else "lines", name=name,
            line={"color": colour, "width": 1.5}, marker={"size": 4},
            hovertemplate=f"step %{{x}}: {name} %{{y:.3g}} s<extra></extra>",
        )
    style(figure, height=380, top=_TOP)
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="seconds", rangemode="tozero")
    return Figure(title="Step time over the run", plot=figure)


def _ranks(ranks: SequenceOf[RankLine]) -> Figure:
    """Two bars per rank: the plan, and the run."""
    import plotly.graph_objects as go

    shown = ranks[:: math.ceil(len(ranks) / MAX_RANKS_SHOWN)]
    labels = [[str(line.rank) for line in shown for _ in range(2)], ["plan", "run"] * len(shown)]

    def pairs(planned: SequenceOf[float], measured: SequenceOf[float]) -> list[float]:
        return [value for pair in zip(planned, measured, strict=True) for value in pair]

    none = [0.0] * len(shown)
    figure = go.Figure()
    for name, colour, values in (
        ("microbatches, as planned", _PREDICTED, pairs([line.predicted_busy_s for line in shown], none)),
        ("computing", _MEASURED, pairs(none, [line.compute_s for line in shown])),
        ("waiting for messages", _WAIT, pairs(none, [line.wait_s for line in shown])),
        ("idle", _IDLE, pairs([line.predicted_idle_s for line in shown], [line.idle_s for line in shown])),
    ):
        figure.add_bar(
            x=labels, y=values, name=name, marker={"color": colour},
            hovertemplate=f"rank %{{x}}: {name} %{{y:.3g}} s<extra></extra>",
        )
    style(figure, height=360, top=_TOP)
    figure.update_layout(barmode="stack", bargap=0.15)
    figure.update_xaxes(title="rank")
    figure.update_yaxes(title="seconds per step")
    return Figure(title="Ranks: planned and measured, mean of the recorded steps", plot=figure, is_wide=True)


def _timeline(plan: StepPlan, measured: MeasuredStep) -> Figure:
    """Predicted lanes above measured ones, on one time axis that starts at gathered parameters."""
    from plotly.subplots import make_subplots

    ranks = range(0, plan.num_ranks, math.ceil(plan.num_ranks / MAX_RANKS_SHOWN))
    row_of = {rank: row for row, rank in enumerate(ranks)}
    groups = [groups_by_rank(microbatch) for microbatch in plan.microbatches]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1, subplot_titles=("predicted", "measured")
    )

    def add(row: int, name: str, colour: str, bars: SequenceOf[tuple[int, float, float, str]]) -> None:
        figure.add_bar(
            orientation="h", name=name, legendgroup=name, y=[row_of[rank] for rank, *_ in bars],
            base=[start_s for _, start_s, _, _ in bars], x=[stop_s - start_s for _, start_s, stop_s, _ in bars],
            width=0.9, marker={"color": colour, "line": {"color": "white", "width": 0.5}}, row=row, col=1,
            customdata=[text for *_, text in bars], hovertemplate="%{customdata}<extra></extra>",
        )

    add(1, "planned", _PREDICTED, [
        (rank, start_s, stop_s, f"rank {rank}, microbatch {index}: {group_names(groups[index][rank])}<br>"
         f"{format_seconds(stop_s - start_s)}")
        for index, (start_s, stop_s) in enumerate(planned_times(plan))
        for rank in plan.microbatches[index].ranks if rank in row_of
    ])
    times = [(rank, each) for rank in ranks for each in measured.ranks[rank].microbatches]
    for name, colour, is_forward in (("forward", "#63b3ed", True), ("backward", _MEASURED, False)):
        bars = []
        for rank, each in times:
            start_s, stop_s = (each.start_s, each.middle_s) if is_forward else (each.middle_s, each.stop_s)
            wait_s = each.forward_wait_s if is_forward else each.backward_wait_s
            bars.append((
                rank, start_s, stop_s, f"rank {rank}, microbatch {each.microbatch}, {name}<br>"
                f"{format_seconds(stop_s - start_s)}, of it {format_seconds(wait_s)} waiting for messages",
            ))
        add(2, name, colour, bars)
    style(figure, height=min(1200, 240 + 24 * len(row_of)), top=_TOP)
    figure.update_layout(barmode="overlay", legend={"y": 1.08})
    ticks = list(ranks)[:: max(1, math.ceil(len(row_of) / 16))]
    figure.update_yaxes(
        title="rank", tickvals=[row_of[rank] for rank in ticks], ticktext=[str(rank) for rank in ticks],
        range=[len(row_of) - 0.5, -0.5], showgrid=False,
    )
    figure.update_xaxes(title="seconds from gathered parameters", row=2, col=1, rangemode="tozero")
    return Figure(title=f"Step {plan.step}, rank by rank", plot=figure, is_wide=True)
