"""In which order the stages of pipelines run forwards and backwards, where microbatches differ in size and number.

Every data rank is a pipeline of ``num_stages`` stages. A microbatch passes through the stages of all of its ranks in
step, because at each stage its ranks exchange attention. Ranks may run different numbers of microbatches (ByteScale's
PP case, arXiv 2502.21231, section on PP-Balance), so the usual tables for 1F1B do not fit. Instead the actions are
list-scheduled: whatever can start first does, a backward before a forward, and a stage holds at most as many
microbatches between forward and backward as there are stages from it to the last one (1F1B's limit).

The result is one total order of all actions. An action comes after everything it waits for: the stage before (after)
it, and on each of its ranks all earlier forwards (backwards) of the stage. So when every (rank, stage) runs its
actions in this order and sends without waiting, nothing can deadlock: the first action not yet done in the order can
always run.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.errors import PlanError

FORWARD_SHARE = 1 / 3
"""Of a microbatch's seconds: a backward computes twice what a forward does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """One microbatch as the pipelines see it. ``seconds``: forward and backward of one stage."""

    ranks: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAction:
    """The forward or backward of a microbatch (its place in the plan) on one stage of all of its ranks."""

    microbatch: int
    stage: int
    backward: bool
    start_s: float
    stop_s: float


def pipeline_order(work: SequenceOf[StageWork], *, num_stages: int) -> tuple[StageAction, ...]:
    """All actions of a step, in one total order that every rank follows; start times never fall along it.

    Microbatches keep the plan's order on every rank. Raises PlanError where there is not at least one stage.
    """
    if num_stages < 1:
        raise PlanError(f"a pipeline needs at least 1 stage, got {num_stages}")
    return _Scheduler(work, num_stages).run()


def rank_actions(
    order: SequenceOf[StageAction], work: SequenceOf[StageWork], *, rank: int, stage: int
) -> tuple[StageAction, ...]:
    """The actions of one rank's stage, in order."""
    return tuple(action for action in order if action.stage == stage and rank in work[action.microbatch].ranks)


class _Scheduler:
    """``next_place[direction][rank, stage]``: how many of the rank's microbatches have started that direction there."""

    def __init__(self, work: SequenceOf[StageWork], num_stages: int) -> None:
        self.work = work
        self.num_stages = num_stages
        self.queues: dict[int, list[int]] = {}
        for index, item in enumerate(work):
            for rank in item.ranks:
                self.queues.setdefault(rank, []).append(index)
        places = [(rank, stage) for rank in self.queues for stage in range(num_stages)]
        self.next_place = (dict.fromkeys(places, 0), dict.fromkeys(places, 0))
        self.free_s = dict.fromkeys(places, 0.0)
        self.done_s: dict[tuple[int, int, bool], float] = {}
        self.heap: list[tuple[float, bool, int, int]] = []  # start, is forward, microbatch, stage
        self.waiting: set[tuple[int, int, bool]] = set()

    def run(self) -> tuple[StageAction, ...]:
        order: list[StageAction] = []
        for queue in self.queues.values():
            self._offer(queue[0], 0, backward=False)
        while self.heap:
            offered_s, is_forward, microbatch, stage = heapq.heappop(self.heap)
            start_s = self._start_s(microbatch, stage, not is_forward)
            if start_s > offered_s:  # its ranks have been given other work since
                heapq.heappush(self.heap, (start_s, is_forward, microbatch, stage))
            else:
                order.append(self._take(microbatch, stage, not is_forward, start_s))
        return tuple(order)

    def _take(self, microbatch: int, stage: int, backward: bool, start_s: float) -> StageAction:
        item = self.work[microbatch]
        stop_s = start_s + item.seconds * ((1 - FORWARD_SHARE) if backward else FORWARD_SHARE)
        self.waiting.discard((microbatch, stage, backward))
        self.done_s[microbatch, stage, backward] = stop_s
        for rank in item.ranks:
            self.free_s[rank, stage] = stop_s
            self.next_place[backward][rank, stage] += 1
        following = stage - 1 if backward else stage + 1
        if 0 <= following < self.num_stages:
            self._offer(microbatch, following, backward)
        elif not backward:
            self._offer(microbatch, stage, backward=True)
        for rank in item.ranks:
            for direction in (False, True):
                self._offer_next(rank, stage, direction)
        return StageAction(microbatch=microbatch, stage=stage, backward=backward, start_s=start_s, stop_s=stop_s)

    def _offer_next(self, rank: int, stage: int, backward: bool) -> None:
        place, queue = self.next_place[backward][rank, stage], self.queues[rank]
        if place < len(queue):
            self._offer(queue[place], stage, backward)

    def _offer(self, microbatch: int, stage: int, backward: bool) -> None:
        key = (microbatch, stage, backward)
        if key not in self.waiting and key not in self.done_s and self._ready(microbatch, stage, backward):
            self.waiting.add(key)
            heapq.heappush(self.heap, (self._start_s(microbatch, stage, backward), not backward, microbatch, stage))

    def _ready(self, microbatch: int, stage: int, backward: bool) -> bool:
        before = self._before(microbatch, stage, backward)
        if before is not None and before not in self.done_s:
            return False
        for rank in self.work[microbatch].ranks:
            started = self.next_place[backward][rank, stage]
            if self.queues[rank][started] != microbatch:
                return False
            if not backward and started - self.next_place[True][rank, stage] >= self.num_stages - stage:
                return False
        return True

    def _before(self, microbatch: int, stage: int, backward: bool) -> tuple[int, int, bool] | None:
        """The action of the same microbatch that this one waits for."""
        if not backward:
            return (microbatch, stage - 1, False) if stage else None
        last = stage == self.num_stages - 1
        return (microbatch, stage, False) if last else (microbatch, stage + 1, True)

    def _start_s(self, microbatch: int, stage: int, backward: bool) -> float:
        before = self._before(microbatch, stage, backward)
        ready_s = self.done_s[before] if before is not None else 0.0
        return max(ready_s, *(self.free_s[rank, stage] for rank in self.work[microbatch].ranks))


def peak_tokens_in_flight(actions: SequenceOf[StageAction], num_tokens: SequenceOf[int]) -> int:
    """The most tokens one rank's stage holds between forwards and backwards at once. ``actions``: that stage's, in
    order; ``num_tokens[i]``: tokens the rank holds of microbatch i."""
    held = peak = 0
    for action in actions:
        held += -num_tokens[action.microbatch] if action.backward else num_tokens[action.microbatch]
        peak = max(peak, held)
    return peak
