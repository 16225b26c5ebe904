"""One executed step as a Chrome trace, for ui.perfetto.dev: a process with the predicted lanes of all ranks, and below
it one with the measured lanes. Both count from the same moment: parameters gathered, microbatches begin.

Format: JSON object of the Trace Event Format, complete events (``ph: X``), times in microseconds. A slice of another
lies within it: forward and backward within their measured microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.drift import planned_span_s, planned_times
from planner.explain import group_names, groups_by_rank
from planner.measured import MeasuredStep, MicrobatchTime
from planner.plan import StepPlan
from planner.units import MICROSECONDS_PER_S

PREDICTED, MEASURED = 0, 1
_PROCESSES = {PREDICTED: "predicted", MEASURED: "measured"}


def step_trace(plan: StepPlan, measured: MeasuredStep | None) -> dict[str, Any]:
    """The value to write with ``json.dumps``. ``measured`` None: the step was not recorded, predicted lanes only."""
    zero_s = max((rank.gather_s for rank in measured.ranks), default=0.0) if measured is not None else 0.0
    events = [*_names(plan.num_ranks, measured is not None), *_predicted_events(plan, zero_s)]
    if measured is not None:
        events.extend(_measured_events(plan, measured, zero_s))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"step": str(plan.step), "strategy": plan.strategy},
    }


def _names(num_ranks: int, has_measured: bool) -> Iterator[dict[str, Any]]:
    for process in (PREDICTED, MEASURED) if has_measured else (PREDICTED,):
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": _PROCESSES[process]}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
        for rank in range(num_ranks):
            place = {"pid": process, "tid": rank}
            yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}}
            yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": rank}}


def _predicted_events(plan: StepPlan, zero_s: float) -> Iterator[dict[str, Any]]:
    for index, (start_s, stop_s) in enumerate(planned_times(plan)):
        groups = groups_by_rank(plan.microbatches[index])
        for rank in plan.microbatches[index].ranks:
            yield _slice(
                PREDICTED, rank, group_names(groups[rank]), "microbatch", zero_s + start_s, stop_s - start_s,
                _details(plan, index),
            )
    last_s = planned_span_s(plan)
    for rank in range(plan.num_ranks):
        yield _slice(
            PREDICTED, rank, "gather, reduce, optimizer", "step", zero_s + last_s, plan.predicted_s - last_s,
            {"step": plan.step},
        )


def _measured_events(plan: StepPlan, measured: MeasuredStep, zero_s: float) -> Iterator[dict[str, Any]]:
    groups = [groups_by_rank(microbatch) for microbatch in plan.microbatches]
    for rank, times in enumerate(measured.ranks):
        step = {"step": plan.step}
        yield _slice(MEASURED, rank, "gather", "step", zero_s - times.gather_s, times.gather_s, step)
        for each in times.microbatches:
            start_s, seconds = zero_s + each.start_s, each.stop_s - each.start_s
            details = {**_details(plan, each.microbatch), **_parts(each)}
            yield _slice(
                MEASURED, rank, group_names(groups[each.microbatch][rank]), "microbatch", start_s, seconds, details
            )
            forward_s, backward_s = each.middle_s - each.start_s, each.stop_s - each.middle_s
            waits = {"wait_s": each.forward_wait_s}, {"wait_s": each.backward_wait_s}
            yield _slice(MEASURED, rank, "forward", "pass", start_s, forward_s, waits[0])
            yield _slice(MEASURED, rank, "backward", "pass", zero_s + each.middle_s, backward_s, waits[1])
        yield _slice(MEASURED, rank, "reduce", "step", zero_s + times.finish_s, times.reduce_s, step)
    first = measured.ranks[0]
    yield _slice(
        MEASURED, 0, "update", "step", zero_s + first.finish_s + first.reduce_s, measured.update_s, {"step": plan.step}
    )


def _details(plan: StepPlan, index: int) -> dict[str, Any]:
    microbatch = plan.microbatches[index]
    sizes = [plan.sequences[sequence].num_tokens for group in microbatch.groups for sequence in group.sequences]
    return {
        "microbatch": index, "num_ranks": len(microbatch.ranks), "num_sequences": len(sizes),
        "num_tokens": sum(sizes), "longest_tokens": max(sizes), "predicted_s": microbatch.predicted_s,
    }


def _parts(each: MicrobatchTime) -> dict[str, float]:
    return {
        "measured_s": each.stop_s - each.start_s, "compute_s": each.compute_s, "forward_wait_s": each.forward_wait_s,
        "backward_wait_s": each.backward_wait_s,
    }


def _slice(
    process: int, rank: int, name: str, category: str, start_s: float, seconds: float, details: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": category, "pid": process, "tid": rank, "ts": start_s * MICROSECONDS_PER_S,
        "dur": seconds * MICROSECONDS_PER_S, "args": details,
    }
