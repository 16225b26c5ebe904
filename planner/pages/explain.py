"""A plan as lines and table rows for users. Returns plain strings; commands print them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from planner.cost.model import CostModel
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate, fastest_replayed
from planner.pages.policy_words import policy_name
from planner.plan import AttentionGroup, AttentionKind, Microbatch, Sharding, SolveStatus, StepPlan
from planner.pricing.breakdown import MemorySplit, TimeSplit
from planner.pricing.simulate import step_lengths
from planner.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from planner.pages.knobs import Knob  # imports all planners

DERIVED_BAND = 0.2
"""Relative error assumed for derived cost models. It is a guess, and reported as one, because none has been checked
against a cluster yet."""

MODELS_AGREE = 1.25
"""Prediction and replay agree if they are within this factor, which is within the replay's usual band."""

STEP_COLUMNS = (
    "step", "seqs", "tokens", "longest", "microbatches", "seconds", "replayed", "bound", "gap", "idle", "peak",
    "status",
)
GROUP_COLUMNS = ("microbatch", "attention", "ranks", "seqs", "tokens", "longest", "start", "seconds", "peak", "memory")
COMPARISON_COLUMNS = (
    "strategy", "mean step", "ratio to best", "first step", "replayed", "idle", "peak", "own gap", "plan ms",
)

_STATUS_WORDS = {
    SolveStatus.OPTIMAL: "optimal in its search",
    SolveStatus.FEASIBLE: "not optimal in its search",
    SolveStatus.LIMIT: "stopped at the solver limit",
    SolveStatus.GREEDY: "greedy plan",
    SolveStatus.STATIC: "static plan",
    SolveStatus.LATE: "greedy plan, the planner was late",
}


def ranking_line(candidates: SequenceOf[Candidate]) -> str:
    """One line: whether prediction and replay find the same strategy fastest. Empty if they were not compared."""
    best, quickest = best_candidate(candidates), fastest_replayed(candidates)
    if best is None or quickest is None:
        return ""
    if best is quickest:
        return f"fastest: {best.strategy}, by predicted steps and by the replay of the first step (*)"
    quickest_s, best_s = quickest.replayed_s or 0.0, best.replayed_s or 0.0
    less = 1 - quickest_s / best_s if best_s > 0 else 0.0
    return (
        f"fastest: {best.strategy} by predicted steps, {quickest.strategy} by the replay of the first step (*): "
        f"{format_seconds(quickest_s)} against {format_seconds(best_s)}, "
        f"{f'{less:.1%}' if less >= 0.001 else 'under 0.1%'} less"
    )


def comparison_row(candidate: Candidate, best: Candidate, quickest: Candidate | None = None) -> tuple[str, ...]:
    """One row under ``COMPARISON_COLUMNS`` for a candidate with plans. The own gap is to the bound for this strategy's
    search space, so a limited strategy may have a small gap and still be slow. ``quickest``: is marked with a star."""
    replayed = "-" if candidate.replayed_s is None else format_seconds(candidate.replayed_s)
    plans = [step.plan for step in candidate.steps]
    gap = "-"
    if all(plan.solver.bound_s > 0 for plan in plans):
        gap = f"{sum(plan.solver.gap for plan in plans) / len(plans):.1%}"
    return (
        candidate.strategy,
        format_seconds(candidate.mean_step_s),
        f"{candidate.mean_step_s / best.mean_step_s:.3f}",
        format_seconds(plans[0].predicted_s),
        f"{replayed} *" if candidate is quickest else replayed,
        f"{sum(step.simulation.idle_fraction for step in candidate.steps) / len(plans):.1%}",
        format_bytes(max(plan.peak_bytes for plan in plans)),
        gap,
        f"{1000 * sum(plan.solver.wall_s for plan in plans) / len(plans):.1f}",
    )


def verdict(steps: SequenceOf[PlannedStep], memory: MemorySplit) -> str:
    """One line: the rank with the least memory left. A plan always fits, because planning raises an error otherwise.
    ``memory``: that of the fullest rank in all steps."""
    plan = steps[0].plan
    fits = "FITS with zero3" if plan.sharding is Sharding.ZERO3 else "FITS"
    return (
        f"{fits}: rank {memory.rank} is the tightest of {plan.num_ranks}, {format_bytes(memory.peak_bytes)} of "
        f"{format_bytes(memory.budget_bytes)}, headroom {format_bytes(memory.headroom_bytes)} "
        f"({memory.headroom_bytes / memory.budget_bytes:.0%})"
    )


def speed_line(steps: SequenceOf[PlannedStep], num_devices: int, cost: CostModel) -> str:
    """One line: how fast, within what band, and how close to the bound. The band is the worst error of a measured fit,
    or ``DERIVED_BAND`` for a model from data sheets, which nothing has checked."""
    total_s = sum(step.plan.predicted_s for step in steps)
    step_s = total_s / len(steps)
    tokens_per_s = sum(step.plan.num_tokens for step in steps) / total_s
    idle = sum(step.simulation.idle_fraction for step in steps) / len(steps)
    known = [step.plan.solver.gap for step in steps if step.plan.solver.bound_s > 0]
    gap = f"gap to the bound at most {max(known):.1%}" if len(known) == len(steps) else "no bound known"
    plural = "step" if len(steps) == 1 else "steps"
    return (
        f"{steps[0].plan.strategy}: {format_seconds(step_s)} per step over {len(steps)} {plural} "
        f"({band_text(step_s, cost)}), {format_count(tokens_per_s)} tokens/s "
        f"({format_count(tokens_per_s / num_devices)} per device), idle {idle:.1%}, {gap}"
    )


def band(cost: CostModel) -> float:
    """Relative half-width of the band around a predicted time."""
    origin = cost.provenance
    return origin.max_relative_error if origin.source == "measured" else DERIVED_BAND


def band_text(step_s: float, cost: CostModel) -> str:
    """For example ``3.2 to 4.8 s, +-20 % assumed for a derived cost model``."""
    width = band(cost)
    why = "assumed for a derived cost model"
    if cost.provenance.source == "measured":
        why = f"worst error of {cost.provenance.num_samples} samples"
    low, high = format_seconds(max(0.0, step_s * (1 - width))), format_seconds(step_s * (1 + width))
    return f"{low} to {high}, +-{width:.0%} {why}"


def time_line(plan: StepPlan, split: TimeSplit) -> str:
    """One line: where the predicted seconds of this step go. The planner's own time comes before the step, not in
    it."""
    parts = [("compute", split.work_s), ("exposed communication", split.communication_s or 0.0)]
    if split.communication_s is None:
        parts = [("compute and communication (measured together)", split.work_s)]
    if split.recompute_s > 0:
        parts.append(("recomputing", split.recompute_s))
    parts += [
        ("exposed swap", split.swap_s), ("imbalance (waiting for slower ranks)", split.waiting_s),
        ("gather, reduce, optimizer once per step", split.fixed_s),
    ]
    total_s = sum(seconds for _, seconds in parts)
    words = ", ".join(_part_text(name, seconds, total_s) for name, seconds in parts)
    return f"time of step {plan.step}: {words}; planner {format_seconds(plan.solver.wall_s)} ahead of it"


def _part_text(name: str, seconds: float, total_s: float) -> str:
    """For example ``compute 54.5% (3 s)`` or ``exposed swap none``."""
    return f"{name} {seconds / total_s:.1%} ({format_seconds(seconds)})" if seconds > 0 else f"{name} none"


def replay_lines(step: PlannedStep) -> list[str]:
    """The replayed step compared with the predicted one, its parts, and a warning if the two models disagree."""
    replay, predicted_s = step.replay, step.plan.predicted_s
    if replay is None:
        return []
    parts = (
        ("compute", "compute_s"), ("exposed communication", "exposed_communication_s"),
        ("exposed swap", "exposed_swap_s"), ("waiting for other ranks", "idle_s"),
    )
    words = ", ".join(_part_text(name, replay.mean_s(part), replay.step_s) for name, part in parts)
    ratio = replay.step_s / predicted_s
    lines = [
        f"replay of step {step.plan.step}, operation by operation: {format_seconds(replay.step_s)} "
        f"({format_seconds(replay.low_s)} to {format_seconds(replay.high_s)}), {ratio:.2f} times the predicted "
        f"{format_seconds(predicted_s)}",
        f"replay of step {step.plan.step}: {words}; MFU {replay.mfu:.1%}, NICs of the busiest node sending "
        f"{max(replay.node_nic_share):.1%} of the time",
    ]
    if not 1 / MODELS_AGREE <= ratio <= MODELS_AGREE:
        waiting = ", nor the waiting of zero3's ranks for each other" if step.plan.sharding is Sharding.ZERO3 else ""
        lines.append(
            f"the two models of step {step.plan.step} differ by more than {MODELS_AGREE}x: the plan is the best found "
            "by predicted seconds, which use one price per token for every group and include neither contention nor "
            f"waiting inside a microbatch{waiting}"
        )
    return lines


def memory_line(split: MemorySplit) -> str:
    """One line: where the fullest rank's bytes go."""
    return (
        f"memory of rank {split.rank}: weights, gradients, optimizer and buffers {format_bytes(split.fixed_bytes)}, "
        f"activations {format_bytes(split.activation_bytes)}, budget {format_bytes(split.budget_bytes)}"
    )


def knob_lines(knobs: SequenceOf[Knob] | None, planner: str) -> list[str]:
    """What to change first, with the gain this planner predicts. ``knobs`` None: ``best_knobs`` did not try any."""
    if knobs is None:
        return [f"what would help: not tried, the step is too large for it or has no {planner} plan to start from"]
    if not knobs:
        return [f"what would help: no setting tried gains 1 % or more ({planner} plans of the first step)"]
    lines = [
        f"  - {knob.change}: {_gain_text(knob.gain)} tokens/s"
        + (f" ({_gain_text(knob.gain_per_device)} per device)" if abs(knob.gain - knob.gain_per_device) > 1e-9 else "")
        for knob in knobs
    ]
    return [f"what would help most ({planner} plans of the first step, one thing changed):", *lines]


def _gain_text(gain: float) -> str:
    """For example ``+90%``; a value that rounds to zero has no sign."""
    return f"{gain:+.0%}" if abs(gain) >= 0.005 else "0%"


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
        format_seconds(step.replay.step_s) if step.replay is not None else "-",
        format_seconds(solver.bound_s) if solver.bound_s > 0 else "-",
        f"{solver.gap:.1%}" if solver.bound_s > 0 else "-",
        f"{step.simulation.idle_fraction:.1%}",
        format_bytes(plan.peak_bytes),
        str(solver.status),
    )


def group_rows(step: PlannedStep) -> list[tuple[str, ...]]:
    """Rows under ``GROUP_COLUMNS``, one per attention group in execution order."""
    lengths = step_lengths(step.plan)
    starts = {event.microbatch: event.start_s for event in reversed(step.simulation.events)}  # forward first
    rows: list[tuple[str, ...]] = []
    for index, microbatch in enumerate(step.plan.microbatches):
        for group in microbatch.groups:
            sizes = [lengths[sequence] for sequence in group.sequences]
            rows.append((
                str(index),
                shape_name(group.kind, group.degree),
                rank_ranges(group.ranks),
                str(len(sizes)),
                format_count(sum(sizes)),
                format_count(max(sizes)),
                format_seconds(starts[index]),
                format_seconds(microbatch.predicted_s),
                format_bytes(microbatch.peak_bytes),
                policy_name(microbatch.memory),
            ))
    return rows


def shape_line(plan: StepPlan) -> str:
    """All groups of the plan by shape, largest first, for example ``ulysses 32, 2 x ulysses 8, 64 x local``."""
    groups: list[AttentionGroup] = [group for microbatch in plan.microbatches for group in microbatch.groups]
    counts = Counter((group.kind, group.degree) for group in groups)
    shapes = sorted(counts, key=lambda shape: (-shape[1], shape[0]))
    times = {shape: f"{counts[shape]} x " if counts[shape] > 1 else "" for shape in shapes}
    return ", ".join(f"{times[shape]}{shape_name(*shape)}" for shape in shapes)


def solver_line(plan: StepPlan) -> str:
    """How the plan was found and what is proven about it."""
    solver = plan.solver
    proof = "no lower bound known"
    if solver.bound_s > 0:
        proof = f"gap {solver.gap:.2%} to the bound of {format_seconds(solver.bound_s)}"
    fallback = "no fallback"
    if solver.status is SolveStatus.LATE:
        fallback = "fallback: the greedy plan"
    elif "solver failed" in solver.note:
        fallback = "fallback: the best plan made without the solver"
    note = f" ({solver.note})" if solver.note else ""
    return (
        f"solver: {_STATUS_WORDS[solver.status]}, {proof}, found in {format_seconds(solver.wall_s)}, {fallback}{note}"
    )


def provenance_lines(cost: CostModel, sources: SequenceOf[tuple[str, str]] = ()) -> list[str]:
    """Where the predictions come from; ``sources``: (part, source). Guesses come last, marked with ``guess``."""
    origin = cost.provenance
    head = f"cost model: {origin.source} for {origin.model} on {origin.cluster}"
    if origin.num_samples:
        head += (
            f", {origin.num_samples} samples on {origin.measured_on or 'this machine'}, "
            f"mean error {origin.mean_relative_error:.1%}, worst {origin.max_relative_error:.1%}"
        )
    texts = [_source_text(part, source) for part, source in sources]
    texts += origin.notes
    marked = [text if text.startswith("guess") else f"guess in {text}" for text in texts if "guess" in text]
    plain = [text for text in texts if "guess" not in text]
    return [head, *(f"  - {line}" for line in plain + marked)]


def _source_text(part: str, source: str) -> str:
    return f"guess: {part}{source.removeprefix('guess')}" if source.startswith("guess") else f"{part}: {source}"


def rank_ranges(ranks: SequenceOf[int]) -> str:
    """Ranges of consecutive ranks in group order, for example ``0-7,9``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def groups_by_rank(microbatch: Microbatch) -> dict[int, list[AttentionGroup]]:
    """For each rank of a microbatch the groups it is in, in the order it runs them."""
    found: dict[int, list[AttentionGroup]] = {rank: [] for rank in microbatch.ranks}
    for group in microbatch.groups:
        for rank in group.ranks:
            found[rank].append(group)
    return found


def group_names(groups: SequenceOf[AttentionGroup]) -> str:
    """The different shapes in order, for example ``ring 8 + local``."""
    return " + ".join(dict.fromkeys(shape_name(group.kind, group.degree) for group in groups))


def shape_name(kind: AttentionKind, degree: int) -> str:
    """For example ``ulysses 8`` or ``local``."""
    return str(kind) if kind is AttentionKind.LOCAL else f"{kind} {degree}"
