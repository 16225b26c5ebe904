"""One executed step as a Chrome trace for ui.perfetto.dev: a process with the predicted lanes of all ranks and another
with the measured lanes. Both start at the same moment: parameters gathered, microbatches begin. If the step's copies of
activations were recorded, further lanes below each measured rank show its layers, the copies out and back and the
waiting for them; lanes below each predicted rank show the copies of the plan's policies.

Format: JSON object of the Trace Event Format, complete events (``ph: X``), times in microseconds. Slices are nested:
forward and backward within their measured microbatch, recompute within a layer's backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.cost.model import CostModel
from planner.measured.copy_times import BACK, LANES, LAYERS, OUT, WAIT, Interval, StepLanes
from planner.measured.drift import planned_passes, planned_span_s, planned_times
from planner.measured.step_times import MeasuredStep, MicrobatchTime
from planner.pages.explain import group_names, groups_by_rank
from planner.pages.policy_words import policy_name
from planner.pages.trace_events import complete_event, name_process, name_thread
from planner.plan import StepPlan
from planner.pricing.microbatch import price_microbatch
from planner.pricing.simulate import step_lengths

PREDICTED, MEASURED = 0, 1
_PROCESSES = {PREDICTED: "predicted", MEASURED: "measured"}
_LANE_NAMES = {LAYERS: "layers", OUT: "copies out", BACK: "copies back", WAIT: "waiting for copies"}
LANES_PER_RANK = 1 + len(LANES)
"""Threads per rank if its copies are shown: the rank itself and the lanes below it."""


def step_trace(
    plan: StepPlan, measured: MeasuredStep | None, lanes: StepLanes | None = None, cost: CostModel | None = None
) -> dict[str, Any]:
    """The trace as a value for ``json.dumps``. ``measured`` None: the step was not recorded, only predicted lanes.
    ``lanes``: times of its layers and copies, if any. ``cost``: the plan's cost model, for the copies that it
    predicts."""
    zero_s = max((rank.gather_s for rank in measured.ranks), default=0.0) if measured is not None else 0.0
    copies = {PREDICTED: _predicted_copies(plan, cost), MEASURED: _measured_lanes(measured, lanes)}
    stride = LANES_PER_RANK if any(copies.values()) else 1
    events = list(_names(plan.num_ranks, measured is not None, copies, stride))
    events.extend(_predicted_events(plan, zero_s, stride))
    if measured is not None:
        events.extend(_measured_events(plan, measured, zero_s, stride))
    for process, by_rank in copies.items():
        for rank, intervals in by_rank.items():
            events.extend(_interval_event(each, process, rank * stride, zero_s) for each in intervals)
    about = {"step": str(plan.step), "strategy": plan.strategy}
    num_left_out = sum(rank.num_left_out for rank in lanes.ranks) if lanes is not None else 0
    if num_left_out:
        about["lanes"] = f"{num_left_out} layers and copies, the last ones of their ranks, were not recorded"
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _names(
    num_ranks: int, has_measured: bool, copies: dict[int, dict[int, tuple[Interval, ...]]], stride: int
) -> Iterator[dict[str, Any]]:
    for process in (PREDICTED, MEASURED) if has_measured else (PREDICTED,):
        yield from name_process(process, _PROCESSES[process])
        for rank in range(num_ranks):
            yield from name_thread(process, rank * stride, f"rank {rank}")
            used = {each.lane for each in copies[process].get(rank, ())}
            for place, lane in enumerate(LANES):
                if lane in used:
                    yield from name_thread(process, rank * stride + 1 + place, f"rank {rank}: {_LANE_NAMES[lane]}")


def _measured_lanes(measured: MeasuredStep | None, lanes: StepLanes | None) -> dict[int, tuple[Interval, ...]]:
    if measured is None or lanes is None:
        return {}
    return {rank.rank: rank.intervals for rank in lanes.ranks if rank.intervals}


def _predicted_copies(plan: StepPlan, cost: CostModel | None) -> dict[int, tuple[Interval, ...]]:
    """By rank: copies of what its microbatches swap, out from their start on and back until their end, at the rate of
    the plan's cost model."""
    if cost is None or cost.activation is None or plan.num_stages > 1:
        return {}
    lengths, found = step_lengths(plan), dict[int, list[Interval]]()
    for index, (start_s, stop_s) in enumerate(planned_times(plan)):
        microbatch = plan.microbatches[index]
        if microbatch.memory.swap_fraction == 0:
            continue
        price = price_microbatch(microbatch, lengths, cost)
        for rank, num_tokens in zip(price.ranks, price.rank_tokens, strict=True):
            num_bytes = cost.host_bytes(num_tokens, microbatch.memory)
            copy_s = min(num_bytes / cost.activation.copy_bytes_per_s, stop_s - start_s)
            name = f"microbatch {index}"
            found.setdefault(rank, []).extend((
                Interval(lane=OUT, name=name, start_s=start_s, stop_s=start_s + copy_s, num_bytes=num_bytes),
                Interval(lane=BACK, name=name, start_s=stop_s - copy_s, stop_s=stop_s, num_bytes=num_bytes),
            ))
    return {rank: tuple(intervals) for rank, intervals in found.items()}


def _interval_event(each: Interval, process: int, thread: int, zero_s: float) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if each.lane in (OUT, BACK):
        seconds = each.stop_s - each.start_s
        args = {"bytes": each.num_bytes, "bytes_per_s": round(each.num_bytes / seconds) if seconds > 0 else None}
    return complete_event(
        each.name, _LANE_NAMES[each.lane], process=process, thread=thread + 1 + LANES.index(each.lane),
        start_s=zero_s + each.start_s, stop_s=zero_s + each.stop_s, args=args,
    )


def _predicted_events(plan: StepPlan, zero_s: float, stride: int) -> Iterator[dict[str, Any]]:
    """With pipeline stages forward and backward are separate, because other microbatches run between them."""
    for each in planned_passes(plan):
        microbatch = plan.microbatches[each.microbatch]
        groups = groups_by_rank(microbatch)
        part = "" if each.holds and each.frees else ", forward" if each.holds else ", backward"
        for rank in microbatch.ranks:
            yield complete_event(
                group_names(groups[rank]) + part, "microbatch", process=PREDICTED, thread=rank * stride,
                start_s=zero_s + each.start_s, stop_s=zero_s + each.stop_s, args=_details(plan, each.microbatch),
            )
    for rank in range(plan.num_ranks):
        yield complete_event(
            "gather, reduce, optimizer", "step", process=PREDICTED, thread=rank * stride,
            start_s=zero_s + planned_span_s(plan), stop_s=zero_s + plan.predicted_s, args={"step": plan.step},
        )


def _measured_events(plan: StepPlan, measured: MeasuredStep, zero_s: float, stride: int) -> Iterator[dict[str, Any]]:
    """``zero_s``: time of gathered parameters on the trace's clock; all other times count from it."""

    def event(rank: int, name: str, category: str, start_s: float, stop_s: float, args: dict[str, Any]) -> Any:
        return complete_event(
            name, category, process=MEASURED, thread=rank * stride, start_s=zero_s + start_s, stop_s=zero_s + stop_s,
            args=args,
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
        "memory": policy_name(microbatch.memory),
    }


def _parts(each: MicrobatchTime) -> dict[str, float]:
    return {
        "measured_s": each.stop_s - each.start_s, "compute_s": each.compute_s, "forward_wait_s": each.forward_wait_s,
        "backward_wait_s": each.backward_wait_s,
    }
