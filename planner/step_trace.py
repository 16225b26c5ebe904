"""One executed step as a Chrome trace, for ui.perfetto.dev: a process with the predicted lanes of all ranks and another
with the measured lanes. Both count from the same moment: parameters gathered, microbatches begin.

Format: JSON object of the Trace Event Format, complete events (``ph: X``), times in microseconds. A slice of another
lies within it: forward and backward within their measured microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.drift import planned_passes, planned_span_s
from planner.explain import group_names, groups_by_rank
from planner.measured import MeasuredStep, MicrobatchTime
from planner.plan import StepPlan
from planner.trace_events import complete_event, name_process, name_thread

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
        yield from name_process(process, _PROCESSES[process])
        for rank in range(num_ranks):
            yield from name_thread(process, rank, f"rank {rank}")


def _predicted_events(plan: StepPlan, zero_s: float) -> Iterator[dict[str, Any]]:
    """With pipeline stages forward and backward stand apart: other microbatches run between them."""
    for each in planned_passes(plan):
        microbatch = plan.microbatches[each.microbatch]
        groups = groups_by_rank(microbatch)
        part = "" if each.holds and each.frees else ", forward" if each.holds else ", backward"
        for rank in microbatch.ranks:
            yield complete_event(
                group_names(groups[rank]) + part, "microbatch", process=PREDICTED, thread=rank,
                start_s=zero_s + each.start_s, stop_s=zero_s + each.stop_s, args=_details(plan, each.microbatch),
            )
    for rank in range(plan.num_ranks):
        yield complete_event(
            "gather, reduce, optimizer", "step", process=PREDICTED, thread=rank, start_s=zero_s + planned_span_s(plan),
            stop_s=zero_s + plan.predicted_s, args={"step": plan.step},
        )


def _measured_events(plan: StepPlan, measured: MeasuredStep, zero_s: float) -> Iterator[dict[str, Any]]:
    """``zero_s``: the moment of gathered parameters on the trace's clock; all other times count from it."""

    def event(rank: int, name: str, category: str, start_s: float, stop_s: float, args: dict[str, Any]) -> Any:
        return complete_event(
            name, category, process=MEASURED, thread=rank, start_s=zero_s + start_s, stop_s=zero_s + stop_s, args=args
        )

    groups = [groups_by_rank(microbatch) for microbatch in plan.microbatches]
    step = {"step": plan.step}
    for rank, times in enumerate(measured.ranks):
        yield event(rank, "gather", "step", -times.gather_s, 0.0, step)
        for each in times.microbatches:
            details = {**_details(plan, each.microbatch), **_parts(each)}
            name = group_names(groups[each.microbatch][rank])
            yield event(rank, name, "microbatch", each.start_s, each.stop_s, details)
            waits = {"wait_s": each.forward_wait_s}, {"wait_s": each.backward_wait_s}
            yield event(rank, "forward", "pass", each.start_s, each.middle_s, waits[0])
            yield event(rank, "backward", "pass", each.middle_s, each.stop_s, waits[1])
        yield event(rank, "reduce", "step", times.finish_s, times.finish_s + times.reduce_s, step)
    reduced_s = measured.ranks[0].finish_s + measured.ranks[0].reduce_s
    yield event(0, "update", "step", reduced_s, reduced_s + measured.update_s, step)


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
