"""Shows the result of ``longhaul plan``: JSON for scripts, lines and tables for people, an HTML page."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.console import output_console
from launch.plan_job import Job
from planner.pages.explain import (
    COMPARISON_COLUMNS,
    GROUP_COLUMNS,
    STEP_COLUMNS,
    comparison_row,
    group_rows,
    knob_lines,
    memory_line,
    provenance_lines,
    ranking_line,
    replay_lines,
    shape_line,
    solver_line,
    speed_line,
    step_row,
    time_line,
    verdict,
)
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate, fastest_replayed
from planner.pages.policy_reasons import choosers
from planner.pages.policy_words import policy_line
from planner.pricing.breakdown import MemorySplit, memory_split, time_split

if TYPE_CHECKING:
    from rich.console import Console

    from planner.pages.plan_html import Page

PLAN_JSON_SCHEMA = 1
MAX_GROUP_ROWS = 32
_COLUMN_FRAME = 3  # a blank on both sides and a line
_DROPPED_FIRST = ("start", "longest", "bound", "own gap", "plan ms", "idle", "peak", "status")
"""Columns that are left out on a narrow terminal, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """``steps``: the plans shown in detail. ``strategy``: as requested. ``candidates``: all strategies with ``all``,
    else empty. ``knobs``: lines on what would help, shown to people only."""

    job: Job
    strategy: str
    steps: tuple[PlannedStep, ...]
    candidates: tuple[Candidate, ...]
    knobs: tuple[str, ...] = ()

    @property
    def memory(self) -> MemorySplit:
        """The memory of the rank with the highest peak in all steps."""
        fullest = max(self.steps, key=lambda step: step.simulation.peak_bytes)
        return memory_split(fullest.simulation, self.job.cost, self.job.limits.device_budget_bytes)


def as_json(result: Result) -> dict[str, Any]:
    """Schema 1. With ``all``, ``steps`` and ``summary`` are those of the strategy with the shortest predicted time, and
    ``comparison`` has all strategies, with the replay of their first step if there was one."""
    job = result.job
    value = {
        "schema": PLAN_JSON_SCHEMA,
        "model": job.model.name,
        "cluster": job.cluster.name,
        "strategy": result.strategy,
        "steps": [{**_step_json(step), "replay": _replay_json(step)} for step in result.steps],
        "summary": _summary_json(result.steps, job.cluster.num_ranks),
    }
    if result.candidates:
        quickest = fastest_replayed(result.candidates)
        value["comparison"] = [
            _candidate_json(candidate, job.cluster.num_ranks, candidate is quickest) for candidate in result.candidates
        ]
    return value


def _candidate_json(candidate: Candidate, num_devices: int, is_quickest: bool) -> dict[str, Any]:
    if not candidate.steps:
        return {"strategy": candidate.strategy, "refused": candidate.refusal}
    return {
        "strategy": candidate.strategy,
        "steps": [_step_json(step) for step in candidate.steps],
        "summary": _summary_json(candidate.steps, num_devices),
        "first_step_replay": _replay_json(candidate.steps[0]),
        "is_fastest_by_replay": is_quickest,
    }


def _summary_json(steps: tuple[PlannedStep, ...], num_devices: int) -> dict[str, float]:
    plans = [step.plan for step in steps]
    total_s = sum(plan.predicted_s for plan in plans)
    tokens_per_s = sum(plan.num_tokens for plan in plans) / total_s
    return {
        "mean_step_s": total_s / len(plans),
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / num_devices,
        "mean_gap": sum(plan.solver.gap for plan in plans) / len(plans),
        "max_gap": max(plan.solver.gap for plan in plans),
        "mean_solve_s": sum(plan.solver.wall_s for plan in plans) / len(plans),
    }


def _step_json(step: PlannedStep) -> dict[str, Any]:
    plan, solver = step.plan, step.plan.solver
    return {
        "step": plan.step,
        "num_sequences": len(plan.sequences),
        "num_tokens": plan.num_tokens,
        "predicted_s": plan.predicted_s,
        "bound_s": solver.bound_s,
        "gap": solver.gap,
        "solve_s": solver.wall_s,
        "status": solver.status.value,
        "num_microbatches": len(plan.microbatches),
        "peak_bytes": plan.peak_bytes,
        "idle_fraction": step.simulation.idle_fraction,
    }


def _replay_json(step: PlannedStep) -> dict[str, Any] | None:
    """The replay's figures; None if the step was not replayed. Seconds by part are means over the ranks."""
    replay = step.replay
    if replay is None:
        return None
    return {
        "step_s": replay.step_s,
        "low_s": replay.low_s,
        "high_s": replay.high_s,
        "compute_s": replay.mean_s("compute_s"),
        "exposed_communication_s": replay.mean_s("exposed_communication_s"),
        "exposed_swap_s": replay.mean_s("exposed_swap_s"),
        "idle_s": replay.mean_s("idle_s"),
        "peak_bytes": max(replay.peak_bytes),
        "host_bytes": max(replay.host_bytes),
        "max_nic_share": max(replay.node_nic_share),
        "model_flop": replay.model_flop,
        "mfu": replay.mfu,
    }


def show(result: Result) -> None:
    """Print everything for people, most important lines first."""
    console = output_console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width
    job, first = result.job, result.steps[0]
    for line in headline(result):
        console.print(line, style="bold", soft_wrap=True)
    console.print(_time_line(result), soft_wrap=True)
    for line in replay_lines(first):
        console.print(line, soft_wrap=True)
    console.print(memory_line(result.memory), soft_wrap=True)
    console.print(policy_line(result.steps, job.cost, job.limits), soft_wrap=True)
    for remark in job.remarks:
        console.print(f"note: {remark}", soft_wrap=True)
    _show_comparison(console, result)
    title = f"{first.plan.strategy}: {job.model.name} on {job.cluster.name}, lengths {job.lengths_name}"
    _show_table(console, title, STEP_COLUMNS, [step_row(step) for step in result.steps])
    rows = group_rows(first)
    title = f"step {first.plan.step}: {shape_line(first.plan)}"
    _show_table(console, title, GROUP_COLUMNS, rows[:MAX_GROUP_ROWS])
    if len(rows) > MAX_GROUP_ROWS:
        console.print(f"... and {len(rows) - MAX_GROUP_ROWS} more groups")
    console.print(solver_line(first.plan), soft_wrap=True)
    for line in result.knobs:
        console.print(line, soft_wrap=True)
    for line in provenance_lines(job.cost, job.sources):
        console.print(line, style=None if line.startswith("cost model") else "dim", soft_wrap=True)


def headline(result: Result) -> tuple[str, str]:
    """Two lines: whether the plan fits, and how fast it is."""
    speed = speed_line(result.steps, result.job.cluster.num_ranks, result.job.cost)
    return verdict(result.steps, result.memory), speed


def page(result: Result) -> Page:
    """The same content for ``planner.pages.plan_html``."""
    from planner.pages.plan_html import Page

    job, first = result.job, result.steps[0]
    return Page(
        title=f"{first.plan.strategy}: {job.model.name} on {job.cluster.name}, lengths {job.lengths_name}",
        lines=(
            *headline(result), _time_line(result), *replay_lines(first), memory_line(result.memory),
            policy_line(result.steps, job.cost, job.limits), solver_line(first.plan),
            *(f"note: {remark}" for remark in job.remarks), *_comparison_lines(result),
        ),
        knobs=result.knobs,
        sources=tuple(provenance_lines(job.cost, job.sources)),
        step=first,
        lengths=tuple(length for batch in job.batches for length in batch),
        candidates=result.candidates,
        fixed_bytes=job.cost.memory.fixed_bytes,
        budget_bytes=job.limits.device_budget_bytes,
    )


def _time_line(result: Result) -> str:
    first, job = result.steps[0], result.job
    return time_line(first.plan, time_split(first.plan, first.simulation, job.cost, job.free_cost))


def knobs_of(job: Job, strategy: str, degree: int | None) -> tuple[str, ...]:
    """What would help most, in words: plans the first step again several times, each with one change."""
    from rich.console import Console

    from planner.pages.knobs import Scenario, best_knobs, usual_planner

    lengths = job.batches[0]
    start = Scenario(
        change="", cluster=job.cluster, limits=job.limits, lengths=lengths, rank_devices=job.grid.num_devices,
        strategy=usual_planner(strategy, job.num_ranks, len(lengths)), degree=degree,
    )
    with Console(stderr=True).status("trying what would help"):  # visible on a terminal only
        return tuple(knob_lines(best_knobs(start, job.price), start.strategy))


def _show_comparison(console: Console, result: Result) -> None:
    best = best_candidate(result.candidates)
    if best is None:
        return
    planned = sorted((found for found in result.candidates if found.steps), key=lambda found: found.mean_step_s)
    quickest = fastest_replayed(result.candidates)
    rows = [comparison_row(candidate, best, quickest) for candidate in planned]
    _show_table(console, f"every strategy on the same batches ({len(best.steps)})", COMPARISON_COLUMNS, rows)
    for line in _comparison_lines(result):
        console.print(line, soft_wrap=True)


def _comparison_lines(result: Result) -> list[str]:
    ranking = ranking_line(result.candidates)
    refusals = [f"{found.strategy} refuses {found.refusal}" for found in result.candidates if found.refusal]
    policies = []
    if len(result.candidates) > 1 and len(result.job.limits.policies) > 1:
        policies = [f"only some strategies choose memory policies ({choosers()}); the others keep all activations"]
    return [*([ranking] if ranking else []), *policies, *refusals]


def _show_table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    console.print(title, soft_wrap=True)
    shown = fitting_columns(columns, rows, console.width)
    table = Table()
    for place in shown:
        is_text = columns[place] in ("attention", "ranks", "status", "strategy", "memory")
        table.add_column(columns[place], justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    console.print(table)
    left_out = [name for place, name in enumerate(columns) if place not in shown]
    if left_out:
        console.print(f"(too narrow for {', '.join(left_out)}: use a wider terminal or a pipe)", soft_wrap=True)


def fitting_columns(columns: SequenceOf[str], rows: SequenceOf[SequenceOf[str]], width: int) -> tuple[int, ...]:
    """Indices of the columns that fit into ``width`` characters without breaking a word, in order. Leaves out as few
    columns of ``_DROPPED_FIRST`` as necessary."""
    widths = [max(len(cells[place]) for cells in (columns, *rows)) + _COLUMN_FRAME for place in range(len(columns))]
    shown = list(range(len(columns)))
    for name in _DROPPED_FIRST:
        if sum(widths[place] for place in shown) < width:
            break
        shown = [place for place in shown if columns[place] != name]
    return tuple(shown)
