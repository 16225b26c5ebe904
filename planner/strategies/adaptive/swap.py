"""Rounds in lockstep, shortened by single sequences that change places.

A round lasts as long as its slowest microbatch. That one gives a sequence to another microbatch, anywhere in the step,
or swaps one for a shorter one, as far as memory allows and no other round gets longer, until nothing shortens a round
any more. The steps are counted, not timed.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from planner.strategies.adaptive.rounds import Round, rebuilt
from planner.strategies.adaptive.workshop import Workshop
from planner.strategies.search.shapes import FloatArray, IntArray, price_table

MOVES_PER_VISIT = 12
LEAST_GAIN_S = 1e-5
PRICE_OF_USE = 1e-3  # of a second used up elsewhere: of equally good moves the one that uses up less is made


def swap_rows(shop: Workshop, rounds: SequenceOf[Round], max_steps: int) -> list[Round]:
    """Rounds of the same sequences that together take no longer. ``rounds`` stay what they are."""
    state = _State(shop, rounds)
    waiting, steps = list(range(len(rounds))), 0
    while waiting and steps < max_steps:
        for number in tuple(waiting):
            for _ in range(MOVES_PER_VISIT):
                steps += 1
                if not state.shorten(number):
                    waiting.remove(number)
                    break
                if steps >= max_steps:
                    return state.rounds()
    return state.rounds()


class _State:
    """Microbatches as arrays: column of the table, load, seconds, round; and where each row is."""

    def __init__(self, shop: Workshop, rounds: SequenceOf[Round]) -> None:
        self.shop = shop
        found = [(number, batch) for number, each in enumerate(rounds) for batch in each.batches]
        self.columns = sorted({batch.column for _, batch in found})
        place_of = {column: place for place, column in enumerate(self.columns)}
        table = price_table(shop.lengths, [shop.shapes[column] for column in self.columns])
        self.marginal_s, self.loads, self.capacity = table.marginal_s, table.load_tokens, table.capacity_tokens
        self.column: IntArray = np.array([place_of[batch.column] for _, batch in found], dtype=np.int64)
        self.load: IntArray = np.array([batch.load for _, batch in found], dtype=np.int64)
        self.seconds: FloatArray = np.array([batch.seconds for _, batch in found])
        self.round: IntArray = np.array([number for number, _ in found], dtype=np.int64)
        self.round_s: FloatArray = np.array([each.seconds for each in rounds])
        self.rows = [list(batch.rows) for _, batch in found]
        self.batch_of: IntArray = np.zeros(len(shop.lengths), dtype=np.int64)
        for place, rows in enumerate(self.rows):
            self.batch_of[rows] = place
        every = np.arange(len(self.batch_of))  # what each row takes where it is
        self.now_s: FloatArray = self.marginal_s[every, self.column[self.batch_of]]
        self.now_load: IntArray = self.loads[every, self.column[self.batch_of]]

    def shorten(self, number: int) -> bool:
        """Make the best move that shortens the slowest microbatch of the round; False where there is none."""
        members = np.flatnonzero(self.round == number)
        slowest = int(members[np.argmax(self.seconds[members])])
        rows = np.array(self.rows[slowest], dtype=np.int64)
        if not len(rows):
            return False  # all of the round's sequences have left it
        top_s = float(self.seconds[slowest])
        others_s = self.seconds[members[members != slowest]]
        wanted_s = top_s - float(others_s.max(initial=0.0)) + LEAST_GAIN_S  # more is worth no more
        limit_s = self.round_s[self.round]
        limit_s[members] = top_s - LEAST_GAIN_S
        spare_s, room = limit_s - self.seconds, self.capacity[self.column] - self.load
        spare_s[slowest] = -np.inf
        given = self._best_gift(rows, self.column[slowest], spare_s, room, wanted_s)
        swapped = self._best_swap(rows, slowest, spare_s, room, wanted_s)
        if max(given[0], swapped[0]) <= LEAST_GAIN_S:
            return False
        if given[0] >= swapped[0]:
            self._move(given[1], given[2])
        else:
            _, row, back = swapped
            taker = int(self.batch_of[back])
            self._move(row, taker)
            self._move(back, slowest)
        self.round_s[number] = self.seconds[members].max()
        return True

    def _best_gift(
        self, rows: IntArray, column: int, spare_s: FloatArray, room: IntArray, wanted_s: float
    ) -> tuple[float, int, int]:
        """Worth (seconds), row and batch of the best move of one row."""
        there_s = self.marginal_s[rows].take(self.column, axis=1)
        possible = (there_s <= spare_s) & (self.loads[rows].take(self.column, axis=1) <= room)
        worth = np.minimum(self.marginal_s[rows, column], wanted_s)[:, None] - PRICE_OF_USE * there_s
        worth = np.where(possible, worth, -np.inf)
        row, batch = np.unravel_index(int(np.argmax(worth)), worth.shape)
        return float(worth[row, batch]), int(rows[row]), int(batch)

    def _best_swap(
        self, rows: IntArray, slowest: int, spare_s: FloatArray, room: IntArray, wanted_s: float
    ) -> tuple[float, int, int]:
        """Worth (seconds), row and the row that comes back for it."""
        column, theirs = self.column[slowest], self.column[self.batch_of]
        gain_s = self.marginal_s[rows, column][:, None] - self.marginal_s[:, column]
        added_s = self.marginal_s[rows].take(theirs, axis=1) - self.now_s
        added = self.loads[rows].take(theirs, axis=1) - self.now_load
        returned = self.loads[:, column] - self.loads[rows, column][:, None]
        possible = (added_s <= spare_s[self.batch_of]) & (added <= room[self.batch_of])
        possible &= (gain_s > LEAST_GAIN_S) & (returned <= room[slowest])
        worth = np.minimum(gain_s, wanted_s) - PRICE_OF_USE * np.maximum(added_s, 0.0)
        worth = np.where(possible, worth, -np.inf)
        row, back = np.unravel_index(int(np.argmax(worth)), worth.shape)
        return float(worth[row, back]), int(rows[row]), int(back)

    def _move(self, row: int, taker: int) -> None:
        giver = int(self.batch_of[row])
        for batch, sign in ((giver, -1), (taker, 1)):
            self.seconds[batch] += sign * self.marginal_s[row, self.column[batch]]
            self.load[batch] += sign * self.loads[row, self.column[batch]]
        self.rows[giver].remove(row)
        self.rows[taker].append(row)
        self.batch_of[row] = taker
        self.now_s[row] = self.marginal_s[row, self.column[taker]]
        self.now_load[row] = self.loads[row, self.column[taker]]

    def rounds(self) -> list[Round]:
        """The state as rounds of new microbatches."""
        return rebuilt(self.shop, [self.columns[place] for place in self.column.tolist()], self.rows)
