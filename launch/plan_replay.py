"""Decides which steps of ``longhaul plan`` are replayed: all of the best strategy, the first one of the others."""

from __future__ import annotations

from dataclasses import replace

from launch.plan_job import Job
from planner.errors import SpecError
from planner.pages.planned_step import Candidate, PlannedStep, best_candidate
from planner.plan import Sharding
from planner.units import format_seconds

MAX_COMPARING_S, MAX_REPLAYING_S = 2.0, 60.0
"""Largest estimated seconds for replaying the first steps of other strategies, and all steps of the best one."""


def with_replays(job: Job, candidates: tuple[Candidate, ...], *, draw: bool) -> tuple[Job, tuple[Candidate, ...]]:
    """The candidates with their replays, and the job with the replay's sources, or with a remark that says what was not
    replayed and why. Nothing is replayed for a measured cost model. ``draw``: keep the best strategy's lanes for a
    trace."""
    from planner.replay.operations import load_curves, scale_note
    from planner.replay.step import MAX_RANKS, SCHEME, ZERO3_SCHEME, estimated_s, replay_step

    best = best_candidate(candidates)
    if job.is_measured or best is None:
        return job, candidates
    if job.num_ranks > MAX_RANKS:
        remark = f"not replayed: {job.num_ranks} ranks, the replay takes at most {MAX_RANKS}"
        return _remarked(job, remark), candidates
    best_s = sum(estimated_s(step.plan) for step in best.steps)
    if best_s > MAX_REPLAYING_S:
        return _remarked(job, f"not replayed: it would take about {format_seconds(best_s)}"), candidates
    curves = load_curves()

    def replayed(step: PlannedStep, draw: bool) -> PlannedStep:
        replay = replay_step(
            step.plan, job.cluster, job.model, job.cost.memory, tensor_parallel=job.grid.tensor_parallel,
            curves=curves, draw=draw,
        )
        return replace(step, replay=replay)

    try:
        steps = tuple(replayed(step, draw) for step in best.steps)
    except SpecError as error:
        return _remarked(job, f"not replayed: {error}"), candidates
    others = [found for found in candidates if found.steps and found is not best]
    others_s = sum(estimated_s(found.steps[0].plan) for found in others)
    is_compared = others_s <= MAX_COMPARING_S
    if not is_compared:
        job = _remarked(job, (
            f"of the strategies only {best.strategy} is replayed: the first step of the others would take about "
            f"{format_seconds(others_s)}; plan with one --strategy to replay it"
        ))
    note = scale_note(job.cluster, curves)
    sources = [("replay", SCHEME), *((f"replay, {part}", source) for part, source in curves.sources)]
    if job.cost.sharding is Sharding.ZERO3:
        sources.insert(1, ("replay", ZERO3_SCHEME))
    if note is not None:
        sources.append(("replay, device", note))

    def changed(found: Candidate) -> Candidate:
        if found is best:
            return replace(found, steps=steps)
        if not found.steps or not is_compared:
            return found
        return replace(found, steps=(replayed(found.steps[0], False), *found.steps[1:]))

    return replace(job, sources=(*job.sources, *sources)), tuple(map(changed, candidates))


def _remarked(job: Job, remark: str) -> Job:
    return replace(job, remarks=(*job.remarks, remark))
