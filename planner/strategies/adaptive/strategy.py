"""Longhaul's own strategy: one search over group size, attention kind, packing, placement and order.

A plan is a list of microbatches, one group each, that ranks work off without barriers, unless the sharding needs
them: under zero3 rounds are poured one after another (``adaptive_pour``), or made of what is built without barriers
and squeezed (``adaptive_rounds``), and sequences of the best change places (``adaptive_swap``). The search aims at a
target time between the proven bound and the best plan so far and builds a whole schedule for it in milliseconds
(``adaptive_build``): for each long sequence the cheapest shape, any integer degree, that is quick enough; packing,
placement and order follow from the target. It builds in two ways, for scarce time and for scarce memory, prices fixed
times in two ways, and bisects the target for the most promising ones. All is counted, nothing depends on the clock
but the guard of ``limits.time_limit_s``.

Then the published strategies get their chance (``adaptive_rivals``): if one has the better plan, that is the plan. With
pipeline stages the search itself knows nothing of them; what fills the pipelines comes from PP-Balance, tried there
with microbatches of several sizes.

What is searched over, memory policies included, is decided before (``adaptive_space``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from planner.errors import InfeasibleError
from planner.plan import AttentionKind, Sharding, SolveStatus
from planner.pricing.assemble import Found, GroupChoice, MicrobatchChoice, makespan_s
from planner.pricing.problem import StepProblem
from planner.strategies.adaptive.build import Draft, Target, build_draft
from planner.strategies.adaptive.lockstep import plan_rounds
from planner.strategies.adaptive.rivals import Match, best_rival
from planner.strategies.adaptive.space import search_space
from planner.strategies.adaptive.workshop import Workshop
from planner.strategies.search.bounds import settled_lengths
from planner.strategies.search.memory_policy import choose_policies
from planner.strategies.search.shapes import GroupShape

MAX_BUILDS = 12
MIN_BUILDS = 4
ROWS_AND_RANKS = 60_000  # builds times sequences and ranks: large steps get fewer builds
NUM_FINALISTS = 2
MEMORY_WEIGHTS = (0.0, 1.0)
CLOSE_ENOUGH = 1e-3  # of the makespan: no more builds
GOOD_ENOUGH = 1.5e-2  # of the makespan: no other way to share out fixed times is tried


@dataclass(slots=True)
class _Search:
    """The best draft so far, and how often one was built."""

    shop: Workshop
    bound_s: float
    deadline_s: float
    max_builds: int
    best: Draft | None = None
    num_builds: int = 0

    def build(self, target: Target) -> Draft:
        draft = build_draft(self.shop, target)
        self.num_builds += 1
        if self.best is None or draft.makespan_s < self.best.makespan_s:
            self.best = draft
        return draft

    @property
    def best_s(self) -> float:
        """Makespan of the best draft, infinite before the first build."""
        return float("inf") if self.best is None else self.best.makespan_s

    @property
    def done(self) -> bool:
        if self.best is None:
            return False
        spent = self.num_builds >= self.max_builds or time.perf_counter() > self.deadline_s
        return spent or self.within(CLOSE_ENOUGH)

    def within(self, gap: float) -> bool:
        return self.best is not None and self.best.makespan_s <= self.bound_s * (1 + gap)


def plan_adaptive(problem: StepProblem) -> Found:
    """The strategy ``adaptive``. ``bound_s`` holds for every plan of all
    shapes that the cost model prices and the limits allow here.

    Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none.
    """
    lengths, num_ranks, cost, limits = problem.lengths, problem.num_ranks, problem.cost, problem.limits
    deadline_s = time.perf_counter() + limits.time_limit_s
    space = search_space(problem)
    max_builds = min(max(ROWS_AND_RANKS // (len(lengths) + num_ranks), MIN_BUILDS), MAX_BUILDS)
    num_whole = sum(not choice.in_chunks for choice in space.choices)
    max_builds = max(max_builds // max(num_whole, 1), MIN_BUILDS)
    searches: dict[bool, list[_Search]] = {False: [], True: []}
    for choice in space.choices:
        like = searches[choice.in_chunks]
        if like and like[-1].within(CLOSE_ENOUGH):
            continue
        shop = _workshop(choice.shapes, problem)
        like.append(_Search(shop, choice.aim_s, deadline_s, max_builds))
        if cost.sharding is Sharding.ZERO3:
            like[-1].best, like[-1].num_builds = plan_rounds(shop, max_builds, deadline_s)
        else:
            _search(like[-1])
    found = [min(like, key=lambda search: search.best_s) for like in searches.values() if like]
    drafts = [(_choices(each, problem), each.best_s) for each in found]
    if space.has_policies or not cost.runs_free:  # policies milder than the shapes' may have made it faster
        drafts = [(groups, makespan_s(groups, problem)) for groups, _ in drafts]
    groups, beat_s = min(drafts, key=lambda draft: draft[1])
    match = Match(problem=problem, beat_s=beat_s, bound_s=space.bound_s, deadline_s=deadline_s)
    num_builds = sum(search.num_builds for like in searches.values() for search in like)
    found_s, note = match.beat_s, f"adaptive, {num_builds} builds"
    rival = best_rival(match)
    if rival is not None:
        groups, found_s, note = rival.groups, rival.makespan_s, f"{rival.name} plan, {note}"
    if space.has_policies and cost.num_stages > 1:  # the search knows no stages: what keeps everything may do better
        kept = _all_kept(match)
        if kept is not None and makespan_s(kept.groups, problem) < found_s:
            groups, note = kept.groups, f"all kept, {kept.note}"
            found_s = makespan_s(groups, problem)
    status = SolveStatus.OPTIMAL if problem.is_proven(found_s, space.bound_s) else SolveStatus.FEASIBLE
    return Found(groups=groups, status=status, bound_s=space.bound_s, note=note)


def _all_kept(match: Match) -> Found | None:
    """The plan without memory policies; None where that does not fit."""
    try:
        return plan_adaptive(match.in_time().keeping_all())
    except InfeasibleError:
        return None


def _workshop(shapes: tuple[GroupShape, ...], problem: StepProblem) -> Workshop:
    num_ranks, sizes = problem.num_ranks, np.asarray(problem.lengths, dtype=np.int64)
    settled = np.zeros(len(sizes), dtype=np.bool_)
    if shapes[0].kind is AttentionKind.LOCAL:
        settled = settled_lengths(sizes, np.ones(len(sizes)), shapes, shapes[0], num_ranks)
    return Workshop(problem.lengths, shapes, settled.tolist(), num_ranks=num_ranks, node_size=problem.node_size)


def _search(search: _Search) -> None:
    """Build for the bound in each way, then bisect the target of the best spread and the best packed way; where the
    first one is good already, of that one only."""
    bound_s = search.bound_s
    best: dict[bool, tuple[float, Target]] = {}
    for weight in MEMORY_WEIGHTS:
        for packed in (False, True):
            if search.done or (packed in best and search.within(GOOD_ENOUGH)):
                break
            way = Target(makespan_s=bound_s, alone_s=bound_s, memory_weight=weight, packed=packed)
            makespan_s = search.build(way).makespan_s
            if packed not in best or makespan_s < best[packed][0]:
                best[packed] = (makespan_s, way)
    finalists = sorted(best.values(), key=lambda item: (item[0], item[1].packed))
    if search.within(GOOD_ENOUGH):
        del finalists[1:]
    for number, (makespan_s, way) in enumerate(finalists):
        left = search.max_builds - search.num_builds
        _bisect(search, way, makespan_s, -(-left // (NUM_FINALISTS - number)))


def _bisect(search: _Search, way: Target, reached_s: float, num_builds: int) -> None:
    """Aim lower and lower as long as the aim is met, higher where it is not."""
    low_s, high_s = search.bound_s, reached_s
    for _ in range(num_builds):
        if search.done:
            return
        target_s = (low_s + high_s) / 2
        draft = search.build(replace(way, makespan_s=target_s, alone_s=target_s))
        if draft.makespan_s <= target_s * (1 + CLOSE_ENOUGH):
            high_s = draft.makespan_s
        else:
            low_s, high_s = target_s, min(high_s, draft.makespan_s)


def _choices(search: _Search, problem: StepProblem) -> tuple[MicrobatchChoice, ...]:
    assert search.best is not None
    groups = []
    for batch in search.best.batches:
        shape = search.shop.shapes[batch.column]
        ranks = tuple(range(batch.first_rank, batch.first_rank + batch.degree))
        groups.append((shape, GroupChoice(shape.kind, ranks, tuple(sorted(batch.rows)))))
    return choose_policies(groups, problem)
