"""Zeppelin (Chen et al., arXiv 2509.21841): one microbatch over all ranks, its sequences in three zones.

The published method, with its gaps filled: long sequences are cut over whole nodes (*cluster* zone) and the others are
dealt to nodes. Inside a node the longer ones are cut over some of its ranks (*node* zone) and the rest stay whole on
one rank (*local* zone). In one microbatch a rank may be in rings of both zones and hold local sequences as well.
Cluster rings run first, because their transfers are the slowest, and local sequences last, because they wait for
nothing. Two thresholds on the length, one per cut, start at what a node or a rank may hold and fall until all fits.

Flaws and gaps of the method, and what is done here:

- Ranks may hold the step's mean number of tokens, which keeps token-wise layers even. Without slack hardly any sequence
  fits whole, thresholds collapse and nearly every sequence is cut over all nodes. So a rank may hold ``RANK_SLACK``
  more than the mean, and each of ``NODE_SLACKS`` is tried for nodes; the plan with the lowest price is the answer.
  Where the slack is not enough, memory alone is the limit.
- Thresholds are found by doubling steps and bisection over the lengths, not by a new start for each of them.
- Work is balanced in the cost model's seconds. The paper balances squared lengths, which is right only with remapping;
  where moving tokens is priced, balancing the seconds of attention alone is tried as well. A sequence is cut where it
  has more tokens *or* more work than the share of its node or rank. By tokens alone, one long sequence that just fits a
  node would make that node the slowest.
- A step is assumed to fit memory at once. Where it does not, sequences are dealt to as few microbatches as hold them
  with the slack: longest first, each to the one with the fewest tokens.

Routing layer: rings over several nodes have the allowed kind with the fewest seconds per token in the cost model
(``routed_ring``, ``double_ring`` or plain rings). Remapping layer: a microbatch's tokens are evened out for the
token-wise layers where that lowers its price (``planner.strategies.search.linear_balance``). Layers are launched once
a microbatch, so a rank in several groups is charged the largest of their fixed times (``planner.pricing.microbatch``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TypeVar

import numpy as np

from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import Found, GroupChoice
from planner.pricing.microbatch import MicrobatchPrice, rank_loads
from planner.pricing.problem import StepProblem
from planner.pricing.simulate import run_schedule
from planner.schedules.remap import Move
from planner.strategies.search.linear_balance import attention_shapes, price_with_moves, remap_bound_s
from planner.strategies.search.shapes import (
    UNLIMITED_TOKENS,
    FloatArray,
    GroupShape,
    IntArray,
    PriceTable,
    price_table,
    require_fits,
    ring_shapes,
    shape_of,
)

T = TypeVar("T")
NODE_SLACKS = (Fraction(5, 100), Fraction(10, 100), Fraction(20, 100))
RANK_SLACK = Fraction(25, 100)
CLUSTER_KINDS = (AttentionKind.ROUTED_RING, AttentionKind.DOUBLE_RING)
"""Kinds of rings over several nodes that use all NICs of a node; plain rings do not."""
_NO_MOVES: tuple[Move, ...] = ()
_Members = dict[tuple[int, ...], list[int]]  # the ranks of each group and its rows of the table


def plan_zeppelin(problem: StepProblem) -> Found:
    """The strategy ``zeppelin``. Raises SpecError where no ring can be formed, InfeasibleError where a sequence fits on
    none."""
    nodes = _Nodes(problem.num_ranks, problem.node_size)
    shapes = _shapes(nodes, problem)
    table = price_table(problem.lengths, shapes)
    require_fits(table, problem)
    tables = [table]
    if attention := attention_shapes(shapes, problem.cost):  # moves will balance the rest, so balance attention alone
        tables.append(price_table(problem.lengths, attention))
    plans = [
        _priced(_microbatches(each, nodes, slack), table, problem) for each in tables for slack in NODE_SLACKS
    ]
    best = min(plans, key=lambda plan: plan.seconds)
    counts = [sum(len(rows) for members in best.parts for ranks, rows in members.items() if low < len(ranks) <= high)
              for low, high in ((0, 1), (1, nodes.size), (nodes.size, nodes.num_ranks))]
    note = f"zeppelin zones: {counts[0]} local, {counts[1]} node, {counts[2]} cluster sequences"
    num_moved = sum(tokens for moves in best.moves for _, _, tokens in moves)
    if num_moved:
        note += f"; {num_moved} tokens moved for the token-wise layers"
    return Found(
        groups=best.groups, status=SolveStatus.GREEDY, bound_s=remap_bound_s(problem, shapes),
        note=note, moves=best.moves,
    )


def _shapes(nodes: _Nodes, problem: StepProblem) -> tuple[GroupShape, ...]:
    """Local and rings. Over several nodes, each degree gets the allowed kind with the fewest seconds per token."""
    shapes = list(ring_shapes("zeppelin", nodes.ring_degrees(), problem))
    for place, ring in enumerate(shapes):
        if ring.degree <= nodes.size:
            continue
        rivals = (shape_of(kind, ring.degree, problem.cost, problem.limits) for kind in CLUSTER_KINDS)
        shapes[place] = min(
            (ring, *(shape for shape in rivals if shape is not None)),
            key=lambda shape: (shape.fit.s_per_token, shape.fit.fixed_s),
        )
    return tuple(shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Priced:
    """A way to cut the step and its price. ``parts``: the groups of each microbatch. ``seconds``: of the step."""

    parts: list[_Members]
    groups: tuple[tuple[GroupChoice, ...], ...]
    moves: tuple[tuple[Move, ...], ...]
    seconds: float


def _priced(parts: list[_Members], table: PriceTable, problem: StepProblem) -> _Priced:
    """Price these microbatches, with moves where they are priced and pay off."""
    groups = tuple(_choices(table, members) for members in parts)
    if problem.cost.remap is None:
        found = [(_table_price(table, members), _NO_MOVES) for members in parts]
    else:
        found = [price_with_moves(choice, problem) for choice in groups]
    simulation = run_schedule([price for price, _ in found], num_ranks=problem.num_ranks, cost=problem.cost)
    return _Priced(parts=parts, groups=groups, moves=tuple(moves for _, moves in found), seconds=simulation.step_s)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Ranks fill nodes of ``size`` in order; the last node may be smaller."""

    num_ranks: int
    size: int

    def ranks(self, node: int) -> range:
        return range(node * self.size, min((node + 1) * self.size, self.num_ranks))

    def sizes(self) -> list[int]:
        return [min(self.size, self.num_ranks - first) for first in range(0, self.num_ranks, self.size)]

    def ring_degrees(self) -> set[int]:
        """Every number of ranks inside a node, and all ranks of several nodes, with or without the smaller one."""
        num_full, rest = divmod(self.num_ranks, self.size)
        whole = {count * self.size for count in range(2, num_full + 1)}
        return {*range(2, self.size + 1), *whole, *(count * self.size + rest for count in range(1, num_full + 1))}


def _table_price(table: PriceTable, members: _Members) -> MicrobatchPrice:
    """The price of a microbatch without moves. It is faster than ``price_choice`` because tokens and memory, which are
    known to fit, are left out."""
    columns = {degree: column for column, degree in enumerate(table.degrees.tolist())}
    groups = []
    for ranks, rows in members.items():
        column = columns[len(ranks)]
        groups.append((ranks, float(table.marginal_s[rows, column].sum()), float(table.fixed_s[column])))
    marginal_s, fixed_s = rank_loads(chain.from_iterable(members), groups)
    rank_s = tuple(marginal_s[rank] + fixed_s[rank] for rank in marginal_s)
    return MicrobatchPrice(
        seconds=max(rank_s), ranks=tuple(marginal_s), rank_s=rank_s, rank_tokens=(0,) * len(rank_s)
    )


def _microbatches(table: PriceTable, nodes: _Nodes, node_slack: Fraction) -> list[_Members]:
    """One microbatch, or as few as hold the step with the slack, at most one for each sequence."""
    held = nodes.num_ranks * int(table.capacity_tokens[0])
    needed = int(table.lengths.sum()) * (1 + node_slack) / held
    num_parts = min(-(-needed.numerator // needed.denominator), table.num_rows)
    while True:
        parts = _deal(table.lengths, num_parts)
        found = []
        for rows in parts:
            members = _partition(table, rows, nodes, node_slack)
            if members is None:
                break
            found.append(members)
        if len(found) == len(parts):
            return found
        num_parts = min(num_parts + max(1, num_parts // 4), table.num_rows)


def _deal(lengths: IntArray, num_parts: int) -> list[list[int]]:
    """Deal the rows, longest first, each to the part with the fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    tokens = np.zeros(num_parts, dtype=np.int64)
    for row in np.lexsort((np.arange(len(lengths)), -lengths)).tolist():
        part = int(np.argmin(tokens))
        parts[part].append(row)
        tokens[part] += lengths[row]
    return parts


def _partition(table: PriceTable, rows: list[int], nodes: _Nodes, node_slack: Fraction) -> _Members | None:
    """The zones of one microbatch (``rows``: longest first), or None where no thresholds were found that fit."""
    if len(rows) == 1:
        return _alone(table, rows[0], nodes)
    for slack in (node_slack, None):
        cutter = _Cutter(table, nodes, rows, slack)
        found = _highest_threshold(cutter.cut, cutter.thresholds())
        if found is not None:
            return found
    return None


def _alone(table: PriceTable, row: int, nodes: _Nodes) -> _Members:
    """A single sequence on its quickest shape: from the first rank on, or, where the shape includes the smaller last
    node, up to the last rank."""
    alone_s = np.where(table.fits[row], table.marginal_s[row] + table.fixed_s, np.inf)
    degree = int(table.degrees[int(np.argmin(alone_s))])
    first = 0 if degree <= nodes.size or degree % nodes.size == 0 else nodes.num_ranks - degree
    return {tuple(range(first, first + degree)): [row]}


def _thresholds(lengths: IntArray, start: int) -> list[int]:
    """``start`` and every lower threshold that cuts one more distinct length, descending. A threshold cuts the
    sequences that are longer."""
    return [start, *(np.unique(lengths[lengths <= start])[::-1] - 1).tolist()]


def _highest_threshold(attempt: Callable[[int], T | None], thresholds: list[int]) -> T | None:
    """The result of ``attempt`` at the highest threshold where there is one, by doubling steps, then bisection."""
    low, high, last = -1, 0, len(thresholds) - 1
    found = attempt(thresholds[0])
    while found is None and high < last:
        low, high = high, min(2 * high + 1, last)
        found = attempt(thresholds[high])
    while found is not None and high - low > 1:
        middle = (low + high) // 2
        trial = attempt(thresholds[middle])
        if trial is None:
            low = middle
        else:
            high, found = middle, trial
    return found


class _Cutter:
    """Cuts one microbatch into zones, given a threshold of the cluster zone.

    ``rows``: longest first. ``node_slack``: how far nodes and ranks may exceed their share of the tokens; None: memory
    alone limits them. A ring counts on each of its ranks with the tokens of its fullest one.
    """

    def __init__(self, table: PriceTable, nodes: _Nodes, rows: list[int], node_slack: Fraction | None) -> None:
        self.table, self.nodes, self.rows, self.node_slack = table, nodes, rows, node_slack
        self.capacity = int(table.capacity_tokens[0])
        self.column_of = {degree: column for column, degree in enumerate(table.degrees.tolist())}
        self.inside = np.array([degree for degree in self.column_of if 1 < degree <= nodes.size], dtype=np.int64)
        self.work_s = np.where(table.fits, table.degrees * table.marginal_s, np.inf).min(axis=1)
        self.sizes = np.array(nodes.sizes(), dtype=np.int64)
        self.node_limits = np.minimum(self.sizes.astype(np.float64) * self.capacity, UNLIMITED_TOKENS)
        if node_slack is not None:
            due = int(table.lengths[rows].sum()) * self.sizes / nodes.num_ranks
            self.node_limits = np.minimum(self.node_limits, due * float(1 + node_slack) + 1)

    def thresholds(self) -> list[int]:
        """Thresholds of the cluster zone, descending. With a single node the only one cuts nothing."""
        if len(self.sizes) == 1:
            return [UNLIMITED_TOKENS]
        start = int(self.node_limits.max())
        if self.node_slack is not None:
            due_s = float(self.work_s[self.rows].sum()) / len(self.sizes) * float(1 + self.node_slack)
            start = self.within(self.rows, start, due_s)
        return _thresholds(self.table.lengths[self.rows], start)

    def within(self, rows: list[int], tokens: int, due_s: float) -> int:
        """The highest threshold that cuts every row of more than ``tokens`` tokens or ``due_s`` rank seconds."""
        over = self.table.lengths[rows][self.work_s[rows] > due_s]
        return min(tokens, int(over.min()) - 1) if len(over) else tokens

    def cut(self, threshold: int) -> _Members | None:
        """Cut the sequences above the threshold over several nodes, deal the rest to nodes and cut them there. None
        where that does not fit."""
        ring_tokens = np.zeros(len(self.sizes), dtype=np.int64)  # of each rank of the node
        node_tokens, node_s = np.zeros(len(self.sizes)), np.zeros(len(self.sizes))
        members: _Members = {}
        lists: list[list[int]] = [[] for _ in self.sizes]
        for row in self.rows:
            length = int(self.table.lengths[row])
            if length > threshold:
                chosen = self._cluster_ring(row, node_s, ring_tokens)
                if chosen is None:
                    return None
                ranks = tuple(rank for node in sorted(chosen) for rank in self.nodes.ranks(node))
                ring_tokens[chosen] += self.table.load_tokens[row, self.column_of[len(ranks)]]
                members.setdefault(ranks, []).append(row)
                share = self.sizes[chosen] / self.sizes[chosen].sum()
                node_tokens[chosen] += length * share
                node_s[chosen] += self.work_s[row] * share
            else:
                node = int((node_s / self.sizes).argmin())
                if node_tokens[node] + length > self.node_limits[node]:
                    has_room = node_tokens + length <= self.node_limits
                    if not has_room.any():
                        return None
                    node = int(np.where(has_room, node_s / self.sizes, np.inf).argmin())
                lists[node].append(row)
                node_tokens[node] += length
                node_s[node] += self.work_s[row]
        return self._fill_nodes(members, lists, node_tokens, ring_tokens)

    def _cluster_ring(self, row: int, node_s: FloatArray, ring_tokens: IntArray) -> list[int] | None:
        """The least busy nodes for a sequence: as many as its share of the tokens and of the work requires, else more,
        else fewer. None where no number of nodes fits."""
        table, num_nodes = self.table, len(self.sizes)
        order = np.argsort(node_s / self.sizes, kind="stable").tolist()
        share = max(values[row] / values[self.rows].sum() for values in (table.lengths, self.work_s))
        fewest = min(max(2, int(np.ceil(share * num_nodes * (1 - 1e-9)))), num_nodes)
        for count in (*range(fewest, num_nodes + 1), *range(fewest - 1, 1, -1)):
            chosen: list[int] = order[:count]
            column = self.column_of.get(int(self.sizes[chosen].sum()))
            if column is None:
                continue
            if int(ring_tokens[chosen].max() + table.load_tokens[row, column]) <= self.capacity:
                return chosen
        return None

    def _fill_nodes(
        self, members: _Members, lists: list[list[int]], node_tokens: FloatArray, ring_tokens: IntArray
    ) -> _Members | None:
        members = dict(members)
        for node, rows in enumerate(lists):
            ranks, taken = self.nodes.ranks(node), int(ring_tokens[node])
            due = max(taken, int(node_tokens[node] / len(ranks) * float(1 + RANK_SLACK)) + 1)
            held = (self.capacity,) if self.node_slack is None else (min(due, self.capacity), self.capacity)
            limits = dict.fromkeys(held)
            for limit in limits:
                filled = _NodeFiller(self, rows, ranks, taken, limit).fill()
                if filled is not None:
                    break
            else:
                return None
            members |= filled
        return members


@dataclass(frozen=True, slots=True)
class _NodeFiller:
    """Cuts the sequences of one node (``rows``, longest first) into its zones. Each of its ``ranks`` already holds
    ``taken`` tokens of cluster rings and may hold ``limit`` in all."""

    cutter: _Cutter
    rows: list[int]
    ranks: range
    taken: int
    limit: int

    def fill(self) -> _Members | None:
        """The node's zones at the highest threshold that works."""
        due_s = float(self.cutter.work_s[self.rows].sum()) / len(self.ranks) * float(1 + RANK_SLACK)
        start = self.cutter.within(self.rows, self.limit - self.taken, due_s)
        return _highest_threshold(self.cut, _thresholds(self.cutter.table.lengths[self.rows], start))

    def cut(self, threshold: int) -> _Members | None:
        """Run the sequences above the threshold in rings and the others whole on one rank. None where that does not
        fit."""
        table, members = self.cutter.table, _Members()  # column 0 of the table is local
        seconds, fixed_s = np.zeros(len(self.ranks)), np.zeros(len(self.ranks))
        tokens = np.full(len(self.ranks), self.taken, dtype=np.int64)
        lengths, alone_s = table.lengths[self.rows], table.marginal_s[self.rows, 0].tolist()
        is_cut = lengths > threshold
        local_s = float(table.fixed_s[0])
        share_s = float(self.cutter.work_s[self.rows][is_cut].sum()) / len(self.ranks)
        for row, length, work_s, cut in zip(self.rows, lengths.tolist(), alone_s, is_cut.tolist(), strict=True):
            busy_s = seconds + fixed_s
            if not cut:
                place = self._single(length, busy_s, tokens)
                if place is None:
                    return None
                seconds[place] += work_s
                fixed_s[place] = max(fixed_s[place], local_s)
                tokens[place] += length
                members.setdefault((self.ranks[place],), []).append(row)
                continue
            places = self._ring(row, share_s, busy_s, tokens)
            if places is None:
                return None
            ranks = tuple(self.ranks[place] for place in places)
            column = self.cutter.column_of[len(ranks)]
            seconds[places] += table.marginal_s[row, column]
            fixed_s[places] = np.maximum(fixed_s[places], table.fixed_s[column])
            tokens[places] += table.load_tokens[row, column]
            members.setdefault(ranks, []).append(row)
        return members

    def _single(self, length: int, seconds: FloatArray, tokens: IntArray) -> int | None:
        """The least busy rank that has room."""
        place = int(seconds.argmin())
        if tokens[place] + length <= self.limit:
            return place
        free = tokens + length <= self.limit
        return int(np.where(free, seconds, np.inf).argmin()) if free.any() else None

    def _ring(self, row: int, share_s: float, seconds: FloatArray, tokens: IntArray) -> list[int] | None:
        """The least busy ranks that have room: as many as the sequence's share of the work in rings requires, else
        more, else fewer."""
        order = np.argsort(seconds, kind="stable")
        wanted = self.cutter.work_s[row] / share_s * (1 - 1e-9) if share_s > 0 else 0.0
        degrees = self.cutter.inside[self.cutter.inside <= len(self.ranks)]
        first = int(np.searchsorted(degrees, wanted))
        for degree in (*degrees[first:].tolist(), *degrees[:first][::-1].tolist()):
            load = self.cutter.table.load_tokens[row, self.cutter.column_of[degree]]
            free = order[tokens[order] + load <= self.limit]
            if len(free) >= degree:
                return sorted(free[:degree].tolist())
        return None


def _choices(table: PriceTable, members: _Members) -> tuple[GroupChoice, ...]:
    """The groups of one microbatch, those of the most ranks first."""
    kinds = {shape.degree: shape.kind for shape in table.shapes}
    groups = []
    for ranks in sorted(members, key=lambda ranks: (-len(ranks), ranks)):
        kind = kinds[len(ranks)]
        groups.append(GroupChoice(kind, ranks, tuple(sorted(table.rows[members[ranks]].tolist()))))
    return tuple(groups)
