"""A plan in words and rows for people. Plain strings only: the command prints them, tests and logs read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.cost import CostModel
from planner.plan import AttentionGroup, AttentionKind, SolveStatus, StepPlan
from planner.simulate import Simulation, step_lengths
from planner.units import format_bytes, format_count, format_seconds

STEP_COLUMNS = (
    "step", "seqs", "tokens", "longest", "microbatches", "seconds", "bound", "gap", "idle", "peak", "status",
)
GROUP_COLUMNS = ("microbatch", "attention", "ranks", "seqs", "tokens", "longest", "start", "seconds", "peak")

_STATUS_WORDS = {
    SolveStatus.OPTIMAL: "proven optimal",
    SolveStatus.FEASIBLE: "not proven optimal",
    SolveStatus.LIMIT: "stopped at the solver limit",
    SolveStatus.GREEDY: "greedy plan",
    SolveStatus.STATIC: "static plan",
    SolveStatus.LATE: "greedy plan, the planner was late",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A plan and its price."""

    plan: StepPlan
    simulation: Simulation


def verdict(steps: SequenceOf[PlannedStep], num_devices: int) -> str:
    """One line: how fast, how full, how good."""
    total_s = sum(step.plan.predicted_s for step in steps)
    tokens_per_s = sum(step.plan.num_tokens for step in steps) / total_s
    idle = sum(step.simulation.idle_fraction for step in steps) / len(steps)
    peak = max(step.plan.peak_bytes for step in steps)
    known = [step.plan.solver.gap for step in steps if step.plan.solver.bound_s > 0]
    gap = f"gap to the proven bound at most {max(known):.1%}" if len(known) == len(steps) else "no bound known"
    plural = "step" if len(steps) == 1 else "steps"
    return (
        f"{steps[0].plan.strategy}: {format_seconds(total_s / len(steps))} a step over {len(steps)} {plural}, "
        f"{format_count(tokens_per_s)} tokens/s ({format_count(tokens_per_s / num_devices)} per device), "
        f"idle {idle:.1%}, peak {format_bytes(peak)} a device, {gap}"
    )


def step_row(step: PlannedStep) -> tuple[str, ...]:
    """One row under ``STEP_COLUMNS``."""
    plan, solver = step.plan, step.plan.solver
    return (
        str(plan.step),
        str(len(plan.sequences)),
        format_count(plan.num_tokens),
        format_count(max(step_lengths(plan))),
        str(len(plan.microbatches)),
        format_seconds(plan.predicted_s),
        format_seconds(solver.bound_s) if solver.bound_s > 0 else "-",
        f"{solver.gap:.1%}" if solver.bound_s > 0 else "-",
        f"{step.simulation.idle_fraction:.1%}",
        format_bytes(plan.peak_bytes),
        str(solver.status),
    )


def group_rows(step: PlannedStep) -> list[tuple[str, ...]]:
    """Rows under ``GROUP_COLUMNS``, one per attention group in execution order."""
    lengths = step_lengths(step.plan)
    starts = {event.microbatch: event.start_s for event in step.simulation.events}
    rows: list[tuple[str, ...]] = []
    for index, microbatch in enumerate(step.plan.microbatches):
        for group in microbatch.groups:
            sizes = [lengths[sequence] for sequence in group.sequences]
            rows.append((
                str(index),
                _shape(group.kind, group.degree),
                rank_ranges(group.ranks),
                str(len(sizes)),
                format_count(sum(sizes)),
                format_count(max(sizes)),
                format_seconds(starts[index]),
                format_seconds(microbatch.predicted_s),
                format_bytes(microbatch.peak_bytes),
            ))
    return rows


def shape_line(plan: StepPlan) -> str:
    """All groups of the plan by shape, largest first: ``ulysses 32, 2 x ulysses 8, 64 x local``."""
    groups: list[AttentionGroup] = [group for microbatch in plan.microbatches for group in microbatch.groups]
    counts = Counter((group.kind, group.degree) for group in groups)
    shapes = sorted(counts, key=lambda shape: (-shape[1], shape[0]))
    return ", ".join(f"{counts[shape]} x {_shape(*shape)}" if counts[shape] > 1 else _shape(*shape) for shape in shapes)


def solver_line(plan: StepPlan) -> str:
    """How the plan was found and what is proven about it."""
    solver = plan.solver
    proof = "no lower bound known"
    if solver.bound_s > 0:
        proof = f"gap {solver.gap:.2%} to the proven bound of {format_seconds(solver.bound_s)}"
    note = f" ({solver.note})" if solver.note else ""
    return f"solver: {_STATUS_WORDS[solver.status]}, {proof}, found in {format_seconds(solver.wall_s)}{note}"


def provenance_lines(cost: CostModel, guesses: SequenceOf[str] = ()) -> list[str]:
    """Where the predictions come from. What is only guessed is marked ``guess``."""
    origin = cost.provenance
    head = f"cost model: {origin.source} for {origin.model} on {origin.cluster}"
    if origin.num_samples:
        head += (
            f", {origin.num_samples} samples on {origin.measured_on or 'this machine'}, "
            f"mean error {origin.mean_relative_error:.1%}, worst {origin.max_relative_error:.1%}"
        )
    marked = [f"guess: {text}" for text in guesses]
    marked += [note for note in origin.notes if note.startswith("guess")]
    plain = [note for note in origin.notes if not note.startswith("guess")]
    return [head, *(f"  - {line}" for line in plain + marked)]


def rank_ranges(ranks: SequenceOf[int]) -> str:
    """``0-7,9``: runs of consecutive ranks, in group order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _shape(kind: AttentionKind, degree: int) -> str:
    return str(kind) if kind is AttentionKind.LOCAL else f"{kind} {degree}"
