"""Where memory is scarce every microbatch costs a fixed time, so memory must not be left over: packing and filling."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from math import inf, sqrt

import numpy as np

from planner.strategies.adaptive.workshop import Batch, Pool, Workshop, fullest_with_room
from planner.strategies.search.shapes import FloatArray

SHORT_SHARE = 0.5  # of the pool's tokens: the short ones that any memory can be filled up with


def pack_groups(shop: Workshop, shared: SequenceOf[tuple[int, int]], makespan_s: float) -> list[Batch]:
    """Rows with their columns, largest degree and longest first, to groups under memory and time.

    A row joins the group where it costs the fewest rank seconds, the fullest among equals, unless a group of its own
    costs less: there it pays its memory's share of the fixed time as well.
    """
    groups: list[Batch] = []
    size = len(shared)
    column_of = np.zeros(size, dtype=np.int64)
    load_of, seconds_of = np.zeros(size, dtype=np.int64), np.zeros(size)
    square, linear, each = np.array(shop.square), np.array(shop.linear), np.array(shop.each)
    degree, loads_of = np.array(shop.degree), shop.loads
    capacity = np.array(shop.capacity)
    for row, column in shared:
        count = len(groups)
        tokens = shop.lengths[row]
        own_s = shop.marginal_s(row, column)
        share = shop.load(row, column) / max(shop.capacity[column], 1)
        own_cost = shop.degree[column] * (own_s + share * shop.fixed[column])
        place = -1
        if count:
            columns = column_of[:count]
            marginals = (square[columns] * tokens + linear[columns]) * tokens + each[columns]
            loads = loads_of(row)[columns]
            costs = degree[columns] * marginals
            fits = (load_of[:count] + loads <= capacity[columns]) & (seconds_of[:count] + marginals <= makespan_s)
            costs = np.where(fits & (costs <= own_cost), costs, inf)
            if np.isfinite(costs).any():
                place = int(np.lexsort((-load_of[:count] / capacity[columns], costs))[0])
        if place < 0:
            place = count
            groups.append(Batch(column, shop.degree[column], shop.fixed[column]))
            column_of[place], seconds_of[place] = column, shop.fixed[column]
        batch = groups[place]
        batch.add(row, shop.load(row, batch.column), shop.marginal_s(row, batch.column))
        load_of[place], seconds_of[place] = batch.load, batch.seconds
    return groups


def fill_groups(shop: Workshop, groups: SequenceOf[Batch], pool: Pool, makespan_s: float) -> None:
    """Fill memory that groups leave over with the pool's longest rows that fit, where the extra rank seconds of a token
    are below its share of a local microbatch's fixed time. Cheapest shapes first."""
    if not shop.has_local or not pool:
        return
    price_s = shop.fixed[0] / max(shop.held_tokens(0, shop.capacity[0]), 1)
    extra_s = [degree * linear - shop.linear[0] for degree, linear in zip(shop.degree, shop.linear, strict=True)]
    for batch in sorted(groups, key=lambda batch: (extra_s[batch.column], -batch.degree, batch.rows[0])):
        column = batch.column
        if extra_s[column] > price_s:
            break
        while pool:
            room = shop.capacity[column] - batch.load
            row = pool.take_at_most(shop.longest_within(column, makespan_s - batch.seconds, room))
            if row is None:
                break
            batch.add(row, shop.load(row, column), shop.marginal_s(row, column))


def fill_ranks(shop: Workshop, pool: Pool, free_s: FloatArray, makespan_s: float) -> list[list[Batch]]:
    """Local microbatches for rank after rank, each rank filled in time and memory; rows that do not fit stay in the
    pool. ``free_s`` moves on.

    A row of s tokens takes a s^2 + b s + c seconds. Say short rows take rho seconds a token. A rank with t seconds and
    m tokens of memory left has the excess t - rho m: it is used up by longer rows, whose own excess is their seconds
    above rho s. So the longest row whose excess fits is taken again and again, and the short ones fill the rest.
    """
    stacks: list[list[Batch]] = [[] for _ in range(shop.num_ranks)]
    if not shop.has_local or not pool:
        return stacks
    filler = _Filler(shop, pool)
    wanted = [(filler.excess_s(makespan_s - free), rank) for rank, free in enumerate(free_s.tolist())]
    for _, rank in sorted(wanted, key=lambda item: (-item[0], item[1])):
        if not pool:
            break
        stacks[rank] = filler.fill(rank, makespan_s - float(free_s[rank]))
        free_s[rank] += sum(batch.seconds for batch in stacks[rank])
    return stacks


class _Filler:
    """Fills single ranks from the pool. ``rho``: seconds a token of the pool's short rows."""

    def __init__(self, shop: Workshop, pool: Pool) -> None:
        self.shop, self.pool = shop, pool
        self.square, self.linear, self.each = shop.square[0], shop.linear[0], shop.each[0]
        self.fixed_s, self.capacity = shop.fixed[0], shop.capacity[0]
        self.tokens = shop.held_tokens(0, self.capacity)
        half, tokens, count, squares = SHORT_SHARE * sum(pool.sizes), 0, 0, 0
        for size in pool.sizes:
            tokens, count, squares = tokens + size, count + 1, squares + size * size
            if tokens >= half:
                break
        self.rho = (self.square * squares + self.linear * tokens + self.each * count) / tokens

    def num_batches(self, left_s: float) -> int:
        """The fewest microbatches whose memory takes what short rows can do in the time, but for a fixed time."""
        number = 1
        while self.left_over_s(left_s, number) > self.fixed_s:
            number += 1
        return number

    def left_over_s(self, left_s: float, number: int) -> float:
        """What is left of the time once so many microbatches are full of short rows; negative where they are not."""
        return left_s - number * (self.fixed_s + self.rho * self.tokens)

    def excess_s(self, left_s: float) -> float:
        """``left_over_s`` of as many microbatches as the rank will get."""
        return self.left_over_s(left_s, self.num_batches(left_s))

    def fill(self, rank: int, left_s: float) -> list[Batch]:
        """Microbatches for one rank with ``left_s`` seconds left."""
        number = self.num_batches(left_s)
        left_s -= number * self.fixed_s
        batches = [Batch(0, 1, self.fixed_s, first_rank=rank) for _ in range(number)]
        room = number * self.tokens
        while self.pool and left_s > 0:
            tokens = self.longest_by_excess(left_s - self.rho * room)
            most = self.capacity - min([batch.load for batch in batches])
            tokens = min(max(tokens, self.pool.shortest), self.shop.longest_within(0, left_s, most))
            row = self.pool.take_at_most(tokens)
            if row is None:
                break
            size, seconds = self.shop.lengths[row], self.shop.local_s[row]
            load = self.shop.local_load[row]
            batch = fullest_with_room(batches, self.capacity - load)
            assert batch is not None  # the emptiest one has room
            batch.add(row, load, seconds)
            left_s, room = left_s - seconds, room - size
        return [batch for batch in batches if batch.rows]

    def longest_by_excess(self, excess_s: float) -> float:
        """Tokens of the longest row with at most this excess; no limit where memory outlasts the time."""
        if excess_s < 0:
            return inf
        spare_s, linear = excess_s - self.each, self.linear - self.rho
        root = linear * linear + 4 * self.square * spare_s
        if self.square <= 0 or root < 0:
            return 0.0 if spare_s < 0 else inf
        return (sqrt(root) - linear) / (2 * self.square)
