"""In which order the stages of pipelines run forwards and backwards, where microbatches differ in size and number.

Every data rank is a pipeline of ``num_stages`` stages. A microbatch passes through the stages of all of its ranks in
step, because at each stage its ranks exchange attention. Ranks may run different numbers of microbatches (ByteScale's
PP case, arXiv 2502.21231, section on PP-Balance), so the usual tables for 1F1B do not fit. Instead the actions are
list-scheduled: of those that could run, the one that can start first is next, and a forward before a backward where
both can start at once. A stage holds at most as many microbatches between forward and backward as there are stages
from it to the last one (1F1B's limit).

A stage that comes free often finds a forward and a backward waiting. The forward goes first because the stages after
it wait for it; the limit then makes the backward next, so equal microbatches run as in 1F1B. Against the backward
first, on six kinds of 300 random steps each (2 to 8 stages, unequal microbatches, most of them shared by several
ranks), steps are 2.5 to 5 % shorter in the mean and 17 % at most; of a hundred, two are longer, by 7 % at most. On one
pipeline they take 0.4 to 1 % longer than in 1F1B, whose fixed alternation can deadlock where microbatches are shared.

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
    """One microbatch as the pipelines see it. ``seconds``: forward and backward of one stage; ``forward_share``: of
    them."""

    ranks: tuple[int, ...]
    seconds: float
    forward_share: float = FORWARD_SHARE


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
    """Actions are numbered by direction, microbatch and stage, forwards first: of two that can start at once, the one
    with the lower number is next."""

    def __init__(self, work: SequenceOf[StageWork], num_stages: int) -> None:
        self.num_work, self.num_stages = len(work), num_stages
        self.ranks = [item.ranks for item in work] * 2  # of the forwards, then of the backwards
        self.seconds = [item.seconds * item.forward_share for item in work]
        self.seconds += [item.seconds * (1 - item.forward_share) for item in work]
        num_actions = 2 * len(work) * num_stages
        self.followers: list[list[int]] = [[] for _ in range(num_actions)]
        self.num_awaited = [0] * num_actions
        self.ready_s = [0.0] * num_actions  # when the last action that it waits for ends
        earlier: dict[int, list[int]] = {}  # microbatches of each rank
        for microbatch, item in enumerate(work):
            own = [earlier.setdefault(rank, []) for rank in item.ranks]
            self._link(microbatch, own)
            for microbatches in own:
                microbatches.append(microbatch)
        self.free_s = [dict.fromkeys(earlier, 0.0) for _ in range(num_stages)]

    def _number(self, microbatch: int, stage: int, *, backward: bool) -> int:
        return (backward * self.num_work + microbatch) * self.num_stages + stage

    def _link(self, microbatch: int, earlier: SequenceOf[SequenceOf[int]]) -> None:
        """Let the microbatch's actions wait for what must come before them; ``earlier``: the microbatches before it on
        each of its ranks."""
        before = [{own[-back] for own in earlier if len(own) >= back} for back in range(1, self.num_stages + 1)]
        for stage in range(self.num_stages):
            forward = self._number(microbatch, stage, backward=False)
            backward = self._number(microbatch, stage, backward=True)
            for other in before[0]:
                self._wait(forward, self._number(other, stage, backward=False))
                self._wait(backward, self._number(other, stage, backward=True))
            for other in before[self.num_stages - stage - 1]:  # the limit
                self._wait(forward, self._number(other, stage, backward=True))
            if stage:
                self._wait(forward, forward - 1)
            self._wait(backward, backward + 1 if stage < self.num_stages - 1 else forward)

    def _wait(self, action: int, awaited: int) -> None:
        self.followers[awaited].append(action)
        self.num_awaited[action] += 1

    def run(self) -> tuple[StageAction, ...]:
        order: list[StageAction] = []
        heap = [(0.0, action) for action, num_awaited in enumerate(self.num_awaited) if not num_awaited]
        while heap:
            offered_s, action = heapq.heappop(heap)
            start_s = self._start_s(action)
            if start_s > offered_s:  # its ranks have been given other work since
                heapq.heappush(heap, (start_s, action))
                continue
            order.append(self._take(action, start_s))
            for follower in self.followers[action]:
                self.num_awaited[follower] -= 1
                self.ready_s[follower] = max(self.ready_s[follower], order[-1].stop_s)
                if not self.num_awaited[follower]:
                    heapq.heappush(heap, (self._start_s(follower), follower))
        return tuple(order)

    def _start_s(self, action: int) -> float:
        place, stage = divmod(action, self.num_stages)
        free_s = self.free_s[stage]
        return max(self.ready_s[action], *[free_s[rank] for rank in self.ranks[place]])

    def _take(self, action: int, start_s: float) -> StageAction:
        place, stage = divmod(action, self.num_stages)
        backward, microbatch = divmod(place, self.num_work)
        stop_s = start_s + self.seconds[place]
        self.free_s[stage].update(dict.fromkeys(self.ranks[place], stop_s))
        return StageAction(
            microbatch=microbatch, stage=stage, backward=backward > 0, start_s=start_s, stop_s=stop_s
        )
