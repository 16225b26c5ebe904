"""FlexSP (Wang et al., arXiv 2412.01523): rounds of sequence-parallel groups of different degree side by side.

As published: for each M = M_min .. M_min + M' - 1 the blaster cuts the sorted sequences into M rounds. In each round
lengths are bucketed, and a mixed-integer program chooses groups and their members for the smallest makespan. The M with
the smallest sum of makespans wins. Degree 1 is among the choices.

Where this differs, and why:

- Every round first gets a packing without a solver. Its program is solved only where that packing is further than the
  relative gap from the round's proven lower bound, best M first, and only while the sum of the rounds' bounds could
  still beat the best plan known. Programs larger than 64 ranks need are not solved (``round_program.MAX_VARIABLES``):
  on 1,024 ranks HiGHS uses up its time limit and returns the packing that it was given.
- The paper's sum of makespans assumes that all ranks wait between rounds. With zero3 they do, and the smallest sum
  wins as published. Otherwise our runtime has no such barrier, so the M with the smallest simulated time wins; that
  time never exceeds the sum.
- M goes on past values that cannot be packed (sequences do not tile memory). The paper's code returns nothing there.
- Sequences are dealt into their buckets' places by length, not at random: same inputs, same plan.

Known limits of the method that are kept: rounds have equal token counts although cost is quadratic in length; a bucket
prices its sequences too high, by its longest, so even an optimal program may lose to another plan; all groups of a
round start together, so the planner does not use a rank's idle time at the end of a round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np

from planner.cost.limits import PlanLimits
from planner.plan import Sharding, SolveStatus
from planner.pricing.assemble import Found, GroupChoice, price_choice
from planner.pricing.problem import StepProblem
from planner.solver import SolverFailure, WorkLimits
from planner.strategies.flexsp.blaster import blast_rows
from planner.strategies.flexsp.round_packing import RoundPacking, group_s, pack_round
from planner.strategies.flexsp.round_program import MAX_VARIABLES, RoundSolve, solve_round
from planner.strategies.greedy import Schedule, as_played, greedy_schedule
from planner.strategies.search.bounds import makespan_bound_s
from planner.strategies.search.shapes import (
    BoolArray,
    FloatArray,
    IntArray,
    PriceTable,
    allowed_shapes,
    price_table,
    require_fits,
)
from planner.strategies.static import best_layout, usual_layouts
from planner.units import format_seconds

MIN_SOLVE_S = 0.02
WORK_PER_NODE = 1000  # a step's solver work is this times max_nodes: seconds at 64 ranks, less for small steps


@dataclass(slots=True)
class _Trial:
    """One value of M: a table, a packing and a lower bound for each round."""

    tables: list[PriceTable]
    packings: list[RoundPacking]
    bounds_s: list[float]

    @property
    def makespans_s(self) -> float:
        """The published objective: the sum of the rounds' makespans."""
        return sum(packing.makespan_s for packing in self.packings)

    @property
    def bound_s(self) -> float:
        """Lower bound of the published objective over all packings of these rounds."""
        return sum(self.bounds_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexspResult:
    """The best rounds found. ``round_sizes``: how many of the schedule's groups are in each round, in order.
    ``makespans_s``: their sum of makespans. ``hit_limit``: a solver's work limit, the size of a program or the clock
    ended the search before all rounds were solved to the relative gap."""

    schedule: Schedule
    round_sizes: tuple[int, ...]
    makespans_s: float
    num_programs: int
    hit_limit: bool

    @property
    def num_rounds(self) -> int:
        return len(self.round_sizes)


@dataclass(slots=True)
class _Budget:
    """What is left of the step's solver work (see ``planner.solver``), with a wall-clock guard."""

    limits: PlanLimits
    deadline_s: float
    max_variables: int
    work_left: int
    num_programs: int = 0
    hit_limit: bool = False

    def share(self, num_programs: int) -> WorkLimits | None:
        """Limits for the next one of ``num_programs`` programs still to solve, or None where no work is left."""
        left_s = self.deadline_s - time.perf_counter()
        if self.work_left <= 0 or left_s < MIN_SOLVE_S:
            self.hit_limit = True
            return None
        return WorkLimits(
            max_nodes=self.limits.max_nodes, max_work=-(-self.work_left // num_programs),
            time_limit_s=left_s / num_programs, relative_gap=self.limits.relative_gap,
        )

    def spend(self, solve: RoundSolve) -> None:
        self.work_left -= solve.work
        self.num_programs += solve.work > 0
        self.hit_limit = self.hit_limit or not solve.closed


def plan_flexsp(problem: StepProblem) -> Found:
    """The strategy ``flexsp``: the best of the greedy plan, the best static plan and FlexSP's rounds. The last two are
    skipped where the greedy plan is proven to be within the relative gap.

    Raises SpecError where no shape is priced, InfeasibleError where a sequence fits none.
    """
    lengths, num_ranks, cost, limits = problem.lengths, problem.num_ranks, problem.cost, problem.limits
    deadline_s = time.perf_counter() + limits.time_limit_s
    table = price_table(lengths, allowed_shapes(problem))
    require_fits(table, problem)
    layouts = usual_layouts(problem)
    shapes = dict.fromkeys((*table.shapes, *(shape for layout in layouts for shape in layout)))
    bound_s = makespan_bound_s(price_table(lengths, tuple(shapes)), num_ranks)  # static's last block has its own shape
    best, winner = as_played(greedy_schedule(table, num_ranks), problem), "greedy"
    notes, hit_limit = [], False
    if not problem.is_proven(best.makespan_s, bound_s):
        homogeneous = best_layout(problem, layouts)
        if homogeneous is not None and homogeneous.schedule.makespan_s < best.makespan_s:
            best, winner = homogeneous.schedule, f"static ({homogeneous.note})"
        try:
            result = flexsp_schedule(
                table, num_ranks=num_ranks, max_local_tokens=problem.max_rank_tokens,
                limits=limits, incumbent_s=best.makespan_s, deadline_s=deadline_s,
                barriers=cost.sharding is Sharding.ZERO3,
            )
        except SolverFailure as error:
            result = None
            notes.append(f"solver failed: {error}")
        if result is not None:
            hit_limit = result.hit_limit
            notes.append(
                f"flexsp {result.num_rounds} rounds, sum of makespans {format_seconds(result.makespans_s)}, "
                f"{result.num_programs} programs"
            )
            rounds = result.schedule if cost.runs_free else _longest_first(result, problem)
            rounds = as_played(rounds, problem)
            if rounds.makespan_s < best.makespan_s:
                best, winner = rounds, "flexsp"
    status = SolveStatus.GREEDY
    if problem.is_proven(best.makespan_s, bound_s):
        status = SolveStatus.OPTIMAL
    elif winner != "greedy":
        status = SolveStatus.LIMIT if hit_limit else SolveStatus.FEASIBLE
    return Found(groups=best.groups, status=status, bound_s=bound_s, note="; ".join([f"{winner} plan", *notes]))


def _longest_first(result: FlexspResult, problem: StepProblem) -> Schedule:
    """The schedule with its longest rounds first. In lockstep a group whose ranks are idle in the round before starts a
    round early; in this order that round is no shorter than its own."""
    ends = list(accumulate(result.round_sizes))
    rounds = [result.schedule.groups[end - size : end] for end, size in zip(ends, result.round_sizes, strict=True)]
    rounds.sort(key=lambda groups: -max(price_choice(group, problem.lengths, problem.cost).seconds for group in groups))
    return replace(result.schedule, groups=tuple(group for groups in rounds for group in groups))


def flexsp_schedule(
    table: PriceTable, *, num_ranks: int, max_local_tokens: int, limits: PlanLimits, incumbent_s: float,
    deadline_s: float, barriers: bool = False, max_variables: int = MAX_VARIABLES,
) -> FlexspResult | None:
    """The best FlexSP plan of all rows, or None where no number of rounds could be packed.

    ``max_local_tokens``: tokens of a microbatch that one rank can hold. ``incumbent_s``: makespan of the best plan
    known so far. ``deadline_s``: when to stop, by ``time.perf_counter``. ``barriers``: whether all ranks wait for each
    other between rounds, as published; then the smallest sum of makespans wins. Programs of more than
    ``max_variables`` variables are not solved. Raises SolverFailure where the solver breaks down.
    """
    trials = _trials(table, num_ranks, max_local_tokens, limits, deadline_s)
    if not trials:
        return None
    budget = _Budget(limits, deadline_s, max_variables, limits.max_nodes * WORK_PER_NODE)
    best_s = min([incumbent_s, *(trial.makespans_s for trial in trials)])
    for trial in sorted(trials, key=lambda each: each.makespans_s):
        if trial.bound_s < best_s * (1 - limits.relative_gap):
            _improve(trial, num_ranks, budget)
            best_s = min(best_s, trial.makespans_s)
    placed = [(place_rounds(trial.tables, trial.packings, num_ranks), trial) for trial in trials]
    schedule, trial = min(
        placed, key=lambda item: (item[1].makespans_s if barriers else item[0].makespan_s, len(item[1].packings))
    )
    return FlexspResult(
        schedule=schedule, round_sizes=tuple(len(packing.groups) for packing in trial.packings),
        makespans_s=trial.makespans_s, num_programs=budget.num_programs, hit_limit=budget.hit_limit,
    )


def _trials(
    table: PriceTable, num_ranks: int, max_local_tokens: int, limits: PlanLimits, deadline_s: float
) -> list[_Trial]:
    """A trial for each of the first M' values of M that can be packed, within the deadline."""
    trials: list[_Trial] = []
    tried: set[int] = set()
    longest = int(table.lengths.max())
    fewest = -(-int(table.lengths.sum()) // (num_ranks * max_local_tokens))
    for num_rounds in range(fewest, table.num_rows + 1):
        if len(trials) == limits.num_round_trials or time.perf_counter() > deadline_s:
            break
        rounds = blast_rows(table.lengths, num_rounds)
        if len(rounds) not in tried:
            trial = _packed_rounds(table, rounds, num_ranks, deadline_s)
            trials += [trial] if trial is not None else []
        tried.add(len(rounds))
        if max(int(table.lengths[rows].sum()) for rows in rounds) == longest:
            break  # no cut has a smaller largest round, so more rounds would be cut the same
    return trials


def _packed_rounds(
    table: PriceTable, rounds: tuple[IntArray, ...], num_ranks: int, deadline_s: float
) -> _Trial | None:
    """Pack each round without a solver. None where one cannot be packed, or not before the deadline."""
    trial = _Trial([], [], [])
    for rows in rounds:
        part = one_kind_per_degree(table.take_rows(rows))
        packing = pack_round(part, num_ranks, deadline_s=deadline_s)
        if packing is None or time.perf_counter() > deadline_s:
            return None
        trial.tables.append(part)
        trial.packings.append(packing)
        trial.bounds_s.append(makespan_bound_s(part, num_ranks))
    return trial


def one_kind_per_degree(table: PriceTable) -> PriceTable:
    """Keep one attention kind for each degree: of the kinds that hold the most rows, the one with the fewest seconds
    for all of them."""
    best: dict[int, tuple[tuple[int, float], int]] = {}
    for column, degree in enumerate(table.degrees.tolist()):
        total_s = float(table.marginal_s[:, column].sum() + table.fixed_s[column])
        key = (-int(table.fits[:, column].sum()), total_s)
        if degree not in best or key < best[degree][0]:
            best[degree] = (key, column)
    return table.take_shapes([column for _, column in best.values()])


def _improve(trial: _Trial, num_ranks: int, budget: _Budget) -> None:
    """Solve the programs of the rounds whose packing is not proven within the relative gap, the widest gap first."""
    gaps_s = [packing.makespan_s - bound for packing, bound in zip(trial.packings, trial.bounds_s, strict=True)]
    threshold = budget.limits.relative_gap
    waiting = [i for i, gap_s in enumerate(gaps_s) if gap_s > threshold * trial.packings[i].makespan_s]
    waiting.sort(key=lambda place: (-gaps_s[place], place))
    for done, place in enumerate(waiting):
        work = budget.share(len(waiting) - done)
        if work is None:
            return
        solve = solve_round(
            trial.tables[place], num_ranks, budget.limits.num_buckets, work, max_variables=budget.max_variables
        )
        budget.spend(solve)
        if solve.packing is not None and solve.packing.makespan_s < trial.packings[place].makespan_s:
            trial.packings[place] = solve.packing


def place_rounds(tables: list[PriceTable], packings: list[RoundPacking], num_ranks: int) -> Schedule:
    """Give every group consecutive ranks, aligned to its degree, larger degrees first. Of the blocks of ranks that are
    still free in the round, a group takes the one that ends its earlier rounds first."""
    free_s = np.zeros(num_ranks)
    groups = []
    for table, packing in zip(tables, packings, strict=True):
        taken = np.zeros(num_ranks, dtype=np.bool_)
        for column, same in groupby(packing.groups, key=lambda group: group.column):
            shape, members = table.shapes[column], list(same)
            # Groups of one shape take different blocks, so they can be given the free blocks in order.
            blocks = _free_blocks(taken, free_s, shape.degree)[: len(members)]
            for first, group in zip(blocks, members, strict=True):
                block = slice(first, first + shape.degree)
                taken[block] = True
                free_s[block] = free_s[block].max() + group_s(table, group)
                sequences = tuple(sorted(table.rows[list(group.rows)].tolist()))
                groups.append(GroupChoice(shape.kind, tuple(range(first, first + shape.degree)), sequences))
    return Schedule(tuple(groups), float(free_s.max()))


def _free_blocks(taken: BoolArray, free_s: FloatArray, degree: int) -> list[int]:
    """First ranks of the aligned blocks of which no rank is taken, in the order in which they become free."""
    num_blocks = len(taken) // degree
    ends_s = free_s[: num_blocks * degree].reshape(num_blocks, degree).max(axis=1)
    open_blocks = np.flatnonzero(~taken[: num_blocks * degree].reshape(num_blocks, degree).any(axis=1))
    order = np.argsort(ends_s[open_blocks], kind="stable")
    return [int(block) * degree for block in open_blocks[order]]
