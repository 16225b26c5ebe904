"""One round as FlexSP's mixed-integer program (arXiv 2412.01523, eq. 17-22), over bucketed lengths.

    minimise C
    count[q, p]   sequences of bucket q in virtual group p       used[p]   group p exists
    sum_p count[q, p] = members of bucket q
    sum_q count[q, p] * marginal_s[q, p] + fixed_s[p] * used[p] <= C         time of p
    sum_q count[q, p] * load[q, p] <= capacity[p] * used[p]                  memory of p
    sum_p degree[p] * used[p] <= num_ranks

Three additions to the paper's program leave its optimum unchanged. A known solution gives C an upper bound, and pairs
(q, p) that exceed it alone are left out. Groups of one degree are ordered by time. And there is the row
``sum_p degree[p] * time[p] <= num_ranks * C``: without it the relaxation may use all virtual groups at once, each with
a small fraction of its ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from planner.solver import LinearModel, Outcome, Solution, SolverFailure, WorkLimits
from planner.strategies.flexsp.buckets import bucket_rows
from planner.strategies.flexsp.round_packing import RoundPacking, deal_rows, pack_round, packing_of
from planner.strategies.search.bounds import makespan_bound_s
from planner.strategies.search.shapes import IntArray, PriceTable

MAX_VARIABLES = 2500  # enough for 64 ranks' 127 virtual groups and 16 buckets; HiGHS gains little on larger programs
TINY_SHARE = 1e-4  # of the makespan: HiGHS lets rows and integers be off by a millionth


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSolve:
    """``packing``: in true lengths, None where none was found. ``closed``: whether the bucketed program was solved to
    the relative gap of the limits. ``work``: the solver's work (see ``planner.solver``), 0 where it did not run."""

    packing: RoundPacking | None
    closed: bool
    work: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A virtual group: its shape's column, its ``used`` variable, and its count variable by bucket."""

    column: int
    used: int
    counts: dict[int, int]


def solve_round(
    table: PriceTable, num_ranks: int, num_buckets: int, limits: WorkLimits, *, max_variables: int = MAX_VARIABLES
) -> RoundSolve:
    """Solve the program of the round over these rows, unless it has more than ``max_variables`` variables.

    Raises SolverFailure where the solver breaks down.
    """
    started_s = time.perf_counter()
    buckets = bucket_rows(table.lengths, num_buckets)
    bucketed, bucket_of_row = _bucketed(table, buckets)
    padded = bucketed.take_rows(bucket_of_row)
    start = pack_round(padded, num_ranks, deadline_s=started_s + limits.time_limit_s)
    if start is None:
        return RoundSolve(packing=None, closed=False)
    bound_s = makespan_bound_s(padded, num_ranks)
    if start.makespan_s - bound_s <= limits.relative_gap * start.makespan_s:
        return RoundSolve(packing=_in_true_lengths(table, start), closed=True)
    start_counts = [
        (group.column, np.bincount(bucket_of_row[list(group.rows)], minlength=len(buckets))) for group in start.groups
    ]
    sizes = np.array([len(members) for members in buckets], dtype=np.int64)
    left_s = limits.time_limit_s - (time.perf_counter() - started_s)
    if _num_variables(bucketed, sizes, num_ranks, start.makespan_s) > max_variables or left_s <= 0:
        return RoundSolve(packing=_in_true_lengths(table, start), closed=False)
    model, candidates = _build(bucketed, sizes, num_ranks, start.makespan_s, bound_s)
    values = _start_values(candidates, start_counts, start.makespan_s)
    solution = model.solve(replace(limits, time_limit_s=left_s), values)
    if not solution.values:
        raise SolverFailure(f"a round with a known solution came back {solution.outcome}")
    packing = _deal_buckets(table, buckets, candidates, solution)
    if not _can_run(table, packing, num_ranks):  # within the solver's tolerances, but not within ours
        return RoundSolve(packing=_in_true_lengths(table, start), closed=False, work=solution.work)
    return RoundSolve(packing=packing, closed=solution.outcome is Outcome.OPTIMAL, work=solution.work)


def _can_run(table: PriceTable, packing: RoundPacking, num_ranks: int) -> bool:
    """Whether the groups fit the ranks side by side, and their sequences the groups' memory."""
    degrees = sum(int(table.degrees[group.column]) for group in packing.groups)
    return degrees <= num_ranks and all(
        int(table.load_tokens[list(group.rows), group.column].sum()) <= int(table.capacity_tokens[group.column])
        for group in packing.groups
    )


def _bucketed(table: PriceTable, buckets: tuple[IntArray, ...]) -> tuple[PriceTable, IntArray]:
    """A table with a row per bucket, and the bucket of each row of ``table``. A bucket has its longest member's times
    and the largest load of any member (a ring's loads do not always grow with the length)."""
    loads = np.stack([table.load_tokens[members].max(axis=0) for members in buckets])
    reduced = replace(
        table.take_rows(np.array([members[0] for members in buckets])),
        load_tokens=loads, fits=loads <= table.capacity_tokens,
    )
    bucket_of_row = np.empty(table.num_rows, dtype=np.int64)
    for bucket, members in enumerate(buckets):
        bucket_of_row[members] = bucket
    return reduced, bucket_of_row


def _virtual_groups(
    table: PriceTable, sizes: IntArray, num_ranks: int, most_s: float
) -> list[tuple[int, int, IntArray]]:
    """For each shape its column, its number of virtual groups, and the buckets that may go there: those of which one
    sequence alone ends within ``most_s``."""
    alone_s = np.where(table.fits, table.marginal_s + table.fixed_s, np.inf)
    groups = []
    for column, degree in enumerate(table.degrees.tolist()):
        open_buckets = np.flatnonzero(alone_s[:, column] <= most_s * (1 + 1e-9))
        groups.append((column, min(num_ranks // degree, int(sizes[open_buckets].sum())), open_buckets))
    return groups


def _num_variables(table: PriceTable, sizes: IntArray, num_ranks: int, most_s: float) -> int:
    groups = _virtual_groups(table, sizes, num_ranks, most_s)
    return 1 + sum(num_groups * (1 + len(open_buckets)) for _, num_groups, open_buckets in groups)


def _build(
    table: PriceTable, sizes: IntArray, num_ranks: int, most_s: float, least_s: float
) -> tuple[LinearModel, list[_Candidate]]:
    """The module's program with C between ``least_s`` and ``most_s``, and its virtual groups. ``sizes``: the members of
    each bucket."""
    model = LinearModel()
    makespan = model.variable(low=least_s, high=most_s)
    model.minimize({makespan: 1.0})
    candidates: list[_Candidate] = []
    work: dict[int, float] = {makespan: -float(num_ranks)}
    for column, num_groups, open_buckets in _virtual_groups(table, sizes, num_ranks, most_s):
        previous: dict[int, float] = {}
        for _ in range(num_groups):
            candidate = _candidate(model, table, sizes, column, open_buckets, most_s)
            time = {variable: float(table.marginal_s[bucket, column]) for bucket, variable in candidate.counts.items()}
            time[candidate.used] = float(table.fixed_s[column])
            model.row({**time, makespan: -1.0}, high=0.0)
            model.row({**time, candidate.used: time[candidate.used] - most_s}, high=0.0)
            if previous:
                model.row({**previous, **{variable: -value for variable, value in time.items()}}, low=0.0)
            work.update({variable: int(table.degrees[column]) * value for variable, value in time.items()})
            candidates.append(candidate)
            previous = time
    model.row(work, high=0.0)
    model.row({each.used: float(table.degrees[each.column]) for each in candidates}, high=float(num_ranks))
    for bucket, size in enumerate(sizes.tolist()):
        places = {each.counts[bucket]: 1.0 for each in candidates if bucket in each.counts}
        model.row(places, low=float(size), high=float(size))
    return model, candidates


def _candidate(
    model: LinearModel, table: PriceTable, sizes: IntArray, column: int, open_buckets: IntArray, most_s: float
) -> _Candidate:
    """The variables of one virtual group, and its memory row where memory can bind."""
    used = model.variable(high=1.0, integer=True)
    capacity = int(table.capacity_tokens[column])
    counts, loads, total = {}, {}, 0
    for bucket in open_buckets.tolist():
        load = int(table.load_tokens[bucket, column])
        most = min(int(sizes[bucket]), capacity // max(load, 1))
        counts[bucket] = model.variable(high=float(most), integer=True)
        loads[counts[bucket]] = float(load)
        total += load * int(sizes[bucket])
    if total > capacity:
        # The row is divided by the capacity, because the solver's tolerances are meant for coefficients near 1.
        model.row({**{variable: load / capacity for variable, load in loads.items()}, used: -1.0}, high=0.0)
    # Members that take next to no time and memory would fit a group that is not used, within the solver's tolerance:
    # only a row that counts them keeps that group empty.
    tiny = [bucket for bucket in counts if float(table.marginal_s[bucket, column]) < TINY_SHARE * most_s]
    if tiny:
        members = float(sum(int(sizes[bucket]) for bucket in tiny))
        model.row({**{counts[bucket]: 1.0 / members for bucket in tiny}, used: -1.0}, high=0.0)
    return _Candidate(column, used, counts)


def _start_values(
    candidates: list[_Candidate], groups: list[tuple[int, IntArray]], makespan_s: float
) -> list[float]:
    """The known solution as one value per variable. ``groups`` are sorted by time, as the ordering rows require."""
    values = [0.0] * (1 + sum(1 + len(each.counts) for each in candidates))
    values[0] = makespan_s
    waiting = {column: [counts for other, counts in groups if other == column] for column, _ in groups}
    for candidate in candidates:
        queue = waiting.get(candidate.column, [])
        if queue:
            counts = queue.pop(0)
            values[candidate.used] = 1.0
            for bucket, variable in candidate.counts.items():
                values[variable] = float(counts[bucket])
    return values


def _deal_buckets(
    table: PriceTable, buckets: tuple[IntArray, ...], candidates: list[_Candidate], solution: Solution
) -> RoundPacking:
    """Deal the sequences to the solver's counts, longest first, each to the group with the least time so far. Dealing
    them freely over the same groups is tried as well, and the better packing is returned."""
    quotas = [
        {bucket: round(solution.values[variable]) for bucket, variable in each.counts.items()} for each in candidates
    ]
    used = [place for place, quota in enumerate(quotas) if any(quota.values())]
    time_s = {place: float(table.fixed_s[candidates[place].column]) for place in used}
    rows: dict[int, list[int]] = {place: [] for place in used}
    for bucket, members in enumerate(buckets):
        for row in members.tolist():
            open_places = [place for place in used if quotas[place].get(bucket, 0) > 0]
            if not open_places:
                raise SolverFailure(f"the solver's counts leave out a member of bucket {bucket}")
            place = min(open_places, key=lambda each: (time_s[each], each))
            quotas[place][bucket] -= 1
            rows[place].append(row)
            time_s[place] += float(table.marginal_s[row, candidates[place].column])
    packed = packing_of(table, [(candidates[place].column, rows[place]) for place in used])
    dealt = deal_rows(table, [group.column for group in packed.groups])
    return packed if dealt is None or packed.makespan_s <= dealt.makespan_s else dealt


def _in_true_lengths(table: PriceTable, packing: RoundPacking) -> RoundPacking:
    return packing_of(table, [(group.column, group.rows) for group in packing.groups])


