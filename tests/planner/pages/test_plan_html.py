"""The page holds what the plan says, needs nothing from outside, and says how to get plotly where it is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest

from planner.errors import SpecError
from planner.pages import html_parts as page_parts
from planner.pages import plan_html as html_report
from planner.pages.html_parts import require_plotly
from planner.pages.plan_html import MAX_RANKS_SHOWN, Page, html_page
from planner.pages.planned_step import Candidate
from planner.plan import AttentionKind, MemoryPolicy
from tests.planner.pages.test_chrome_trace import planned, replayed

needs_plotly = pytest.mark.skipif(find_spec("plotly") is None, reason="plotly is not installed (extra: report)")


def make_page(**changes: object) -> Page:
    (step,) = planned("flexsp", num_steps=1)
    settings: dict = {
        "knobs": ("what would help", "  - more <memory>: +5%"),
        "title": "flexsp: <b> on & here", "lines": ("FITS: rank 3", "second line <i>"), "step": step,
        "sources": ("cost model: derived", "  - guess in device: a & b", "  - data sheet"), "candidates": (),
        "lengths": tuple(sequence.num_tokens for sequence in step.plan.sequences), "fixed_bytes": 10**8,
        "budget_bytes": 2 * 10**8,
    }
    return Page(**{**settings, **changes})


@needs_plotly
def test_one_page_with_everything_inside() -> None:
    text = html_page(make_page())
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    assert "<h1>flexsp: &lt;b&gt; on &amp; here</h1>" in text and "second line &lt;i&gt;" in text
    assert "<li>more &lt;memory&gt;: +5%</li>" in text
    assert '<li><span class="guess">guess in</span> device: a &amp; b</li>' in text and "<li>data sheet</li>" in text
    # Nothing is loaded: no script, style or picture with an address. (The script itself is inside, once.)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text)
    assert text.count('class="plotly-graph-div"') == 3 and 3e6 < len(text) < 8e6
    for words in ("what each rank does", "peak memory of each rank", "tokens in all steps", "gather, reduce, opt"):
        assert words in text
    assert "every strategy" not in text


@needs_plotly
def test_the_comparison_is_drawn_fastest_on_top() -> None:
    flexsp, static = planned("flexsp", num_steps=1), planned("static", num_steps=1)
    candidates = (
        Candidate(strategy="static", steps=tuple(static)), Candidate(strategy="flexsp", steps=tuple(flexsp)),
        Candidate(strategy="other", refusal="no room"),
    )
    figure = html_report._comparison(candidates).plot
    assert list(figure.data[0].y)[-1] == "flexsp" and len(figure.data[0].y) == 2
    assert figure.data[0].text[-1].endswith("1.00x")
    assert "Mean step of every strategy" in html_page(make_page(candidates=candidates))


@needs_plotly
def test_the_comparison_marks_the_fastest_by_replay() -> None:
    (flexsp,), (static,) = replayed("flexsp", num_steps=1), replayed("static", num_steps=1)
    static = replace(static, replay=replace(static.replay, step_s=flexsp.replay.step_s / 2))
    candidates = (Candidate(strategy="static", steps=(static,)), Candidate(strategy="flexsp", steps=(flexsp,)))
    _, predicted, marks = html_report._comparison(candidates).plot.data
    assert dict(zip(predicted.y, predicted.x, strict=True)) == {
        "flexsp": flexsp.plan.predicted_s, "static": static.plan.predicted_s,
    }
    assert dict(zip(marks.y, marks.x, strict=True)) == {
        "flexsp": flexsp.replay.step_s, "static": static.replay.step_s,
    }
    assert dict(zip(marks.y, marks.marker.line.width, strict=True)) == {"flexsp": 0, "static": 2}


def test_every_kind_has_its_own_colour_and_the_policy_is_told() -> None:
    colours = [html_report._colour(kind, 4) for kind in AttentionKind]
    assert len(set(colours)) == len(colours)
    (step,) = planned("flexsp", num_steps=1)
    first, *others = step.plan.microbatches
    swapped = replace(first, memory=MemoryPolicy(keep_fraction=0.5, swap_fraction=0.5))
    texts = html_report._hover_texts(replace(step, plan=replace(step.plan, microbatches=(swapped, *others))))
    assert texts[0].endswith("activations: swap 50%") and all(text.endswith("activations: keep") for text in texts[1:])


@needs_plotly
def test_the_timeline_draws_every_event_of_the_drawn_ranks() -> None:
    (step,) = planned("flexsp", num_steps=1)
    figure = html_report._timeline(step, tuple(range(step.plan.num_ranks))).plot
    *shapes, end = figure.data
    bars = [
        (row, base, base + wide)
        for trace in shapes for row, base, wide in zip(trace.y, trace.base, trace.x, strict=True)
    ]
    events = [(event.rank, event.start_s, event.stop_s) for event in step.simulation.events]
    assert sorted(bars) == [pytest.approx(event) for event in sorted(events)]
    assert end.name == "gather, reduce, optimizer" and end.base == pytest.approx(max(step.simulation.rank_finish_s))
    some = html_report._timeline(step, (0, 5)).plot
    assert sum(len(trace.y) for trace in some.data[:-1]) == sum(rank in (0, 5) for rank, _, _ in events)


@needs_plotly
def test_the_replay_is_drawn_beside_the_prediction() -> None:
    (step,) = replayed("flexsp", num_steps=1)
    ranks = tuple(range(step.plan.num_ranks))
    figure = html_report._replay(step, ranks)
    tops = [sum(part) for part in zip(*(bars.y for bars in figure.plot.data), strict=True)]
    assert tops == [pytest.approx(step.replay.step_s)] * len(ranks)
    assert [bars.name for bars in figure.plot.data] == ["compute", "exposed communication", "waiting for other ranks"]
    assert figure.plot.layout.shapes[0].y0 == pytest.approx(step.plan.predicted_s)
    text = html_page(make_page(step=step))
    assert text.count('class="plotly-graph-div"') == 4 and "replayed operation by operation" in text


@needs_plotly
def test_shares_of_the_histogram_add_up() -> None:
    figure = html_report._lengths([1, 2, 3, 4, 5, 8, 9, 2048, 2049]).plot
    sequences, tokens = figure.data
    assert sum(sequences.y) == pytest.approx(1) and sum(tokens.y) == pytest.approx(1)
    share = dict(zip(sequences.x, sequences.y, strict=True))
    assert share["4"] == pytest.approx(2 / 9) and share["2K"] == share["4K"] == pytest.approx(1 / 9)


def test_large_clusters_are_thinned_out_but_the_fullest_rank_stays() -> None:
    (step,) = planned("flexsp", num_steps=1)
    peaks = (1,) * 1001 + (7,) + (2,) * 998

    class Wide:
        plan = type("Plan", (), {"num_ranks": 2000})
        simulation = type("Simulation", (), {"rank_peak_bytes": peaks})

    shown = html_report._shown_ranks(Wide())  # type: ignore[arg-type]
    assert len(shown) <= MAX_RANKS_SHOWN + 1 and 1001 in shown and 0 in shown and list(shown) == sorted(shown)
    assert html_report._shown_ranks(step) == tuple(range(step.plan.num_ranks))


def test_without_plotly_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_parts, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'longhaul\[report\]'") as refused:
        require_plotly()
    assert "\n" not in str(refused.value) and refused.value.exit_code == 2
