"""``longhaul plan``: price a file of sequence lengths on a cluster, without a device and without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from planner.analytic import derive_cost
from planner.cluster import ClusterSpec
from planner.codec import suggest
from planner.cost import CostModel, PlanLimits
from planner.errors import EXIT_OK, SpecError
from planner.explain import (
    GROUP_COLUMNS,
    STEP_COLUMNS,
    PlannedStep,
    group_rows,
    provenance_lines,
    shape_line,
    solver_line,
    step_row,
    verdict,
)
from planner.lengths_file import batches_of_sequences, batches_of_tokens, drop_longer, read_lengths
from planner.model_spec import ModelSpec
from planner.plan import AttentionKind, Sharding
from planner.simulate import simulate
from planner.specs import cluster_names, guesses, load_cluster, load_model, model_names
from planner.units import format_bytes, parse_bytes, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

PLAN_JSON_SCHEMA = 1
MAX_GROUP_ROWS = 32
_KINDS = {
    "auto": (AttentionKind.ULYSSES, AttentionKind.RING),
    "ulysses": (AttentionKind.ULYSSES,),
    "ring": (AttentionKind.RING,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything the flags asked for, read and checked."""

    cluster: ClusterSpec
    model: ModelSpec
    cost: CostModel
    limits: PlanLimits
    batches: tuple[tuple[int, ...], ...]
    remarks: tuple[str, ...]


def run(arguments: list[str]) -> int:
    """Plan, print, return the exit code. Raises SpecError (2) and InfeasibleError (94) with one line for people."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(arguments)
    if flags.help:
        print(parser.format_help(), end="")
        return EXIT_OK
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = suggest(flag, parser._option_string_actions) if flag.startswith("--") else ""
        raise SpecError(f"longhaul plan: unknown argument {unknown[0]!r}{hint}; see longhaul plan --help")
    job = _job(flags)
    steps = _plan(job, flags)
    if flags.json is not None:
        _write_json(flags.json, _as_json(job, flags.strategy, steps))
    if flags.json != "-":
        _print(job, steps)
    return EXIT_OK


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"longhaul plan: {message}; see longhaul plan --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="longhaul plan", add_help=False, allow_abbrev=False,
        description="Plan training steps over sequences of these lengths and say what they would cost.",
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this text")
    add("--lengths", metavar="FILE", help="one sequence length (tokens) a line; batches are consecutive lines")
    add("--model", default="tiny", metavar="NAME|FILE", help=f"{', '.join(model_names())} or a .yaml file")
    add("--cluster", default="laptop-cpu", metavar="NAME|FILE", help=f"{', '.join(cluster_names())} or a .yaml file")
    add("--strategy", default="flexsp", metavar="NAME", help="flexsp (default) or static")
    add("--degree", metavar="D", help="ranks per group, for static (default: the best one)")
    add("--attention", default="auto", metavar="KIND", help="auto (default), ulysses or ring")
    add("--batch-sequences", metavar="N", help="sequences a step (default 512)")
    add("--batch-tokens", metavar="N", help="or: at most this many tokens a step, e.g. 512K")
    add("--max-length", metavar="N", help="drop longer sequences, e.g. 192K (= 196,608 tokens)")
    add("--steps", default="3", metavar="N", help="plan the first N batches (default 3)")
    add("--device-budget", metavar="BYTES", help='bytes a device may use, e.g. "30 GiB" (default: memory less reserve)')
    add("--json", metavar="-|FILE", help="write the result as JSON; - prints it and nothing else")
    add("--trace", metavar="FILE", help="not built yet")
    add("--html", metavar="FILE", help="not built yet")
    return parser


def _job(flags: argparse.Namespace) -> _Job:
    from planner.step_planner import check_strategy

    for name in ("trace", "html"):
        if getattr(flags, name) is not None:
            raise SpecError(f"longhaul plan: --{name} comes with the planner issue; leave it out")
    if flags.attention not in _KINDS:
        raise SpecError(f"--attention: {flags.attention!r} is none of auto, ulysses, ring")
    check_strategy(flags.strategy, _count(flags.degree, "--degree"))
    if flags.json not in (None, "-") and not Path(flags.json).parent.is_dir():
        raise SpecError(f"--json: folder {Path(flags.json).parent} does not exist")
    if flags.lengths is None:
        raise SpecError("longhaul plan: --lengths FILE is needed (one sequence length in tokens a line)")
    cluster, model = load_cluster(flags.cluster), load_model(flags.model)
    batches, remarks = _batches(flags)
    limits = PlanLimits(
        device_budget_bytes=_budget_bytes(flags.device_budget, cluster),
        max_ulysses_degree=model.num_query_heads,
        kinds=_KINDS[flags.attention],
    )
    longest = max(max(batch) for batch in batches)
    cost, remark = _cost(cluster, model, limits.device_budget_bytes, longest)
    return _Job(
        cluster=cluster, model=model, cost=cost, limits=limits, batches=batches,
        remarks=(*remarks, *([remark] if remark else [])),
    )


def _batches(flags: argparse.Namespace) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """The steps to plan, and what to say about sequences that were left out."""
    if flags.batch_sequences is not None and flags.batch_tokens is not None:
        raise SpecError("longhaul plan: give --batch-sequences or --batch-tokens, not both")
    num_steps = _count(flags.steps, "--steps")
    num_tokens = _tokens(flags.batch_tokens, "--batch-tokens")
    num_sequences = _count(flags.batch_sequences, "--batch-sequences") or 512
    max_tokens = _tokens(flags.max_length, "--max-length")
    lengths, remarks = read_lengths(flags.lengths), []
    if max_tokens is not None:
        lengths, num_dropped = drop_longer(lengths, max_tokens)
        remarks.append(f"{num_dropped} of {len(lengths) + num_dropped} sequences over {max_tokens} tokens dropped")
    found: Iterator[tuple[int, ...]] = (
        batches_of_tokens(lengths, num_tokens) if num_tokens else batches_of_sequences(lengths, num_sequences)
    )
    return tuple(islice(found, num_steps)), remarks


def _cost(cluster: ClusterSpec, model: ModelSpec, budget_bytes: int, longest: int) -> tuple[CostModel, str]:
    """Priced for gather_once, which training runs; where the longest sequence does not fit beside a whole copy of the
    model, priced for zero3, and the remark says so."""
    num_ranks = cluster.num_ranks
    cost = derive_cost(cluster, model, num_ranks=num_ranks)
    if cost.max_local_tokens(budget_bytes) * num_ranks >= longest:
        return cost, ""
    lean = derive_cost(cluster, model, num_ranks=num_ranks, sharding=Sharding.ZERO3)
    remark = (
        f"priced with zero3: gather_once needs {format_bytes(cost.memory.fixed_bytes)} a device before the first token "
        f"and leaves too little of {format_bytes(budget_bytes)} for {longest} tokens; training runs gather_once only"
    )
    return lean, remark


def _budget_bytes(text: str | None, cluster: ClusterSpec) -> int:
    device = cluster.device
    if text is None:
        return device.memory_bytes - device.reserved_bytes
    budget = parse_bytes(text, what="--device-budget")
    if not 0 < budget <= device.memory_bytes:
        memory = format_bytes(device.memory_bytes)
        raise SpecError(f"--device-budget: {text} is not within the {memory} of {device.name}")
    return budget


def _count(text: str | None, flag: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise SpecError(f"{flag}: expected a whole number of at least 1, got {text!r}")
    return int(text)


def _tokens(text: str | None, flag: str) -> int | None:
    if text is None:
        return None
    tokens = parse_tokens(text, what=flag)
    if tokens < 1:
        raise SpecError(f"{flag}: expected at least 1 token, got {text!r}")
    return tokens


def _plan(job: _Job, flags: argparse.Namespace) -> list[PlannedStep]:
    from rich.console import Console

    from planner.step_planner import plan_step

    degree = _count(flags.degree, "--degree")
    steps = []
    with Console(stderr=True).status("planning") as status:  # seen on a terminal only
        for index, lengths in enumerate(job.batches):
            status.update(f"planning step {index + 1} of {len(job.batches)}")
            plan = plan_step(
                lengths, step=index, num_ranks=job.cluster.num_ranks, cost=job.cost, limits=job.limits,
                strategy=flags.strategy, degree=degree,
            )
            steps.append(PlannedStep(plan=plan, simulation=simulate(plan, job.cost)))
    return steps


def _as_json(job: _Job, strategy: str, steps: list[PlannedStep]) -> dict[str, Any]:
    plans = [step.plan for step in steps]
    total_s = sum(plan.predicted_s for plan in plans)
    tokens_per_s = sum(plan.num_tokens for plan in plans) / total_s
    return {
        "schema": PLAN_JSON_SCHEMA,
        "model": job.model.name,
        "cluster": job.cluster.name,
        "strategy": strategy,
        "steps": [_step_json(step) for step in steps],
        "summary": {
            "mean_step_s": total_s / len(plans),
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_device": tokens_per_s / job.cluster.num_ranks,
            "mean_gap": sum(plan.solver.gap for plan in plans) / len(plans),
            "max_gap": max(plan.solver.gap for plan in plans),
            "mean_solve_s": sum(plan.solver.wall_s for plan in plans) / len(plans),
        },
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


def _write_json(target: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, allow_nan=False)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--json: cannot write {target} ({error.strerror})") from None


def _print(job: _Job, steps: list[PlannedStep]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width of its own
    first = steps[0]
    console.print(verdict(steps, job.cluster.num_ranks), style="bold", soft_wrap=True)
    for remark in job.remarks:
        console.print(f"note: {remark}", soft_wrap=True)
    _print_table(console, f"{job.model.name} on {job.cluster.name}", STEP_COLUMNS, [step_row(step) for step in steps])
    rows = group_rows(first)
    title = f"step {first.plan.step}: {shape_line(first.plan)}"
    _print_table(console, title, GROUP_COLUMNS, rows[:MAX_GROUP_ROWS])
    if len(rows) > MAX_GROUP_ROWS:
        console.print(f"... and {len(rows) - MAX_GROUP_ROWS} more groups")
    console.print(solver_line(first.plan), soft_wrap=True)
    for line in provenance_lines(job.cost, guesses(job.cluster)):
        console.print(line, style=None if line.startswith("cost model") else "dim", soft_wrap=True)


def _print_table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="")
    for name in columns:
        table.add_column(name, justify="left" if name in ("attention", "ranks", "status") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
