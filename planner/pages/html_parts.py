"""Shared by all HTML pages: a self-contained document, boxes with plotly figures, and the style."""

from __future__ import annotations

import html
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from planner.errors import SpecError

INK, MUTED, GRID, ALERT = "#1f2933", "#616e7c", "#e4e7eb", "#c53030"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plotly figure and the heading above it."""

    title: str
    plot: Any
    is_wide: bool = False


def require_plotly() -> None:
    """Raise SpecError, with the remedy, if plotly is not installed."""
    if find_spec("plotly") is None:
        raise SpecError("--html needs plotly, which is not installed: pip install 'longhaul[report]'")


def document(title: str, lines: SequenceOf[str], figures: SequenceOf[Figure], *, footer: str = "") -> str:
    """The whole page. ``lines``: the result in words, the first one large. ``footer``: HTML below the figures."""
    return _DOCUMENT.format(
        title=html.escape(title), font=_FONT, ink=INK, muted=MUTED, grid=GRID, alert=ALERT,
        verdict=html.escape(lines[0]), lines="\n".join(f"<p>{html.escape(line)}</p>" for line in lines[1:]),
        figures="\n".join(_embed(figure, is_first=index == 0) for index, figure in enumerate(figures)), footer=footer,
    )


def style(plot: Any, *, height: int, top: int = 32) -> None:
    """Apply the common style to a plotly figure of this height (pixels), with ``top`` pixels above the axes."""
    plot.update_layout(
        font={"family": _FONT, "size": 12, "color": INK}, height=height, template="none",
        margin={"l": 64, "r": 16, "t": top, "b": 48}, paper_bgcolor="white", plot_bgcolor="white",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0},
    )
    plot.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True)
    plot.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)


def _embed(figure: Figure, *, is_first: bool) -> str:
    """One box of the page; the first box contains plotly's script."""
    unused = ["select2d", "lasso2d", "autoScale2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": unused}
    plot = figure.plot.to_html(full_html=False, include_plotlyjs=is_first, config=config)
    width = "wide" if figure.is_wide else "half"
    return f'<section class="{width}"><h2>{html.escape(figure.title)}</h2>{plot}</section>'


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 1280px; padding: 20px 24px; font: 14px/1.5 {font}; color: {ink}; }}
h1 {{ font-size: 20px; margin: 0 0 4px; }}
h2 {{ font-size: 15px; font-weight: 600; margin: 10px 12px 0; }}
p {{ margin: 2px 0; }}
.verdict {{ font-size: 16px; font-weight: 600; margin: 6px 0; }}
.figures {{ display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin: 16px 0; }}
section {{ border: 1px solid {grid}; border-radius: 6px; min-width: 0; overflow: hidden; }}
.wide {{ grid-column: 1 / -1; }}
details {{ color: {muted}; }}
ul {{ padding-left: 20px; }}
.guess {{ color: {alert}; font-weight: 600; }}
@media (max-width: 800px) {{ .figures {{ grid-template-columns: 1fr; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
{lines}
<div class="figures">
{figures}
</div>
{footer}
</body>
</html>
"""
