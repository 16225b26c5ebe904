"""The published strategies as candidates for ``adaptive``: each one that might have the better plan is run.

A strategy is left out where a bound of its own proves that it cannot win; so are all, beyond small steps, where the
gap is so narrow that none could win what its run takes (CLOSE_TO_BOUND). The rest depends on the size of the step,
sequences times ranks. Small: all are run, FlexSP only where adaptive's gap is above ``limits.relative_gap``, since
its programs take seconds. Middling: greedy, the list schedules of rings and, where one round may hold the step, FlexSP
packed without programs (these seldom change it), and above that gap the most promising static layouts. Large:
greedy, floored rings and those layouts, above that gap only. In lockstep (zero3), list schedules are far behind and
beyond small steps only those layouts are tried, where adaptive's gap is wide (LOCKSTEP_GAP). So adaptive is never
behind a strategy that was run; of one that was not (FlexSP, Zeppelin and Megatron's rule beyond small steps) only its
gap says how far behind it can be: no plan of theirs is better by more than adaptive's proven gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.errors import InfeasibleError, SpecError
from planner.plan import Sharding, SolveStatus
from planner.pricing.assemble import Found, MicrobatchChoice, makespan_s
from planner.pricing.microbatch import SequencePrices
from planner.pricing.problem import StepProblem
from planner.strategies.flexsp.round_packing import pack_round
from planner.strategies.flexsp.strategy import one_kind_per_degree, place_rounds, plan_flexsp
from planner.strategies.greedy import plan_greedy
from planner.strategies.hdp import hdp_shapes, hdp_table, plan_hdp, plan_hdp_floor, plan_hdp_naive, smallest_columns
from planner.strategies.megatron import plan_megatron
from planner.strategies.pp_balance import plan_hdp_pp, plan_packs
from planner.strategies.search.shapes import GroupShape, allowed_shapes, group_tokens, price_table, require_fits
from planner.strategies.static import best_layout, every_layout
from planner.strategies.zeppelin import plan_zeppelin

MAX_LAYOUTS = 3  # beyond small steps
PACK_SHARES = (1.0, 0.5, 0.25, 0.125)
CLOSE_TO_BOUND = 3e-3
LOCKSTEP_GAP = 0.15  # in lockstep static layouts took 1.15 to 5 times as long as rounds of unlike groups
SMALL_STEP = 2**13
MIDDLING_STEP = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A better plan. ``makespan_s`` leaves ``step_fixed_s`` out."""

    name: str
    groups: tuple[MicrobatchChoice, ...]
    makespan_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What is to be beaten: ``beat_s`` (makespan) with ``bound_s`` proven. ``deadline_s``: when the strategy that asks
    has to end, by ``time.perf_counter``."""

    problem: StepProblem
    beat_s: float
    bound_s: float
    deadline_s: float

    @property
    def size(self) -> int:
        return len(self.problem.lengths) * self.problem.num_ranks

    @property
    def small(self) -> bool:
        return self.size <= SMALL_STEP

    @property
    def open(self) -> bool:
        """The gap is above the one asked for."""
        return not self.problem.is_proven(self.beat_s, self.bound_s)

    def in_time(self) -> StepProblem:
        """The problem with the time that is left."""
        limits = self.problem.limits
        left_s = max(self.deadline_s - time.perf_counter(), 0.0)
        return replace(self.problem, limits=replace(limits, time_limit_s=left_s))


def best_rival(match: Match) -> Rival | None:
    """The best plan of the strategies that were run, where it beats ``match.beat_s``."""
    best: Rival | None = None
    for name, run in _candidates(match):
        try:
            found = run()
        except (SpecError, InfeasibleError):  # not possible with these kinds, degrees or lengths
            continue
        found_s = makespan_s(found.groups, match.problem)
        if found_s < (match.beat_s if best is None else best.makespan_s):
            best = Rival(name=name, groups=found.groups, makespan_s=found_s)
    return best


def _candidates(match: Match) -> list[tuple[str, Callable[[], Found]]]:
    if match.beat_s <= match.bound_s or (match.size > MIDDLING_STEP and not match.open):
        return []
    if not match.small and match.beat_s <= match.bound_s * (1 + CLOSE_TO_BOUND):
        return []

    problem = match.problem

    def run(strategy: Callable[[StepProblem], Found]) -> Callable[[], Found]:
        return lambda: strategy(match.in_time())

    in_lockstep = problem.cost.sharding is Sharding.ZERO3
    runs = [] if in_lockstep and not match.small else [("greedy", run(plan_greedy)), ("hdp-floor", run(plan_hdp_floor))]
    hopeless = in_lockstep and match.beat_s <= match.bound_s * (1 + LOCKSTEP_GAP)
    if match.small or (match.open and not hopeless):
        runs.append(("static", lambda: _static(match)))
    if not match.small and match.size <= MIDDLING_STEP and not in_lockstep:
        runs.append(("flexsp round", lambda: _flexsp_round(match)))
    if match.size <= MIDDLING_STEP and (match.small or not in_lockstep):
        runs += [("hdp", run(plan_hdp))] if _hdp_may_win(match, problem) else []
        runs += [("hdp-naive", run(plan_hdp_naive))] if _hdp_may_win(match, problem.keeping_all()) else []
    if match.small:
        runs += [("zeppelin", run(plan_zeppelin)), ("megatron", run(plan_megatron))]
        runs.append(("hdp-pp", run(plan_hdp_pp)))
    if match.small and match.open:
        runs.append(("flexsp", run(plan_flexsp)))
    return runs + (_staged(match) if problem.cost.num_stages > 1 else [])


def _staged(match: Match) -> list[tuple[str, Callable[[], Found]]]:
    """PP-Balance with smaller and smaller microbatches: full ones may be too few to fill the pipelines."""

    def packs(share: float, floor: bool) -> Callable[[], Found]:
        return lambda: plan_packs(match.problem, pack_share=share, floor=floor)

    return [
        (f"hdp-pp, packs of {share:g} of the capacity", packs(share, floor))
        for share in PACK_SHARES for floor in (False, True)
    ]


def _hdp_may_win(match: Match, problem: StepProblem) -> bool:
    """Its degrees follow from memory, so the longest sequence's time is known."""
    try:
        shapes = hdp_shapes(problem)
    except SpecError:
        return False
    longest = hdp_table([max(problem.lengths)], shapes)
    column = int(smallest_columns(longest, np.inf)[0])
    return float(longest.marginal_s[0, column] + longest.fixed_s[column]) < match.beat_s


def _static(match: Match) -> Found:
    """The best layout of any degree, of those that their work and the longest sequence do not rule out."""
    layouts = every_layout(match.problem)
    bounds_s = [_layout_bound_s(layout, match) for layout in layouts]
    hopeful = [place for place, bound_s in enumerate(bounds_s) if bound_s < match.beat_s]
    if not match.small:
        hopeful = sorted(hopeful, key=lambda place: (bounds_s[place], place))[:MAX_LAYOUTS]
    layouts = [layouts[place] for place in hopeful]
    result = best_layout(match.problem, layouts) if layouts else None
    if result is None:
        raise SpecError("no layout may win")
    return Found(
        groups=result.schedule.groups, status=SolveStatus.STATIC, bound_s=result.bound_s, note=result.note
    )


def _flexsp_round(match: Match) -> Found:
    """FlexSP's plan without a program where one round may hold the step. With several, every round loses time of its
    own, and each took 2 % and more over adaptive's plan."""
    problem = match.problem
    if sum(problem.lengths) > problem.num_ranks * problem.max_rank_tokens:
        raise SpecError("one round cannot hold the step")
    table = price_table(problem.lengths, allowed_shapes(problem))
    require_fits(table, problem)
    table = one_kind_per_degree(table)
    packing = pack_round(table, problem.num_ranks, deadline_s=match.deadline_s, within_s=match.beat_s)
    if packing is None:
        raise SpecError("no better round was found")
    schedule = place_rounds([table], [packing], problem.num_ranks)
    return Found(groups=schedule.groups, status=SolveStatus.FEASIBLE, bound_s=0.0, note="")


def _layout_bound_s(layout: SequenceOf[GroupShape], match: Match) -> float:
    """Work at the cheapest coefficients of the layout's shapes, memory's share of fixed times, the longest's time."""
    sizes = np.asarray(match.problem.lengths, dtype=np.float64)
    tokens, squares, longest = float(sizes.sum()), float(sizes @ sizes), int(sizes.max())
    shapes = tuple(dict.fromkeys(layout))
    cheapest = SequencePrices.of([shape.fit for shape in shapes]).cheapest(np.array([s.degree for s in shapes]))
    work_s = float(cheapest.sums_s(tokens, squares, len(sizes))[0])
    work_s += min(s.degree * s.fit.fixed_s / max(group_tokens(s), 1) for s in shapes) * tokens
    alone_s = min(s.fit.sequence_s(longest) + s.fit.fixed_s for s in shapes)
    return max(work_s / match.problem.num_ranks, alone_s)
