"""``longhaul report RUN_DIR``: what a run predicted and what it measured. Only reads files; does not import torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import CommandParser
from launch.console import output_console
from launch.result_file import check_target, write_result
from planner.codec import suggest, to_plain
from planner.errors import EXIT_OK, SpecError
from planner.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from planner.measured.copy_times import CopySummary
    from planner.measured.drift import Executed
    from planner.pages.run_report import RunReport
    from trainer.record.run_records import RunRecords

MAX_RANKS = 16
_FILES = ("json", "html", "trace", "refit")


def run(arguments: list[str]) -> int:
    """Read, print, and write the requested files; returns 0. Raises SpecError (2) with one line."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(arguments)
    if flags.help:
        print(parser.format_help(), end="")
        return EXIT_OK
    if unknown:
        hint = suggest(unknown[0].split("=")[0], parser._option_string_actions) if unknown[0].startswith("--") else ""
        raise SpecError(f"longhaul report: unknown argument {unknown[0]!r}{hint}; see longhaul report --help")
    if flags.run_dir is None:
        raise SpecError("longhaul report: name a run folder, such as runs/laptop; see longhaul report --help")
    for name in _FILES:
        target = getattr(flags, name)
        check_target(f"--{name}", None if (name, target) == ("json", "-") else target)
    if flags.html is not None:
        from planner.pages.html_parts import require_plotly

        require_plotly()
    from planner.pages.run_report import DEFAULT_FACTOR, as_json, make_run_report
    from trainer.record.run_records import read_run

    records = read_run(Path(flags.run_dir))
    factor, num_planned = records.setting("metrics", "drift_factor"), records.setting("run", "steps")
    report = make_run_report(
        records.metrics, records.executed, cost=records.cost,
        factor=float(factor) if isinstance(factor, int | float) else DEFAULT_FACTOR,
        num_planned=num_planned if isinstance(num_planned, int) else None, lanes=records.lanes,
    )
    _write_files(records, report, flags)
    if flags.json == "-":
        print(json.dumps(as_json(report), indent=2, allow_nan=False))
    else:
        _show(records, report)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "longhaul report",
        "Predicted and measured times of a training run, finished or still running.",
    )
    add = parser.add_argument
    add("run_dir", nargs="?", metavar="RUN_DIR", help="folder of the run (longhaul train --run-dir)")
    add("--html", metavar="FILE", help="write one page: predicted against measured, ranks, one step (needs plotly)")
    add("--trace", metavar="FILE", help="write one step, predicted and measured lanes and copies, for ui.perfetto.dev")
    add("--step", metavar="N", help="the step of --trace and --html, counted from 0 (default: the last recorded one)")
    add("--refit", metavar="FILE", help="write the cost model refitted to the run, for --plan.cost of the next one")
    add("--json", metavar="-|FILE", help="write the report as JSON; - prints it and nothing else")
    return parser


def _write_files(records: RunRecords, report: RunReport, flags: argparse.Namespace) -> None:
    from planner.pages.run_report import as_json

    step = _wanted_step(flags.step)
    shown = _shown(records, step)
    if step is not None and flags.trace is None and flags.html is None:
        raise SpecError("--step belongs to --trace or --html")
    if step is not None and flags.html is not None and shown is None:
        raise SpecError(f"--step {step}: {_not_recorded(records)}")
    if flags.trace is not None:
        write_result("--trace", flags.trace, json.dumps(_trace(records, shown, step), allow_nan=False))
    if flags.html is not None:
        from planner.pages.run_html import run_page

        title = f"Run {records.folder.resolve().name}: predicted against measured"
        write_result("--html", flags.html, run_page(title, report_lines(records, report), report, shown))
    if flags.refit is not None:
        if report.refit is None:
            raise SpecError(f"--refit: {_no_refit(records)}")
        write_result("--refit", flags.refit, json.dumps(to_plain(report.refit.cost), indent=1) + "\n")
    if flags.json not in (None, "-"):
        write_result("--json", flags.json, json.dumps(as_json(report), indent=2, allow_nan=False) + "\n")


def _wanted_step(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise SpecError(f"--step: expected the number of a step, counted from 0, got {text!r}")
    return int(text)


def _shown(records: RunRecords, step: int | None) -> Executed | None:
    if step is None:
        with_lanes = [executed for executed in records.executed if executed[0].step in records.lanes]
        return (with_lanes or records.executed or (None,))[-1]
    return next((executed for executed in records.executed if executed[0].step == step), None)


def _trace(records: RunRecords, shown: Executed | None, step: int | None) -> dict[str, Any]:
    """The trace of a step. If its times were not recorded, the trace shows only the plan."""
    from planner.pages.step_trace import step_trace
    from trainer.record.run_records import read_plans

    if shown is not None:
        return step_trace(*shown, records.lanes.get(shown[0].step), records.cost)
    number = int(records.metrics[-1]["step"]) if step is None else step
    plan = read_plans(records.folder, [number]).get(number)
    if plan is None:
        last = records.metrics[-1]["step"]
        raise SpecError(f"--trace: step {number} has no plan in {records.folder}; steps 0 to {last} were run")
    return step_trace(plan, None, cost=records.cost)


def _not_recorded(records: RunRecords) -> str:
    if not records.executed:
        return "no step of this run has recorded times (metrics.spans_every 0, or an older version)"
    steps = [plan.step for plan, _ in records.executed]
    return f"not among the {len(steps)} recorded steps that are shown, {steps[0]} to {steps[-1]}"


def _no_refit(records: RunRecords) -> str:
    if records.cost is None:
        return f"the cost model of this run is not in {records.folder} any more"
    return "too few recorded microbatches yet"


def report_lines(records: RunRecords, report: RunReport) -> list[str]:
    """The report in words, step time first."""
    first, last = report.steps[0], report.steps[-1]
    of = "" if report.num_planned is None else f" of {report.num_planned}"
    losses = " -> ".join("not finite" if loss is None else f"{loss:.4f}" for loss in (first.loss, last.loss))
    left_out = len(report.steps) - len(report.judged)
    judged = f"{len(report.judged)} steps" + (f", the first {left_out} left out" if left_out else "")
    peak_bytes = max(step.peak_bytes for step in report.steps)
    predicted_bytes = max(step.predicted_peak_bytes for step in report.steps)
    statuses = ", ".join(f"{count} {status}" for status, count in report.statuses.items())
    lines = [
        f"step time: predicted {format_seconds(report.predicted_s)}, measured {format_seconds(report.measured_s)}; "
        f"mean error {report.absolute_error:.1%}, bias {report.bias:+.1%} ({judged})",
        f"run: {len(report.steps)}{of} steps, loss {losses}, {format_count(report.tokens_per_s)} tokens/s",
    ]
    if report.parts_s:
        words = {"plan_wait_s": "plan wait", "gather_s": "gather", "compute_s": "computing",
                 "exchange_wait_s": "waiting for messages", "reduce_s": "reduce", "update_s": "update"}
        parts = ", ".join(f"{words[key]} {format_seconds(value)}" for key, value in report.parts_s.items())
        lines.append(f"per step: {parts} (means)")
    peaks = f"predicted {format_bytes(predicted_bytes)}, measured {format_bytes(peak_bytes)}"
    lines.append(f"peak memory: {peaks}; plans: {statuses}")
    if report.copies is not None:
        lines.append(_copies_line(report.copies))
    lines.append("drift: " + ("too few steps for a verdict" if report.drift is None else report.drift.sentence()))
    return [*lines, _refit_line(records, report)]


def _copies_line(copies: CopySummary) -> str:
    where = f"means of {copies.num_ranks} ranks, {copies.num_steps} steps"
    if copies.copy_s == 0:
        return f"copies of activations: none ({where})"
    parts = [
        f"{format_bytes(size)} {way} at {format_bytes(size / seconds)}/s"
        for way, size, seconds in (
            ("out", copies.out_bytes, copies.out_s), ("back", copies.back_bytes, copies.back_s)
        ) if seconds > 0
    ]
    return (
        f"copies of activations: {format_seconds(copies.copy_s)} per step, {copies.hidden_share:.1%} of it hidden "
        f"behind layers, {format_seconds(copies.wait_s)} waited for copies; {', '.join(parts)} ({where})"
    )


def _refit_line(records: RunRecords, report: RunReport) -> str:
    from trainer.record.metrics import REFIT

    refit, path = report.refit, records.folder / REFIT
    if refit is None:
        return f"refit: none ({_no_refit(records)})"
    errors = f"error {refit.error_before:.1%} -> {refit.error_after:.1%}"
    use = f"--plan.cost {path}" if path.exists() else "--refit FILE writes it, then --plan.cost FILE"
    return f"refit to {refit.num_samples} microbatches: {errors}; for the next run: {use}"


def _show(records: RunRecords, report: RunReport) -> None:

    console = output_console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width
    for index, line in enumerate(report_lines(records, report)):
        console.print(line, style="bold" if index == 0 else None, soft_wrap=True)
    _show_shapes(console, report)
    _show_ranks(console, report)
    rows = [
        (str(step.step), format_seconds(step.predicted_s), format_seconds(step.measured_s), f"{step.error:+.1%}",
         step.status, step.groups)
        for step in report.worst()
    ]
    _show_table(console, "worst steps", ("step", "predicted", "measured", "error", "status", "groups"), rows)


def _show_shapes(console: Console, report: RunReport) -> None:
    rows = [
        (line.name, str(line.num_microbatches), format_seconds(line.predicted_s), format_seconds(line.measured_s),
         f"{line.ratio:.2f}")
        for line in report.shapes
    ]
    title = f"microbatches of {report.num_recorded} recorded steps"
    _show_table(console, title, ("attention", "microbatches", "predicted", "measured", "median ratio"), rows)


def _show_ranks(console: Console, report: RunReport) -> None:
    lines = sorted(sorted(report.ranks, key=lambda line: -line.compute_s)[:MAX_RANKS], key=lambda line: line.rank)
    rows = [
        (str(line.rank), format_seconds(line.predicted_busy_s), format_seconds(line.compute_s + line.wait_s),
         format_seconds(line.wait_s), format_seconds(line.predicted_idle_s), format_seconds(line.idle_s))
        for line in lines
    ]
    title = "ranks, seconds per step" + (
        f" (the {MAX_RANKS} busiest of {len(report.ranks)})" if len(report.ranks) > MAX_RANKS else ""
    )
    columns = ("rank", "busy predicted", "busy measured", "of it waiting", "idle predicted", "idle measured")
    _show_table(console, title, columns, rows)


def _show_table(console: Console, title: str, columns: SequenceOf[str], rows: SequenceOf[SequenceOf[str]]) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="")
    for name in columns:
        table.add_column(name, justify="left" if name in ("attention", "status", "groups") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
