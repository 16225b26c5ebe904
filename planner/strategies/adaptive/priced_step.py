"""What all builds of one step share: the rows (sequences, the shortest first), the columns (shapes that a
group may have), prices, and the places on the ranks where a group may stand."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from planner.plan import AttentionKind, Sharding
from planner.pricing.problem import StepProblem
from planner.strategies.search.bounds import surely_local
from planner.strategies.search.shapes import GroupShape, IntArray, PriceTable, price_table


@dataclass(slots=True)
class Batch:
    """A microbatch while it is being built: a shape, rows, seconds from start to end, consecutive ranks."""

    column: int
    degree: int
    fixed_s: float
    load: int = 0
    marginal_s: float = 0.0
    rows: list[int] = field(default_factory=list)
    first_rank: int = -1
    begin_s: float = 0.0
    is_last: bool = True  # no other group runs after it on any of its ranks

    @property
    def seconds(self) -> float:
        return self.fixed_s + self.marginal_s

    @property
    def end_s(self) -> float:
        return self.begin_s + self.fixed_s + self.marginal_s

    def add(self, row: int, load: int, marginal_s: float) -> None:
        self.rows.append(row)
        self.load += load
        self.marginal_s += marginal_s


class PricedStep:
    """Rows are the step's sequences, the shortest first; columns are shapes. Column 0 is local wherever local is
    allowed."""

    def __init__(self, problem: StepProblem, shapes: SequenceOf[GroupShape]) -> None:
        """``order``: the sequence of each row. Where ranks run free, the first ``num_local`` rows run on one rank
        unless they fill up a group; ``long`` is the price table of the others."""
        self.order = sorted(range(len(problem.lengths)), key=lambda index: (problem.lengths[index], -index))
        self.lengths = [problem.lengths[index] for index in self.order]
        self.shapes = tuple(shapes)
        self.num_ranks, self.node_size = problem.num_ranks, problem.node_size
        self.has_local = self.shapes[0].kind is AttentionKind.LOCAL
        self.degree = [shape.degree for shape in self.shapes]
        self.fixed = [shape.fit.fixed_s for shape in self.shapes]
        sizes = np.array(self.lengths, dtype=np.int64)
        self.num_local = 0
        if self.has_local and problem.cost.sharding is not Sharding.ZERO3:
            runs_local = surely_local(sizes, np.ones(len(sizes)), self.shapes, self.shapes[0], self.num_ranks)
            self.num_local = int(runs_local.sum())
        self.long: PriceTable = price_table(sizes[self.num_local :], self.shapes)
        local = price_table(sizes, self.shapes[:1])
        self.local_load: list[int] = local.load_tokens[:, 0].tolist()
        self.local_s: list[float] = local.marginal_s[:, 0].tolist()
        self._places: dict[int, tuple[IntArray, IntArray]] = {}

    def marginal_s(self, row: int, column: int) -> float:
        """Seconds the row adds to a group of the shape."""
        return self.shapes[column].fit.sequence_s(self.lengths[row])

    def load(self, row: int, column: int) -> int:
        """What the row takes of the shape's capacity."""
        return self.shapes[column].load_tokens(self.lengths[row])

    def room(self, batch: Batch) -> int:
        """The load that the microbatch can still take."""
        return self.shapes[batch.column].capacity_tokens - batch.load

    def places(self, degree: int) -> tuple[IntArray, IntArray]:
        """First ranks of the groups of this degree (see ``first_ranks``), and all ranks of each."""
        if degree not in self._places:
            firsts = first_ranks(degree, self.num_ranks, self.node_size)
            self._places[degree] = (firsts, firsts[:, None] + np.arange(degree, dtype=np.int64))
        return self._places[degree]


def fullest_with_room(batches: Iterable[Batch], most: int) -> Batch | None:
    """The one with the largest load up to ``most``, the first among equals."""
    fitting = [batch for batch in batches if batch.load <= most]
    return max(fitting, key=lambda batch: batch.load, default=None)


def first_ranks(degree: int, num_ranks: int, node_size: int) -> IntArray:
    """Where a group of consecutive ranks may start. One that fits a node never straddles two, larger ones start with a
    node or end with the ranks: that is what groups are priced for. Inside a node, starts are ``degree / 16`` apart."""
    firsts: set[int] = set()
    if degree <= node_size:
        step = max(1, degree // 16)
        for base in range(0, num_ranks, node_size):
            last = min(base + node_size, num_ranks) - degree
            firsts.update(range(base, last + 1, step))
            firsts.update([last] if last >= base else [])
    else:
        firsts.update(range(0, num_ranks - degree + 1, node_size))
        firsts.add(num_ranks - degree)
    return np.array(sorted(firsts), dtype=np.int64)
