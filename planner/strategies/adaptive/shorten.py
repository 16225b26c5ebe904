"""Rounds made shorter by moving sequences between microbatches anywhere in the step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from planner.plan import AttentionKind
from planner.strategies.adaptive.priced_step import Batch
from planner.strategies.adaptive.rounds import Round
from planner.strategies.search.shapes import FloatArray, IntArray, PriceTable

LEAST_GAIN_S = 1e-5  # an exchange that gains less is not worth making


class Schedule:
    """All microbatches of some rounds as arrays, among them an empty one on every idle rank.

    ``microbatch_of``: where each row of the table is. By microbatch, ``busy_s``: the seconds it takes, or its fixed
    time while it is empty; ``room``: tokens of memory left. ``round_s``: the seconds of each round.
    """

    def __init__(self, table: PriceTable, rounds: SequenceOf[Round]) -> None:
        self.table = table
        found: list[tuple[int, Batch]] = []
        for number, each in enumerate(rounds):
            ranks = each.ranks_of_one()
            singles = [batch for batch in each.batches if batch.degree == 1]
            if table.shapes[0].kind is AttentionKind.LOCAL:
                singles += [Batch(0, 1, float(table.fixed_s[0])) for _ in ranks[len(singles) :]]
            for batch, rank in zip(singles, ranks, strict=False):
                batch.first_rank = rank
            shared = [batch for batch in each.batches if batch.degree > 1]
            found += [(number, batch) for batch in (*shared, *singles)]
        batches = [batch for _, batch in found]
        self.round: IntArray = np.array([number for number, _ in found], dtype=np.int64)
        self.column: IntArray = np.array([batch.column for batch in batches], dtype=np.int64)
        self.first_rank: IntArray = np.array([batch.first_rank for batch in batches], dtype=np.int64)
        self.microbatch_of: IntArray = np.zeros(table.num_rows, dtype=np.int64)
        for place, batch in enumerate(batches):
            self.microbatch_of[batch.rows] = place
        self.count: IntArray = np.array([len(batch.rows) for batch in batches], dtype=np.int64)
        self.busy_s: FloatArray = np.array([batch.seconds for batch in batches])
        loads = np.array([batch.load for batch in batches], dtype=np.int64)
        self.room: IntArray = table.capacity_tokens[self.column] - loads
        self.round_s: FloatArray = np.array([each.seconds for each in rounds])

    @property
    def seconds(self) -> float:
        """Of all rounds, one after the other."""
        return float(self.round_s.sum())

    def shorten(self, shares: SequenceOf[float]) -> None:
        """Bring every round down to each of these shares of its time, the shortest rounds first, as often as it goes.
        Coarse steps come first, fine ones last."""
        for share in shares:
            for number in np.argsort(self.round_s, kind="stable").tolist():
                while self.round_s[number] > 0 and self._lower(number, share * float(self.round_s[number])):
                    pass

    def exchange(self, max_visits: int) -> None:
        """Let the slowest microbatch of each round give a sequence away, or exchange it for a shorter one, as long as
        that shortens the round and makes no other longer."""
        waiting = list(range(len(self.round_s)))
        for _ in range(max_visits):
            waiting = [number for number in waiting if self._exchange_in(number)]

    def _lower(self, number: int, limit_s: float) -> bool:
        """Bring the round down to the limit by moving what takes longer; False, and nothing changed, where some of it
        has no other place."""
        before = self.microbatch_of, self.count, self.busy_s, self.room, self.round_s
        self.microbatch_of, self.count, self.room = self.microbatch_of.copy(), self.count.copy(), self.room.copy()
        self.busy_s, self.round_s = self.busy_s.copy(), self.round_s.copy()
        self.round_s[number] = limit_s
        late = self._members(number)
        late = late[self.busy_s[late] > limit_s]
        for source in late[np.argsort(-self.busy_s[late], kind="stable")].tolist():
            for row in self._removed(source, limit_s):
                taker = self._cheapest_place(row)
                if taker < 0:
                    self.microbatch_of, self.count, self.busy_s, self.room, self.round_s = before
                    return False
                self._change(row, taker, 1)
        self._measure(number)
        return True

    def _members(self, number: int) -> IntArray:
        """The microbatches of the round that are not empty."""
        return np.flatnonzero((self.round == number) & (self.count > 0))

    def _measure(self, number: int) -> None:
        self.round_s[number] = self.busy_s[self._members(number)].max(initial=0.0)

    def _removed(self, microbatch: int, limit_s: float) -> list[int]:
        """Take rows out until the rest ends within the limit: the shortest one that is enough, else the longest. The
        longest of them first."""
        rows = np.flatnonzero(self.microbatch_of == microbatch).tolist()
        marginal_s = self.table.marginal_s[rows, self.column[microbatch]].tolist()
        removed = []
        while rows and self.busy_s[microbatch] > limit_s:
            too_long_s = self.busy_s[microbatch] - limit_s
            place = min(int(np.searchsorted(marginal_s, too_long_s)), len(rows) - 1)
            marginal_s.pop(place)
            removed.append(rows.pop(place))
            self._change(removed[-1], microbatch, -1)
        return sorted(removed, reverse=True)

    def _change(self, row: int, microbatch: int, sign: int) -> None:
        """Add the row to the microbatch (1), or take it out (-1)."""
        column = self.column[microbatch]
        self.count[microbatch] += sign
        self.room[microbatch] -= sign * self.table.load_tokens[row, column]
        self.busy_s[microbatch] += sign * self.table.marginal_s[row, column]
        if self.count[microbatch] == 0:
            self.busy_s[microbatch] = self.table.fixed_s[column]  # without what rounding leaves
        self.microbatch_of[row] = microbatch

    def _cheapest_place(self, row: int) -> int:
        """The microbatch that takes the row within its round's time and its memory for the fewest rank seconds, of
        these the one with the least time left; -1 where there is none."""
        table = self.table
        marginal_s = table.marginal_s[row].take(self.column)
        spare_s = self.round_s.take(self.round) - self.busy_s - marginal_s
        places = np.flatnonzero((spare_s >= 0) & (self.room >= table.load_tokens[row].take(self.column)))
        if not len(places):
            return -1
        rank_s = (table.degrees * table.marginal_s[row]).take(self.column.take(places))
        return int(places[np.lexsort((spare_s.take(places), rank_s))[0]])

    def _exchange_in(self, number: int) -> bool:
        """Make the exchange that shortens the round's slowest microbatch most; False where there is none."""
        members = self._members(number)
        if not len(members):
            return False
        table = self.table
        slowest = int(members[np.argmax(self.busy_s[members])])
        column, rows = self.column[slowest], np.flatnonzero(self.microbatch_of == slowest)
        limit_s = self.round_s.copy()
        limit_s[number] = self.busy_s[slowest] - LEAST_GAIN_S
        spare_s = limit_s[self.round] - self.busy_s
        spare_s[slowest] = -np.inf
        # What may come back: any row of the step, or nothing from any microbatch.
        every, nothing = np.arange(table.num_rows), np.zeros(len(self.column))
        takers = np.concatenate((self.microbatch_of, np.arange(len(self.column))))
        theirs, now = self.column[takers], self.column[self.microbatch_of]
        gain_s = table.marginal_s[rows, column][:, None] - np.concatenate((table.marginal_s[:, column], nothing))
        added_s = table.marginal_s[rows].take(theirs, axis=1) - np.concatenate((table.marginal_s[every, now], nothing))
        added = table.load_tokens[rows].take(theirs, axis=1) - np.concatenate((table.load_tokens[every, now], nothing))
        back = np.concatenate((table.load_tokens[:, column], nothing)) - table.load_tokens[rows, column][:, None]
        possible = (added_s <= spare_s[takers]) & (added <= self.room[takers])
        possible &= (gain_s > LEAST_GAIN_S) & (back <= self.room[slowest])
        # A round is no shorter than its second slowest microbatch, so more than that much gain is worth no more.
        others_s = self.busy_s[members[members != slowest]].max(initial=0.0)
        gain_s = np.where(possible, np.minimum(gain_s, self.busy_s[slowest] - others_s + LEAST_GAIN_S), 0.0)
        best, other = np.unravel_index(int(np.argmax(gain_s)), gain_s.shape)
        if gain_s[best, other] <= LEAST_GAIN_S:
            return False
        self._change(int(rows[best]), slowest, -1)
        if other < table.num_rows:
            self._change(int(other), int(takers[other]), -1)
            self._change(int(other), slowest, 1)
        self._change(int(rows[best]), int(takers[other]), 1)
        self._measure(number)
        return True
