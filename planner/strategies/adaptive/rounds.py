"""Rounds of microbatches side by side, packed one after another.

All ranks wait for each other after each round, so a round's time and memory should be used up on every rank. A round
begins with the longest sequence left. It may take ``slack`` times what the sequences left need on average in as many
rounds as their memory takes; or as long as its first sequence takes, on the cheapest group that runs it within
``stretch`` times that. Then group after group is opened by the longest sequence left that ends in time on the cheapest
group for it (``skipped``: so many of the smallest left out: larger ones cost more and waste less), and filled: of the
sequences that fit, the longest one after which average sequences can still fill the group's memory in the time left,
again and again. What comes out is legal whatever these numbers are; they only make it good.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, inf

import numpy as np

from planner.strategies.adaptive.priced_step import Batch, PricedStep
from planner.strategies.search.bounds import cheapest_columns
from planner.strategies.search.shapes import FloatArray, IntArray, PriceTable

TOLERANCE = 1 + 1e-9


@dataclass(slots=True)
class Round:
    """Microbatches side by side. Groups of several ranks lie inside a node where they fit one, else they begin with a
    node; ``taken``: how many ranks of each node they have, from its first one. Single ranks are what is left."""

    num_ranks: int
    node_size: int
    batches: list[Batch] = field(default_factory=list)
    num_free: int = field(init=False)
    taken: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_free = self.num_ranks
        self.taken = [0] * -(-self.num_ranks // self.node_size)

    @property
    def seconds(self) -> float:
        return max((batch.seconds for batch in self.batches), default=0.0)

    def take(self, batch: Batch) -> bool:
        """Add the microbatch where there are ranks for it."""
        if batch.degree > self.num_free or (batch.degree > 1 and not self._place(batch)):
            return False
        self.num_free -= batch.degree
        self.batches.append(batch)
        return True

    def _place(self, batch: Batch) -> bool:
        """Give the group its ranks: in the fullest node that has room, or on the first nodes that are empty."""
        left, size, taken = batch.degree, self.node_size, self.taken
        if left <= size:
            roomy = [node for node, used in enumerate(taken) if used + left <= min(size, self.num_ranks - node * size)]
            node = max(roomy, key=taken.__getitem__, default=-1)
        else:
            starts = range((self.num_ranks - left) // size + 1)
            node = next((node for node in starts if not any(taken[node : node + -(-left // size)])), -1)
        if node < 0:
            return False
        batch.first_rank = node * size + taken[node]
        while left:
            used = min(left, size - taken[node])
            taken[node] += used
            left -= used
            node += 1
        return True

    def ranks_of_one(self) -> list[int]:
        """Ranks that are in no group of several ranks."""
        size = self.node_size
        return [rank for rank in range(self.num_ranks) if rank % size >= self.taken[rank // size]]


def rounds_s(rounds: Iterable[Round]) -> float:
    """Seconds of all rounds, one after the other."""
    return sum(each.seconds for each in rounds)


class Packer:
    """Packs the rows of a step, all of them long, into rounds."""

    def __init__(self, step: PricedStep) -> None:
        self.num_ranks, self.node_size = step.num_ranks, step.node_size
        self.table = table = step.long
        self.work_s, self.memory = _least(table, table.marginal_s), _least(table, table.memory_shares)
        self.alone_s: FloatArray = table.marginal_s + table.fixed_s
        self.degrees, self.fixed_s = table.degrees.tolist(), table.fixed_s.tolist()
        self.capacity = table.capacity_tokens.tolist()
        # Read one at a time, so as lists, by shape, then row. The last two never fall from one row to the next.
        self.marginal_s, self.loads = table.marginal_s.T.tolist(), table.load_tokens.T.tolist()
        self.most_load = np.maximum.accumulate(table.load_tokens, axis=0).T.tolist()
        # By shape, seconds that average sequences take for a token of memory, and each row's seconds above that.
        token_s = table.marginal_s.sum(axis=0) / np.maximum(table.load_tokens.sum(axis=0), 1)
        self.token_s = token_s.tolist()
        self.excess_s = np.maximum.accumulate(table.marginal_s - token_s * table.load_tokens, axis=0).T.tolist()

    def pack(self, slack: float, stretch: float, skipped: int, give_up_s: float = inf) -> list[Round] | None:
        """Rounds of all rows; None where they surely take longer than ``give_up_s``."""
        rows = list(range(self.table.num_rows))
        fixed_s, spent_s = min(self.fixed_s), 0.0
        rounds: list[Round] = []
        while rows:
            rest_s = float(self.work_s[rows].sum()) / self.num_ranks
            num_left = max(1, ceil(float(self.memory[rows].sum()) / self.num_ranks - 1e-9))
            if spent_s + num_left * fixed_s + rest_s > give_up_s * TOLERANCE:
                return None
            level_s = slack * (fixed_s + rest_s / num_left)
            column = int(cheapest_columns(self.table.take_rows(rows[-1:]), stretch * level_s)[0])
            limit_s = max(level_s, float(self.alone_s[rows[-1], column])) * TOLERANCE
            rounds.append(self._pack_round(rows, column, limit_s, skipped))
            spent_s += rounds[-1].seconds
        return rounds

    def _pack_round(self, left: list[int], first_column: int, limit_s: float, skipped: int) -> Round:
        """One round of rows taken from ``left``; the longest of them goes to a group of ``first_column``."""
        columns = self._cheapest(limit_s, skipped)
        columns[left[-1]] = first_column
        in_time = self.alone_s[np.arange(len(columns)), columns] <= limit_s
        degrees = np.where(in_time, self.table.degrees[columns], self.num_ranks + 1).tolist()
        packed = Round(self.num_ranks, self.node_size)
        place, most = len(left), self.num_ranks
        while place > 0 and most > 0:
            place -= 1
            row = left[place]
            if degrees[row] > most:
                continue
            batch = Batch(int(columns[row]), degrees[row], self.fixed_s[columns[row]])
            if not packed.take(batch):
                most = degrees[row] - 1  # neither is there room for more
                continue
            self._add(batch, left.pop(place))
            self._fill(batch, left, limit_s)
            place, most = bisect_left(left, row), min(most, packed.num_free)
        return packed

    def _cheapest(self, limit_s: float, skipped: int) -> IntArray:
        """By row, the column of the cheapest group that runs it alone in this time, else of the quickest one; so many
        of the smallest groups are left out."""
        columns = range(min(skipped, len(self.degrees) - 1), len(self.degrees))
        return columns[0] + cheapest_columns(self.table.take_shapes(columns), limit_s)

    def _fill(self, batch: Batch, left: list[int], limit_s: float) -> None:
        """Move rows from ``left`` into the group until its time or memory is used up, see above."""
        column = batch.column
        marginal_s, loads, excess_s = self.marginal_s[column], self.most_load[column], self.excess_s[column]
        while left:
            left_s, room = limit_s - batch.seconds, self.capacity[column] - batch.load
            end = min(bisect_right(marginal_s, left_s), bisect_right(loads, room))
            fillable = bisect_right(excess_s, left_s - self.token_s[column] * room)
            if fillable:
                end = min(end, max(fillable, left[0] + 1))
            place = bisect_left(left, end) - 1
            if place < 0:
                return
            self._add(batch, left.pop(place))

    def _add(self, batch: Batch, row: int) -> None:
        batch.add(row, self.loads[batch.column][row], self.marginal_s[batch.column][row])


def _least(table: PriceTable, per_rank: FloatArray) -> FloatArray:
    """By row, the least of this that all ranks of a group take together."""
    least: FloatArray = np.where(table.fits, table.degrees * per_rank, np.inf).min(axis=1)
    return least
