"""What all builds of one step share: lengths, shapes as plain numbers, long sequences' prices, places for groups."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from math import ceil, sqrt

import numpy as np

from planner.plan import AttentionKind
from planner.pricing.microbatch import SequencePrices
from planner.strategies.search.shapes import HAIR, GroupShape, IntArray, PriceTable, price_table


@dataclass(slots=True)
class Batch:
    """A microbatch while it is being built: a shape, rows of the step, seconds from start to end, consecutive ranks."""

    column: int
    degree: int
    fixed_s: float
    load: int = 0
    marginal_s: float = 0.0
    rows: list[int] = field(default_factory=list)
    first_rank: int = -1
    begin_s: float = 0.0
    covered: bool = False  # another group runs after it on one of its ranks

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


class Workshop:
    """Rows are places in the step; columns are shapes. Column 0 is local wherever local is allowed."""

    def __init__(
        self, lengths: SequenceOf[int], shapes: SequenceOf[GroupShape], settled: SequenceOf[bool], *, num_ranks: int,
        node_size: int,
    ) -> None:
        """``settled``: rows that run on one rank unless they fill up a group. ``node_size``: consecutive ranks of a
        node."""
        self.lengths = list(lengths)
        self.shapes = tuple(shapes)
        self.num_ranks = num_ranks
        self.node_size = node_size
        self.has_local = self.shapes[0].kind is AttentionKind.LOCAL
        prices = SequencePrices.of([shape.fit for shape in self.shapes])
        self.square: list[float] = prices.square.tolist()
        self.linear: list[float] = prices.linear.tolist()
        self.each: list[float] = prices.each.tolist()
        self.fixed: list[float] = prices.fixed_s.tolist()
        self.degree = [shape.degree for shape in self.shapes]
        self.capacity = [shape.capacity_tokens for shape in self.shapes]
        self.num_teams = [shape.num_teams for shape in self.shapes]
        self.held = [None if shape.held.is_all else shape.held for shape in self.shapes]
        by_length = sorted(range(len(self.lengths)), key=lambda row: (-self.lengths[row], row))
        self.settled = [row for row in by_length if settled[row]]
        self.long_rows = [row for row in by_length if not settled[row]]
        self.place_of = {row: place for place, row in enumerate(self.long_rows)}
        sizes = [self.lengths[row] for row in self.long_rows]
        priced = price_table(sizes or [1], self.shapes).take_rows(range(len(sizes)))
        self.long: PriceTable = replace(priced, rows=np.array(self.long_rows, dtype=np.int64))
        self.local_load = self.lengths if self.held[0] is None else [self.load(row, 0) for row in range(len(lengths))]
        self.local_s = [self.marginal_s(row, 0) for row in range(len(self.lengths))]
        self._places: dict[int, tuple[IntArray, IntArray]] = {}

    def marginal_s(self, row: int, column: int) -> float:
        """Seconds the row adds to a group of the shape."""
        size = self.lengths[row]
        return (self.square[column] * size + self.linear[column]) * size + self.each[column]

    def load(self, row: int, column: int) -> int:
        """What the row takes of the shape's capacity (see ``GroupShape``)."""
        tokens = size = self.lengths[row]
        teams = self.num_teams[column]
        if teams > 1:
            chunks = 2 * teams
            whole, rest = divmod(size, chunks)
            tokens = 2 * whole + (0 if rest == 0 else 1 if chunks % rest == 0 else 2)
        held = self.held[column]
        return tokens if held is None else ceil(tokens * held.of(size) - HAIR)

    def loads(self, row: int) -> IntArray:
        """``load`` of a long row on every shape."""
        loads: IntArray = self.long.load_tokens[self.place_of[row]]
        return loads

    def longest_within(self, column: int, seconds: float, room: int) -> int:
        """Tokens of a sequence that surely adds at most ``seconds`` and ``room`` of load to such a group: the longest,
        but for a zigzag's remainders and for what long sequences swap."""
        spare_s = seconds - self.each[column]
        if spare_s <= 0 or room < 1:
            return 0
        square, linear = self.square[column], self.linear[column]
        root = sqrt(linear * linear + 4 * square * spare_s) + linear
        tokens = int(min(2 * spare_s / root * (1 - 1e-12), 2.0**60)) if root > 0 else 2**60
        if self.held[column] is not None:
            room = self.held_tokens(column, room)
        teams = self.num_teams[column]
        return min(tokens, (room - 2) // 2 * 2 * teams if teams > 1 else room)

    def held_tokens(self, column: int, load: int) -> int:
        """Tokens (of one team) of short sequences that so much load stands for: long ones may be more."""
        held = self.held[column]
        return load if held is None else int(min(load / max(held.at_zero, 1e-9) * (1 - 1e-12), 2.0**60))

    def places(self, degree: int) -> tuple[IntArray, IntArray]:
        """First ranks of the groups of this degree (see ``first_ranks``), and all ranks of each."""
        if degree not in self._places:
            firsts = first_ranks(degree, self.num_ranks, self.node_size)
            self._places[degree] = (firsts, firsts[:, None] + np.arange(degree, dtype=np.int64))
        return self._places[degree]


class Pool:
    """Rows still to be placed, by length."""

    def __init__(self, shop: Workshop, rows: Iterable[int]) -> None:
        self._shop_lengths = shop.lengths
        self._rows = sorted(rows, key=lambda row: (shop.lengths[row], -row))
        self._sizes = [shop.lengths[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shortest(self) -> int:
        return self._sizes[0]

    @property
    def longest(self) -> int:
        return self._sizes[-1]

    @property
    def sizes(self) -> list[int]:
        """Lengths, ascending; not to be changed."""
        return self._sizes

    def take_at_most(self, tokens: float) -> int | None:
        """Remove and return the longest row of at most so many tokens, or None."""
        place = bisect_right(self._sizes, tokens) - 1
        if place < 0:
            return None
        self._sizes.pop(place)
        return self._rows.pop(place)

    def put_back(self, row: int) -> None:
        """Undo the last ``take_at_most`` that returned this row."""
        size = self._shop_lengths[row]
        place = bisect_right(self._sizes, size)
        self._sizes.insert(place, size)
        self._rows.insert(place, row)

    @property
    def longest_row(self) -> int:
        return self._rows[-1]

    def longest_first(self) -> list[int]:
        return self._rows[::-1]


def fullest_with_room(batches: Iterable[Batch], most: int) -> Batch | None:
    """The one with the largest load up to ``most``, the first among equals."""
    best, best_load = None, -1
    for batch in batches:
        if best_load < batch.load <= most:
            best, best_load = batch, batch.load
    return best


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
