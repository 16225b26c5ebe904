"""When each microbatch of a step runs: without barriers, in lockstep rounds, or through the stages of pipelines.

- *Free* (``gather_once``): a microbatch starts as soon as all of its ranks are free.
- *Lockstep* (``zero3``): all ranks go through ``planner.pricing.lockstep``'s rounds side by side, and a round lasts as
  long as its slowest microbatch. A rank without work runs an empty microbatch, which needs no price: it takes a fixed
  time only, which the microbatches beside it take as well.
- *Stages*: forwards and backwards run in ``planner.pricing.pipeline_order``'s order; seconds are those of one stage.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.errors import PlanError
from planner.plan import Sharding
from planner.pricing.lockstep import lockstep_rounds
from planner.pricing.pipeline_order import StageWork, pipeline_order


@dataclass(frozen=True, slots=True)
class Pass:
    """A microbatch (its place in the plan) runs on all of its ranks; with pipeline stages, on their first stage.

    ``holds``: activations are held from the start of this pass on. ``frees``: they are freed at its end. A pass of
    forward and backward together does both.
    """

    microbatch: int
    start_s: float
    stop_s: float
    holds: bool = True
    frees: bool = True


def play(work: SequenceOf[StageWork], *, sharding: Sharding, num_stages: int) -> tuple[Pass, ...]:
    """All passes of a step, so ordered that start times never fall on any rank. The step ends with the last of them:
    a backward ends on the first stage.

    Raises PlanError for ``zero3`` with stages: pipelines do not run in step, so they cannot share gathers.
    """
    if num_stages > 1:
        if sharding is Sharding.ZERO3:
            raise PlanError(f"sharding {sharding} cannot run in pipeline stages")
        return tuple(
            Pass(action.microbatch, action.start_s, action.stop_s, not action.backward, action.backward)
            for action in pipeline_order(work, num_stages=num_stages)
            if action.stage == 0
        )
    return _in_lockstep(work) if sharding is Sharding.ZERO3 else _free(work)


def _free(work: SequenceOf[StageWork]) -> tuple[Pass, ...]:
    free_s: dict[int, float] = {}
    passes = []
    for index, item in enumerate(work):
        start_s = max(free_s.get(rank, 0.0) for rank in item.ranks)
        stop_s = start_s + item.seconds
        free_s.update(dict.fromkeys(item.ranks, stop_s))
        passes.append(Pass(index, start_s, stop_s))
    return tuple(passes)


def _in_lockstep(work: SequenceOf[StageWork]) -> tuple[Pass, ...]:
    passes = []
    start_s = 0.0
    for members in lockstep_rounds([item.ranks for item in work]):
        passes += [Pass(index, start_s, start_s + work[index].seconds) for index in members]
        start_s += max(work[index].seconds for index in members)
    return tuple(passes)
