"""A run in numbers: what its plans predicted, what its steps measured, and what follows from the difference."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from typing import Any

from planner.cost.model import CostModel
from planner.measured.copy_times import CopySummary, StepLanes, summarize_copies
from planner.measured.drift import (
    MIN_STEPS,
    WARM_UP_STEPS,
    WINDOW_STEPS,
    Drift,
    Executed,
    Refit,
    drift_of,
    planned_span_s,
    refit_cost,
)
from planner.pages.explain import shape_name
from planner.plan import StepPlan

RUN_JSON_SCHEMA = 1
NUM_WORST = 3
DEFAULT_FACTOR = 1.5
PARTS = ("plan_wait_s", "gather_s", "compute_s", "exchange_wait_s", "reduce_s", "update_s")
"""Keys of the metrics that split a step's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """One executed step. ``loss`` is None if it was not finite."""

    step: int
    loss: float | None
    num_tokens: int
    predicted_s: float
    measured_s: float
    predicted_peak_bytes: int
    peak_bytes: int
    status: str
    groups: str

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1: negative if the step took longer than predicted."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLine:
    """Means in seconds over recorded steps, from gathered parameters to the end of the last microbatch of any rank.

    ``predicted_busy_s`` includes waiting inside microbatches, which the cost model does not separate: compare it with
    ``compute_s`` + ``wait_s``.
    """

    rank: int
    predicted_busy_s: float
    predicted_idle_s: float
    compute_s: float
    wait_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeLine:
    """Microbatches of one attention kind and degree. ``ratio``: measured over predicted, median."""

    name: str
    num_microbatches: int
    predicted_s: float
    measured_s: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """``judged``: the steps over which means and errors are computed: all but the first ones, if there are enough.

    ``parts_s``: mean seconds of those PARTS that the run recorded. ``copies``: copies of activations; None if none were
    recorded.
    """

    steps: tuple[StepLine, ...]
    judged: tuple[StepLine, ...]
    num_planned: int | None
    tokens_per_s: float
    parts_s: dict[str, float]
    ranks: tuple[RankLine, ...]
    shapes: tuple[ShapeLine, ...]
    num_recorded: int
    drift: Drift | None
    refit: Refit | None
    copies: CopySummary | None

    @property
    def absolute_error(self) -> float:
        """Mean of |predicted / measured - 1| of the step time."""
        return statistics.fmean(abs(step.error) for step in self.judged)

    @property
    def bias(self) -> float:
        """Mean of predicted / measured - 1, in which errors of both signs cancel out."""
        return statistics.fmean(step.error for step in self.judged)

    @property
    def predicted_s(self) -> float:
        return statistics.fmean(step.predicted_s for step in self.judged)

    @property
    def measured_s(self) -> float:
        return statistics.fmean(step.measured_s for step in self.judged)

    @property
    def statuses(self) -> dict[str, int]:
        return dict(Counter(step.status for step in self.steps).most_common())

    def worst(self) -> tuple[StepLine, ...]:
        return tuple(sorted(self.judged, key=lambda step: -abs(step.error))[:NUM_WORST])


def make_run_report(
    metrics: SequenceOf[Mapping[str, Any]], executed: SequenceOf[Executed], *, cost: CostModel | None,
    factor: float = DEFAULT_FACTOR, num_planned: int | None = None, lanes: Mapping[int, StepLanes] | None = None,
) -> RunReport:
    """``metrics``: records of ``metrics.jsonl``, at least one. ``executed``: recorded steps with their plans.
    ``lanes``: times of layers and copies, by step."""
    steps = tuple(_step_line(record) for record in metrics)
    first = WARM_UP_STEPS if len(steps) >= WARM_UP_STEPS + MIN_STEPS else 0
    timed = [record for record in metrics if all(isinstance(record.get(key), int | float) for key in PARTS)][first:]
    counted = [(plan, measured) for plan, measured in executed if plan.step >= first]
    busy_s = sum(step.measured_s for step in steps[first:]) + sum(
        float(record.get("plan_wait_s") or 0.0) for record in metrics[first:]
    )
    return RunReport(
        steps=steps, judged=steps[first:], num_planned=num_planned,
        tokens_per_s=sum(step.num_tokens for step in steps[first:]) / busy_s if busy_s > 0 else 0.0,
        parts_s={key: statistics.fmean(float(record[key]) for record in timed) for key in PARTS} if timed else {},
        ranks=_rank_lines(counted), shapes=_shape_lines(counted), num_recorded=len(executed),
        drift=_drift(metrics, counted, factor), refit=None if cost is None else refit_cost(cost, executed),
        copies=summarize_copies([found for step, found in sorted((lanes or {}).items()) if step >= first]),
    )


def _step_line(record: Mapping[str, Any]) -> StepLine:
    def number(key: str) -> float:
        value = record.get(key)
        return float(value) if isinstance(value, int | float) else 0.0

    loss = record.get("loss")
    return StepLine(
        step=int(record["step"]), loss=float(loss) if isinstance(loss, int | float) else None,
        num_tokens=int(number("num_tokens")), predicted_s=number("predicted_s"), measured_s=number("measured_s"),
        predicted_peak_bytes=int(number("predicted_peak_bytes")), peak_bytes=int(number("peak_bytes")),
        status=str(record.get("plan_status", "unknown")), groups=str(record.get("group_summary", "")),
    )


def _drift(metrics: SequenceOf[Mapping[str, Any]], executed: SequenceOf[Executed], factor: float) -> Drift | None:
    """The drift by recorded microbatches; if there are too few, the last one that the run itself recorded."""
    pairs = [(planned_span_s(plan), measured.span_s) for plan, measured in executed[-WINDOW_STEPS:]]
    found = drift_of([pair for pair in pairs if pair[0] > 0], factor)
    said = metrics[-1].get("drift_ratio")
    if found is not None or not isinstance(said, int | float):
        return found
    return Drift(ratio=float(said), num_steps=min(WINDOW_STEPS, len(metrics)), factor=factor)


def predicted_busy_s(plan: StepPlan) -> tuple[float, ...]:
    """Seconds that each rank spends on microbatches by the plan."""
    busy_s = [0.0] * plan.num_ranks
    for microbatch in plan.microbatches:
        for rank in microbatch.ranks:
            busy_s[rank] += microbatch.predicted_s
    return tuple(busy_s)


def _rank_lines(executed: SequenceOf[Executed]) -> tuple[RankLine, ...]:
    if not executed:
        return ()
    num_ranks = executed[-1][0].num_ranks  # a resumed run may have had another number of ranks before
    steps = [(plan, measured) for plan, measured in executed if plan.num_ranks == num_ranks]
    busy_s = [predicted_busy_s(plan) for plan, _ in steps]
    spans_s = [planned_span_s(plan) for plan, _ in steps]
    lines = []
    for rank in range(num_ranks):
        predicted_s = statistics.fmean(each[rank] for each in busy_s)
        compute_s = statistics.fmean(measured.ranks[rank].compute_s for _, measured in steps)
        wait_s = statistics.fmean(measured.ranks[rank].wait_s for _, measured in steps)
        whole_s = statistics.fmean(measured.span_s for _, measured in steps)
        lines.append(RankLine(
            rank=rank, predicted_busy_s=predicted_s, predicted_idle_s=statistics.fmean(spans_s) - predicted_s,
            compute_s=compute_s, wait_s=wait_s, idle_s=max(0.0, whole_s - compute_s - wait_s),
        ))
    return tuple(lines)


def _shape_lines(executed: SequenceOf[Executed]) -> tuple[ShapeLine, ...]:
    """One line per shape; microbatches with groups of different shapes are counted as mixed."""
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for plan, measured in executed:
        for index, seconds in measured.microbatch_s().items():
            groups = plan.microbatches[index].groups
            shapes = {(group.kind, group.degree) for group in groups}
            name = shape_name(groups[0].kind, groups[0].degree) if len(shapes) == 1 else "mixed"
            degree = max(group.degree for group in groups)
            found[degree, name].append((plan.microbatches[index].predicted_s, seconds))
    return tuple(
        ShapeLine(
            name=name, num_microbatches=len(pairs), predicted_s=statistics.fmean(p for p, _ in pairs),
            measured_s=statistics.fmean(m for _, m in pairs),
            ratio=statistics.median(m / p if p > 0 else 1.0 for p, m in pairs),
        )
        for (_, name), pairs in sorted(found.items())
    )


def as_json(report: RunReport) -> dict[str, Any]:
    """Schema 1: the whole report as plain values."""
    last, drift, refit = report.steps[-1], report.drift, report.refit
    return {
        "schema": RUN_JSON_SCHEMA,
        "num_steps": len(report.steps),
        "num_planned": report.num_planned,
        "loss_first": report.steps[0].loss,
        "loss_last": last.loss,
        "tokens_per_s": report.tokens_per_s,
        "predicted_s": report.predicted_s,
        "measured_s": report.measured_s,
        "absolute_error": report.absolute_error,
        "bias": report.bias,
        "num_judged": len(report.judged),
        "parts_s": report.parts_s,
        "predicted_peak_bytes": max(step.predicted_peak_bytes for step in report.steps),
        "peak_bytes": max(step.peak_bytes for step in report.steps),
        "plan_statuses": report.statuses,
        "drift": None if drift is None else {
            "ratio": drift.ratio, "factor": drift.factor, "num_steps": drift.num_steps, "is_off": drift.is_off,
        },
        "refit": None if refit is None else {
            "num_microbatches": refit.num_samples, "error_before": refit.error_before,
            "error_after": refit.error_after,
        },
        "copies": None if report.copies is None else {
            **asdict(report.copies), "hidden_share": report.copies.hidden_share,
        },
        "num_recorded": report.num_recorded,
        "ranks": [
            {name: getattr(line, name) for name in
             ("rank", "predicted_busy_s", "predicted_idle_s", "compute_s", "wait_s", "idle_s")}
            for line in report.ranks
        ],
        "shapes": [
            {name: getattr(line, name) for name in
             ("name", "num_microbatches", "predicted_s", "measured_s", "ratio")}
            for line in report.shapes
        ],
        "worst_steps": [_step_json(step) for step in report.worst()],
        "steps": [_step_json(step) for step in report.steps],
    }


def _step_json(step: StepLine) -> dict[str, Any]:
    return {
        "step": step.step, "loss": step.loss, "predicted_s": step.predicted_s, "measured_s": step.measured_s,
        "error": step.error, "predicted_peak_bytes": step.predicted_peak_bytes, "peak_bytes": step.peak_bytes,
        "status": step.status,
    }

