"""Priced steps as a Chrome trace for ui.perfetto.dev: one process per node, one thread per rank, one event per
microbatch.

Format: JSON object of the Trace Event Format, complete events (``ph: X``) with times in microseconds. Steps follow one
another; each ends with the work that every rank does once per step (``step_fixed_s``: gather, reduce, optimizer).

Replayed steps have further processes: one for each of a few ranks, with a thread per lane (compute, messages, NIC,
copies to the host) of ``planner.replay.step``. A step then takes as long as the longer of prediction and replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

from planner.inputs.cluster import ClusterSpec
from planner.pages.explain import group_names, groups_by_rank
from planner.pages.planned_step import PlannedStep
from planner.pages.trace_events import complete_event, name_process, name_thread
from planner.plan import Microbatch
from planner.pricing.simulate import step_lengths
from planner.replay.lanes import LANES, MAX_DRAWN_RANKS, MAX_LANE_EVENTS, LaneEvent

_LANE_NAMES = {"compute": "compute", "exchange": "messages", "nic": "NIC (between nodes)", "copy": "copies"}


def chrome_trace(steps: SequenceOf[PlannedStep], cluster: ClusterSpec) -> dict[str, Any]:
    """The trace as a value for ``json.dumps``. Data rank r is device r of the cluster."""
    num_ranks = steps[0].plan.num_ranks
    events = list(_names(num_ranks, cluster))
    start_s = 0.0
    process = {rank: cluster.num_nodes + place for place, rank in enumerate(_replayed_ranks(steps))}
    events.extend(_lane_names(process))
    for step in steps:
        events.extend(_step_events(step, cluster, start_s))
        if step.replay is not None:
            events.extend(_lane_event(lane, process[lane.rank], step, start_s) for lane in step.replay.lanes)
        start_s += max(step.simulation.step_s, step.replay.step_s if step.replay is not None else 0.0)
    about = {"cluster": cluster.name, "strategy": steps[0].plan.strategy, "simulated": "true"}
    if process:
        about["replay"] = (
            f"{len(process)} of {num_ranks} ranks (at most {MAX_DRAWN_RANKS}); of each microbatch the first layer, "
            "forward and backward, round by round, the others as one event; at most "
            f"{MAX_LANE_EVENTS} events per step; later ones are left out"
        )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _replayed_ranks(steps: SequenceOf[PlannedStep]) -> list[int]:
    return sorted({lane.rank for step in steps if step.replay is not None for lane in step.replay.lanes})


def _lane_names(process: dict[int, int]) -> Iterator[dict[str, Any]]:
    for rank, pid in process.items():
        yield from name_process(pid, f"replay of rank {rank}")
        for place, lane in enumerate(LANES):
            yield from name_thread(pid, place, _LANE_NAMES[lane])


def _lane_event(lane: LaneEvent, pid: int, step: PlannedStep, start_s: float) -> dict[str, Any]:
    return complete_event(
        lane.name, f"replay {lane.lane}", process=pid, thread=LANES.index(lane.lane), start_s=start_s + lane.start_s,
        stop_s=start_s + lane.stop_s, args={"step": step.plan.step},
    )


def _names(num_ranks: int, cluster: ClusterSpec) -> Iterator[dict[str, Any]]:
    for node in range(cluster.node_of(num_ranks - 1) + 1):
        yield from name_process(node, f"node {node}")
    for rank in range(num_ranks):
        yield from name_thread(cluster.node_of(rank), rank, f"rank {rank}")


def _step_events(step: PlannedStep, cluster: ClusterSpec, start_s: float) -> Iterator[dict[str, Any]]:
    plan, simulation = step.plan, step.simulation
    lengths = step_lengths(plan)
    groups = [groups_by_rank(microbatch) for microbatch in plan.microbatches]
    details = [_details(index, microbatch, lengths) for index, microbatch in enumerate(plan.microbatches)]
    for event in simulation.events:
        yield complete_event(
            group_names(groups[event.microbatch][event.rank]), "microbatch", process=cluster.node_of(event.rank),
            thread=event.rank, start_s=start_s + event.start_s, stop_s=start_s + event.stop_s,
            args={"step": plan.step, **details[event.microbatch]},
        )
    last_s = max(simulation.rank_finish_s)
    for rank in range(plan.num_ranks):
        yield complete_event(
            "gather, reduce, optimizer", "step", process=cluster.node_of(rank), thread=rank,
            start_s=start_s + last_s, stop_s=start_s + simulation.step_s, args={"step": plan.step},
        )


def _details(index: int, microbatch: Microbatch, lengths: SequenceOf[int]) -> dict[str, Any]:
    """The details shown for every event of one microbatch."""
    sizes = [lengths[sequence] for group in microbatch.groups for sequence in group.sequences]
    return {
        "microbatch": index,
        "num_ranks": len(microbatch.ranks),
        "num_sequences": len(sizes),
        "num_tokens": sum(sizes),
        "longest_tokens": max(sizes),
        "peak_bytes": microbatch.peak_bytes,
    }
