"""Longhaul's own strategy: one search over group size, attention kind, packing, placement and order.

A plan is a list of microbatches, one group each, that ranks work off without barriers. The search aims at a target time
between the proven bound and the best plan so far and builds a whole schedule for it in milliseconds
(``planner.strategies.adaptive.build``): for each long sequence the cheapest shape, any integer degree, that is quick
enough; packing, placement and order follow from the target. It builds in two ways, for scarce time and for scarce
memory, and bisects the target of each. Under zero3 all ranks wait for each other, and rounds are built instead
(``planner.strategies.adaptive.lockstep``). All is counted, nothing depends on the clock but the guard of
``limits.time_limit_s``.

Then the published strategies get their chance (``planner.strategies.adaptive.rivals``): if one has the better plan,
that is the plan. With pipeline stages the search itself knows nothing of them; what fills the pipelines comes from
PP-Balance, tried there with microbatches of several sizes.

What is searched over, memory policies included, is decided before (``planner.strategies.adaptive.space``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from planner.plan import Sharding, SolveStatus
from planner.pricing.assemble import Found, GroupChoice, MicrobatchChoice, makespan_s
from planner.pricing.problem import StepProblem
from planner.strategies.adaptive.build import Draft, build_draft
from planner.strategies.adaptive.effort import CLOSE_ENOUGH, MAX_BUILDS, MIN_BUILDS, ROWS_AND_RANKS
from planner.strategies.adaptive.lockstep import plan_rounds
from planner.strategies.adaptive.priced_step import PricedStep
from planner.strategies.adaptive.rivals import beat_with_rivals
from planner.strategies.adaptive.space import Choice, SearchSpace, search_space
from planner.strategies.search.linear_balance import remap_bound_s
from planner.strategies.search.memory_policy import choose_policies


def plan_adaptive(problem: StepProblem) -> Found:
    """The strategy ``adaptive``. ``bound_s`` holds for every plan of the shapes, memory policies included, that are
    searched here (``planner.strategies.adaptive.space``), where no tokens are moved unless the plan found moves some.

    Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none.
    """
    deadline_s = time.perf_counter() + problem.limits.time_limit_s
    space = search_space(problem)
    groups, num_builds = _search(space, problem, deadline_s)
    found = Found(groups=groups, status=SolveStatus.FEASIBLE, bound_s=space.bound_s, note="")
    name, found, found_s = beat_with_rivals(found, plan_adaptive, problem, deadline_s)
    bound_s = remap_bound_s(problem, space.shapes) if any(found.moves) else space.bound_s
    proven = problem.is_proven(found_s, bound_s)
    return replace(
        found, status=SolveStatus.OPTIMAL if proven else SolveStatus.FEASIBLE, bound_s=bound_s,
        note=f"{f'{name} plan, ' if name else ''}adaptive, {num_builds} builds",
    )


def _search(space: SearchSpace, problem: StepProblem, deadline_s: float) -> tuple[tuple[MicrobatchChoice, ...], int]:
    """The best microbatches of all choices, and how many schedules were built."""
    size = len(problem.lengths) + problem.num_ranks
    max_builds = min(max(ROWS_AND_RANKS // size, MIN_BUILDS), MAX_BUILDS)
    num_whole = sum(not choice.in_chunks for choice in space.choices)
    max_builds = max(max_builds // max(num_whole, 1), MIN_BUILDS)
    searches: list[_Search] = []
    for choice in space.choices:
        if any(each.choice.in_chunks == choice.in_chunks and each.is_close for each in searches):
            continue  # those of one kind share a bound, so nothing is left to win
        searches.append(_Search(choice, PricedStep(problem, choice.shapes), deadline_s, max_builds))
        searches[-1].run(problem.cost.sharding)
    plans = [_choices(each, problem) for each in searches]
    best = plans[0] if len(plans) == 1 else min(plans, key=lambda groups: makespan_s(groups, problem))
    return best, sum(each.num_builds for each in searches)


@dataclass(slots=True)
class _Search:
    """The best draft of one choice of shapes so far, and how often one was built."""

    choice: Choice
    step: PricedStep
    deadline_s: float
    max_builds: int
    best: Draft | None = None
    num_builds: int = 0

    @property
    def is_close(self) -> bool:
        return self.best is not None and self.best.makespan_s <= self.choice.bound_s * (1 + CLOSE_ENOUGH)

    @property
    def is_done(self) -> bool:
        if self.best is None:
            return False
        return self.num_builds >= self.max_builds or self.is_close or time.perf_counter() > self.deadline_s

    def run(self, sharding: Sharding) -> None:
        if sharding is Sharding.ZERO3:
            self.best, self.num_builds = plan_rounds(self.step, self.max_builds, self.deadline_s)
            return
        bound_s = self.choice.bound_s
        found = sorted((self.build(bound_s, packed), packed) for packed in (False, True) if not self.is_done)
        for number, (reached_s, packed) in enumerate(found):
            self.bisect(packed, reached_s, -(-(self.max_builds - self.num_builds) // (len(found) - number)))

    def bisect(self, packed: bool, reached_s: float, num_builds: int) -> None:
        """Aim lower and lower as long as the aim is met, higher where it is not."""
        low_s, high_s = self.choice.bound_s, reached_s
        for _ in range(num_builds):
            if self.is_done:
                return
            aim_s = (low_s + high_s) / 2
            reached_s = self.build(aim_s, packed)
            if reached_s <= aim_s * (1 + CLOSE_ENOUGH):
                high_s = reached_s
            else:
                low_s, high_s = aim_s, min(high_s, reached_s)

    def build(self, aim_s: float, packed: bool) -> float:
        """The makespan of a schedule for this target."""
        draft = build_draft(self.step, aim_s, packed=packed)
        self.num_builds += 1
        if self.best is None or draft.makespan_s < self.best.makespan_s:
            self.best = draft
        return draft.makespan_s


def _choices(search: _Search, problem: StepProblem) -> tuple[MicrobatchChoice, ...]:
    """The draft's microbatches, each with the mildest memory policy that fits."""
    assert search.best is not None
    groups = []
    for batch in search.best.batches:
        shape = search.step.shapes[batch.column]
        ranks = tuple(range(batch.first_rank, batch.first_rank + batch.degree))
        sequences = tuple(sorted(search.step.order[row] for row in batch.rows))
        groups.append((shape, GroupChoice(shape.kind, ranks, sequences)))
    return choose_policies(groups, problem)
