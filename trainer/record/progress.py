"""What rank 0 shows while training: a live panel on a terminal, elsewhere one aligned line per step."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from planner.units import format_bytes, format_count, format_seconds
from trainer.record.metrics import StepReport

_SPARKS = "".join(chr(0x2581 + level) for level in range(8))  # block characters from an eighth to a full cell
_ASCII_SPARKS = "_.-~=+*#"
_SPARK_WIDTH = 48
_ETA_STEPS = 20


class Progress:
    """The display of one run. ``note`` prints a permanent line, ``step`` shows a report, ``close`` ends the panel.

    ``is_terminal``: None asks ``stream``. ``every``: without a terminal, show every n-th step and always the last.
    ``clock``: returns seconds; a parameter for tests.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        is_terminal: bool | None = None,
        stream: TextIO | None = None,
        every: int = 1,
        title: str = "longhaul",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._first_step = first_step
        self._stream = sys.stdout if stream is None else stream
        self._every = max(1, every)
        self._title = title
        self._clock = clock
        self._last_time_s: float | None = None
        self._step_times_s: deque[float] = deque(maxlen=_ETA_STEPS)
        self._losses: deque[float] = deque(maxlen=_SPARK_WIDTH)
        self._live: Live | None = None
        if self._stream.isatty() if is_terminal is None else is_terminal:
            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()

    def note(self, line: str) -> None:
        """Print a line that stays on the screen or in the log."""
        if self._live is not None:
            self._live.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)

    def step(self, report: StepReport) -> None:
        """Show a finished step."""
        self._losses.append(report.loss)
        now_s = self._clock()
        # The ETA needs wall time between steps, because measured_s does not include checkpoints and waiting.
        self._step_times_s.append(report.measured_s if self._last_time_s is None else now_s - self._last_time_s)
        self._last_time_s = now_s
        num_left = max(0, self._total_steps - report.step - 1)
        eta_s = statistics.median(self._step_times_s) * num_left
        if self._live is not None:
            is_ascii = self._live.console.options.ascii_only
            panel = live_panel(
                report, self._losses, total_steps=self._total_steps, eta_s=eta_s, title=self._title, is_ascii=is_ascii
            )
            self._live.update(panel, refresh=True)
        elif (report.step - self._first_step) % self._every == 0 or num_left == 0:
            print(plain_line(report, total_steps=self._total_steps, eta_s=eta_s), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last panel on the screen and release the terminal. Safe to call twice."""
        if self._live is not None:
            self._live.stop()


def plain_line(report: StepReport, *, total_steps: int, eta_s: float) -> str:
    """One step as one line, with columns of constant width. Steps are shown counted from 1."""
    width = len(str(total_steps))
    return "  ".join(
        (
            f"step {report.step + 1:>{width}}/{total_steps}",
            f"loss {report.loss:7.4f}",
            f"{format_count(report.tokens_per_s):>6} tok/s",
            f"step {format_seconds(report.measured_s):>8} (predicted {format_seconds(report.predicted_s):>8})",
            f"plan {format_seconds(report.plan_s):>8} {report.plan_status} gap {report.gap:6.1%}",
            f"imbalance {report.imbalance:6.1%}",
            f"padding {report.padding_tokens}",
            f"eta {format_seconds(eta_s):>8}",
            f"{report.strategy}: {report.group_summary}",
        )
    )


def live_panel(
    report: StepReport, losses: Sequence[float] | deque[float], *, total_steps: int, eta_s: float, title: str,
    is_ascii: bool = False,
) -> RenderableType:
    """The panel for a terminal: a progress bar, the loss curve, and predicted and measured values."""
    head = Table.grid(expand=True, padding=(0, 2))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    head.add_row(
        f"step {report.step + 1}/{total_steps}",
        ProgressBar(total=total_steps, completed=report.step + 1),
        f"eta {format_seconds(eta_s)}",
    )
    curve = Text.assemble((f"loss {report.loss:.4f}  ", "bold"), (sparkline(losses, is_ascii=is_ascii), "green"))
    return Panel(Group(head, curve, _facts(report)), title=title, title_align="left")


def _facts(report: StepReport) -> Table:
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in range(3):
        table.add_column(ratio=1, no_wrap=True)
    mfu = "n/a" if report.mfu is None else f"{report.mfu:.1%}"
    rows = (
        (
            f"{format_count(report.tokens_per_s)} tokens/s",
            f"{format_count(report.num_tokens)} tokens, {report.num_sequences} sequences",
            f"padding {report.padding_tokens}",
        ),
        (
            f"step {format_seconds(report.measured_s)}",
            f"predicted {format_seconds(report.predicted_s)} ({_error(report):+.1%})",
            f"mfu {mfu}",
        ),
        (
            f"plan {format_seconds(report.plan_s)} {report.plan_status}",
            f"gap {report.gap:.1%}  waited {format_seconds(report.plan_wait_s)}",
            f"imbalance {report.imbalance:.1%}",
        ),
        (
            f"{report.strategy}: {report.group_summary}",
            f"peak {format_bytes(report.peak_bytes)} (predicted {format_bytes(report.predicted_peak_bytes)})",
            f"idle {report.idle_fraction:.1%}",
        ),
    )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _error(report: StepReport) -> float:
    """Relative error of the prediction: positive if the step was faster than predicted; 0 if nothing was measured."""
    return report.predicted_s / report.measured_s - 1 if report.measured_s > 0 else 0.0


def sparkline(values: Sequence[float] | deque[float], *, is_ascii: bool = False) -> str:
    """One character per value, from lowest to highest; ``?`` for a value that is not finite."""
    levels = _ASCII_SPARKS if is_ascii else _SPARKS
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return "?" * len(values)
    low, span = min(finite), max(finite) - min(finite)
    top = len(levels) - 1
    return "".join(
        levels[round((value - low) / span * top) if span > 0 else 0] if abs(value) < float("inf") else "?"
        for value in values
    )
