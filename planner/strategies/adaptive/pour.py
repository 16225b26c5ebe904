"""Rounds for lockstep, one after another: each is given a time, and its ranks are filled to that time and to memory.

A rank has a round's seconds and its memory, and both should be used up. Per token a row of s tokens works a s + b
seconds, so a group that is full of tokens ends in time only where its rows are neither too long nor too short in the
mean. A round starts with the longest row left. Its time is ``level`` times what the rows left need in the mean of as
many rounds as their memory takes, or what the first row takes on its shape: the cheapest that runs it in ``reach``
times that. Then group after group is opened by the longest row left that ends in time, on its cheapest shape of at
least ``least_degree`` ranks (larger groups cost more and waste less), and filled: of the rows left the longest one
after which short rows would fill the rest of memory in the time left, again and again.

Nothing here depends on the clock. What comes out is legal whatever the three numbers; they only make it good.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from planner.pricing.microbatch import SequencePrices
from planner.strategies.adaptive.rounds import Round
from planner.strategies.adaptive.workshop import Batch, Pool, Workshop
from planner.strategies.search.bounds import cheapest_columns
from planner.strategies.search.shapes import IntArray, PriceTable, price_table

NUM_VOTERS = 64  # rows that say which shapes are worth pouring into
SHORT_SHARE = 0.5  # of all tokens: the short rows that fill what is left of a group
MAX_REFUSALS = 12  # rows that open no group in a round before it is closed
HAIR = 1 + 1e-9
# (level, reach, least degree), see ``Pour``: each one the best complement to those before it on 28 steps of 512
# sequences on 64 ranks (seeds 0 and 11 .. 16 of the benchmark's zero3 setting).
WAYS = (
    (1.15, 1.7, 1), (1.1, 1.3, 1), (1.2, 3.0, 1), (1.03, 1.3, 1), (1.06, 1.7, 1), (1.3, 1.0, 1), (1.3, 2.2, 2),
    (1.1, 2.2, 1), (1.03, 1.7, 1), (1.1, 3.0, 1), (1.03, 2.2, 1), (1.1, 1.7, 2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pour:
    """How rounds are poured, see above."""

    level: float
    reach: float
    least_degree: int


class Pourer:
    """What all pours of a step share: prices of all rows on the shapes that some row may choose."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.order = sorted(range(len(shop.lengths)), key=lambda row: (-shop.lengths[row], row))
        self.place_of = {row: place for place, row in enumerate(self.order)}
        sizes = np.array([shop.lengths[row] for row in self.order], dtype=np.int64)
        self.columns = _worth_pouring(sizes, shop)
        self.table = price_table(sizes, [shop.shapes[column] for column in self.columns])
        work_s = np.where(self.table.fits, self.table.degrees * self.table.marginal_s, inf).min(axis=1)
        memory = np.where(self.table.fits, self.table.degrees * self.table.memory_shares, inf).min(axis=1)
        self.work_s = (work_s / shop.num_ranks).tolist()  # by place: of all ranks, without fixed times
        self.memory = (memory / shop.num_ranks).tolist()  # by place: share of all ranks' memory
        self.fixed_s = float(self.table.fixed_s.min())
        self.rho = self._short_rho(sizes)
        self._choices: dict[tuple[int, float], IntArray] = {}
        self._tables: dict[int, tuple[IntArray, PriceTable]] = {}

    def _short_rho(self, sizes: IntArray) -> list[float]:
        """By column of the workshop: seconds a token of the short rows."""
        shop = self.shop
        ascending = sizes[::-1]
        count = int(np.searchsorted(np.cumsum(ascending), SHORT_SHARE * float(sizes.sum()))) + 1
        short = ascending[:count].astype(np.float64)
        tokens, squares = float(short.sum()), float(short @ short)
        prices = SequencePrices.of([shape.fit for shape in shop.shapes])
        rho: list[float] = (prices.sums_s(tokens, squares, len(short)) / tokens).tolist()
        return rho

    def columns_within(self, seconds: float, least_degree: int) -> IntArray:
        """By place: the workshop's column of the cheapest shape of at least so many ranks that runs the row alone in
        this time, the quickest where none does."""
        key = least_degree, seconds
        if key not in self._choices:
            if least_degree not in self._tables:
                least = min(least_degree, int(self.table.degrees.max()))
                allowed = np.flatnonzero(self.table.degrees >= least)
                self._tables[least_degree] = allowed, self.table.take_shapes(allowed.tolist())
            allowed, table = self._tables[least_degree]
            self._choices[key] = np.array(self.columns)[allowed[cheapest_columns(table, seconds)]]
        return self._choices[key]

    def first_column(self, place: int, seconds: float) -> int:
        return self.columns[int(cheapest_columns(self.table.take_rows([place]), seconds)[0])]

    def pour(self, way: Pour, give_up_s: float = inf) -> list[Round] | None:
        """Rounds of all rows; None where they surely take ``give_up_s`` or longer."""
        shop = self.shop
        pool = Pool(shop, range(len(shop.lengths)))
        rest_s, rest_memory = sum(self.work_s), sum(self.memory)
        rounds: list[Round] = []
        spent_s = 0.0
        while pool:
            num_left = max(1, ceil(rest_memory - 1e-9))
            if spent_s + num_left * self.fixed_s + rest_s > give_up_s * HAIR:
                return None
            level_s = way.level * (self.fixed_s + rest_s / num_left)
            first = pool.longest_row
            column = self.first_column(self.place_of[first], way.reach * level_s)
            limit_s = max(level_s, shop.fixed[column] + shop.marginal_s(first, column)) * HAIR
            rounds.append(self._fill_round(pool, column, limit_s, way.least_degree))
            spent_s += rounds[-1].seconds
            places = [self.place_of[row] for batch in rounds[-1].batches for row in batch.rows]
            rest_s -= sum(self.work_s[place] for place in places)
            rest_memory -= sum(self.memory[place] for place in places)
        return rounds

    def _fill_round(self, pool: Pool, first_column: int, limit_s: float, least_degree: int) -> Round:
        """One round of rows out of the pool, at least of its longest one, which goes to ``first_column``."""
        shop = self.shop
        columns = self.columns_within(limit_s, least_degree)
        degrees: IntArray | None = None
        poured = Round(num_free=shop.num_ranks)
        most, num_refused = inf, 0
        while poured.num_free and num_refused < MAX_REFUSALS:
            row = pool.take_at_most(most)
            if row is None:
                break
            column = int(columns[self.place_of[row]]) if poured.batches else first_column
            batch = Batch(column, shop.degree[column], shop.fixed[column])
            batch.add(row, shop.load(row, column), shop.marginal_s(row, column))
            if batch.seconds <= limit_s and poured.take(batch, shop.num_ranks, shop.node_size):
                self._fill_batch(batch, pool, limit_s)
                continue
            pool.put_back(row)
            num_refused += 1
            most = shop.lengths[row] - 1
            if shop.degree[column] > poured.num_free:
                degrees = np.array(shop.degree)[columns] if degrees is None else degrees
                narrow = degrees <= poured.num_free
                if not narrow.any():
                    break
                most = min(most, shop.lengths[self.order[int(np.argmax(narrow))]])
        return poured

    def _fill_batch(self, batch: Batch, pool: Pool, limit_s: float) -> None:
        """Rows out of the pool until time or memory is used up, see above."""
        shop, column = self.shop, batch.column
        shape, rho = shop.shapes[column], self.rho[column]
        while pool:
            left_s, room = limit_s - batch.seconds, shape.capacity_tokens - batch.load
            if left_s <= 0 or room <= 0:
                return
            excess_s = left_s - rho * shape.num_teams * shape.short_tokens(room)
            tokens = inf
            if excess_s >= 0:
                tokens = max(shape.fit.longest_within(excess_s, credit_s_per_token=rho), pool.shortest)
            row = pool.take_at_most(min(tokens, shape.longest_within(left_s, room)))
            if row is None:
                return
            batch.add(row, shop.load(row, column), shop.marginal_s(row, column))


def _worth_pouring(sizes: IntArray, shop: Workshop) -> list[int]:
    """Columns that are, for some of a sample of rows, both cheaper than every quicker shape and quicker than every
    cheaper one; the longest rows are all asked. ``sizes``: longest first."""
    sample = np.unique(np.concatenate((sizes[:NUM_VOTERS], sizes[:: -(-len(sizes) // NUM_VOTERS)])))
    table = price_table(sample, shop.shapes)
    alone_s = np.where(table.fits, table.marginal_s + table.fixed_s, inf)
    charges = np.where(table.fits, table.degrees * (table.marginal_s + table.fixed_s * table.memory_shares), inf)
    order = np.argsort(charges, axis=1, kind="stable")
    ranked_s = np.take_along_axis(alone_s, order, axis=1)
    quickest_s = np.minimum.accumulate(ranked_s, axis=1)
    best = np.ones(ranked_s.shape, dtype=np.bool_)
    best[:, 1:] = ranked_s[:, 1:] < quickest_s[:, :-1]
    chosen = set(order[best & np.isfinite(ranked_s)].tolist())
    return sorted(chosen | ({0} if shop.has_local else set()))
