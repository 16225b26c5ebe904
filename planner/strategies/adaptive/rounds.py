"""``adaptive`` where all ranks move in lockstep: microbatches of like duration side by side, then squeezed.

A round lasts as long as its slowest microbatch, so a schedule built without barriers is put into rounds anew: longest
microbatch first, each into the first round with ranks left for it. It is never longer than what is there already, so
only the first of a round costs time. Then rounds are squeezed one after the other: a round gets a shorter limit, and
what sticks out moves to microbatches anywhere that have time and memory left for it, or opens one on ranks that would
have idled. A squeeze that leaves a sequence without a place is undone. The tries are counted, not timed.

The runtime starts a microbatch in the first round in which its ranks have nothing else (``planner.pricing.lockstep``).
With the longest round first, one that moves up so finds a round at least as long: the step is never slower than planned
here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from planner.strategies.adaptive.workshop import Batch, Workshop
from planner.strategies.search.shapes import FloatArray, IntArray, price_table

SHARES = (0.0, 0.7, 0.85, 0.93, 0.97, 0.99)  # of a round's seconds: the limits tried, coarse ones first
HAIR_S = 1e-9
MAX_SQUEEZES = 240
MAX_WORK = 1_500_000  # squeezes times microbatches: large steps get fewer

Scalar = TypeVar("Scalar", np.float64, np.int64)
_Arrays = tuple[IntArray, IntArray, IntArray, FloatArray, IntArray, FloatArray, FloatArray, FloatArray, IntArray]


@dataclass(slots=True)
class Round:
    """Microbatches side by side: ranks left, and the degrees of those of several ranks, largest first."""

    num_free: int
    batches: list[Batch] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max((batch.seconds for batch in self.batches), default=0.0)

    def take(self, batch: Batch, num_ranks: int, node_size: int) -> bool:
        """Add the microbatch where there are ranks for it."""
        if batch.degree > self.num_free:
            return False
        if batch.degree > 1:
            degrees = sorted([*self.degrees, batch.degree], reverse=True)
            if place_degrees(degrees, num_ranks, node_size) is None:
                return False
            self.degrees = degrees
        self.num_free -= batch.degree
        self.batches.append(batch)
        return True


def rounds_s(rounds: Iterable[Round]) -> float:
    """Seconds of all rounds, one after the other."""
    return sum(each.seconds for each in rounds)


def align(batches: Iterable[Batch], *, num_ranks: int, node_size: int) -> list[Round]:
    """Rounds of these microbatches, the longest first. The microbatches stay what they are."""
    rounds: list[Round] = []
    for batch in sorted(batches, key=lambda batch: (-batch.seconds, -batch.degree, batch.rows[0])):
        degree = batch.degree
        if not any(each.take(batch, num_ranks, node_size) for each in rounds if degree <= each.num_free):
            rounds.append(Round(num_free=num_ranks))
            rounds[-1].take(batch, num_ranks, node_size)
    return rounds


def rebuilt(shop: Workshop, columns: SequenceOf[int], rows: SequenceOf[SequenceOf[int]]) -> list[Round]:
    """Rounds of new microbatches with these columns and rows, those without rows left out; loads and seconds are added
    up again."""
    found = []
    for column, members in zip(columns, rows, strict=True):
        if members:
            batch = Batch(column, shop.degree[column], shop.fixed[column])
            for row in members:
                batch.add(row, shop.load(row, column), shop.marginal_s(row, column))
            found.append(batch)
    return align(found, num_ranks=shop.num_ranks, node_size=shop.node_size)


def place_degrees(degrees: SequenceOf[int], num_ranks: int, node_size: int) -> list[int] | None:
    """First ranks of groups of these degrees, largest first, side by side: inside a node those that fit one, from the
    start of a node the larger ones. None where there is no room."""
    sizes = [min(node_size, num_ranks - first) for first in range(0, num_ranks, node_size)]
    taken = [0] * len(sizes)
    firsts = []
    node, before = 0, 0
    for degree in degrees:
        span = -(-degree // node_size)
        node = node if degree == before else 0  # nodes without room for one group have none for its like
        before = degree
        while node + span <= len(sizes):
            if span == 1:
                if taken[node] + degree <= sizes[node]:
                    break
            elif not any(taken[node : node + span]) and node * node_size + degree <= num_ranks:
                break
            node += 1
        else:
            return None
        firsts.append(node * node_size + taken[node])
        if span == 1:
            taken[node] += degree
        else:
            taken[node : node + span] = sizes[node : node + span]
            taken[node + span - 1] = degree - (span - 1) * node_size
    return firsts


def in_order(rounds: Iterable[Round], *, num_ranks: int, node_size: int) -> list[Batch]:
    """All microbatches with their ranks, round by round, the longest round first."""
    ordered: list[Batch] = []
    for each in sorted(rounds, key=lambda each: -each.seconds):
        shared = sorted((batch for batch in each.batches if batch.degree > 1), key=lambda batch: -batch.degree)
        firsts = place_degrees([batch.degree for batch in shared], num_ranks, node_size)
        assert firsts is not None  # ``Round.take`` has seen to it
        left = np.ones(num_ranks, dtype=np.bool_)
        for batch, first in zip(shared, firsts, strict=True):
            batch.first_rank = first
            left[first : first + batch.degree] = False
        singles = [batch for batch in each.batches if batch.degree == 1]
        for batch, rank in zip(singles, np.flatnonzero(left).tolist(), strict=False):
            batch.first_rank = rank
        ordered += [*shared, *singles]
    return ordered


def squeeze(shop: Workshop, rounds: SequenceOf[Round]) -> list[Round]:
    """Rounds of the same sequences that together take no longer. ``rounds`` stay what they are."""
    state = _State(shop, rounds)
    left = min(MAX_SQUEEZES, MAX_WORK // max(len(state.rows), 1))
    for share in SHARES:
        for place in np.argsort(state.limit_s, kind="stable").tolist():
            while left > 0 and state.limit_s[place] > 0 and (share > 0 or state.can_empty(place)):
                left -= 1
                if not state.shorten(place, share * float(state.limit_s[place])):
                    break
    return state.rounds() if state.limit_s.sum() < rounds_s(rounds) else list(rounds)


class _State:
    """Microbatches as arrays: column of the table, load, seconds, round. A round's limit is what it takes now."""

    def __init__(self, shop: Workshop, rounds: SequenceOf[Round]) -> None:
        self.shop = shop
        found = [(number, batch) for number, each in enumerate(rounds) for batch in each.batches]
        used = sorted({batch.column for _, batch in found} | ({0} if shop.has_local else set()))
        place_of = {column: place for place, column in enumerate(used)}
        self.columns = used
        self.table = price_table(shop.lengths, [shop.shapes[column] for column in used])
        self.column: IntArray = np.array([place_of[batch.column] for _, batch in found], dtype=np.int64)
        self.load: IntArray = np.array([batch.load for _, batch in found], dtype=np.int64)
        self.seconds: FloatArray = np.array([batch.seconds for _, batch in found])
        self.round: IntArray = np.array([number for number, _ in found], dtype=np.int64)
        self.rows = [list(batch.rows) for _, batch in found]
        self.free: IntArray = np.array([each.num_free for each in rounds], dtype=np.int64)
        self.limit_s: FloatArray = np.array([each.seconds for each in rounds])
        self.teams: IntArray = np.array([shop.shapes[column].num_teams for column in used], dtype=np.int64)
        # Read one at a time, so as lists: by column, then row; and where a row stands among all, shortest first.
        self.marginals_s = self.table.marginal_s.T.tolist()
        self.loads = self.table.load_tokens.T.tolist()
        order = np.lexsort((np.arange(len(shop.lengths)), np.array(shop.lengths)))
        self.standing = np.argsort(order).tolist()
        # By microbatch, kept up to date: what ``find`` asks for.
        self.opening_s: FloatArray = np.where(self.seconds > 0, 0.0, self.table.fixed_s[self.column])
        self.spare_s: FloatArray = self.limit_s[self.round] - self.seconds - self.opening_s
        self.room: IntArray = self.table.capacity_tokens[self.column] - self.load

    def shorten(self, place: int, limit_s: float) -> bool:
        """Bring the round down to the limit by moving what sticks out; False, and nothing changed, where it has no
        other place."""
        before = self._saved()
        kept: dict[int, list[int]] = {}
        over = np.flatnonzero((self.round == place) & (self.seconds > limit_s))
        self._limit(place, limit_s)
        for source in over[np.argsort(-self.seconds[over], kind="stable")].tolist():
            kept.setdefault(source, self.rows[source])
            for row in self.evict(source, limit_s):
                batch = self.find(row)
                if batch < 0:
                    self._restore(before)
                    del self.rows[len(self.column) :]
                    for changed, rows in kept.items():
                        if changed < len(self.rows):
                            self.rows[changed] = rows
                    return False
                if batch not in kept:
                    kept[batch] = self.rows[batch]
                    self.rows[batch] = list(kept[batch])
                self.add(batch, row)
        mine = self.seconds[self.round == place]
        self._limit(place, float(mine.max()) if len(mine) and limit_s > 0 else 0.0)
        return True

    def _saved(self) -> _Arrays:
        return (
            self.column, self.round, self.load.copy(), self.seconds.copy(), self.free.copy(), self.limit_s.copy(),
            self.opening_s.copy(), self.spare_s.copy(), self.room.copy(),
        )

    def _restore(self, before: _Arrays) -> None:
        (
            self.column, self.round, self.load, self.seconds, self.free, self.limit_s, self.opening_s, self.spare_s,
            self.room,
        ) = before

    def _limit(self, place: int, limit_s: float) -> None:
        """Give a round this limit."""
        self.limit_s[place] = limit_s
        mine = self.round == place
        self.spare_s[mine] = limit_s - self.seconds[mine] - self.opening_s[mine]

    def _set(self, batch: int, load: int, seconds: float) -> None:
        """Give a microbatch this load and time; 0 seconds: it is empty, and the next row pays for opening it."""
        column = self.column[batch]
        opening_s = 0.0 if seconds > 0 else float(self.table.fixed_s[column])
        self.load[batch], self.seconds[batch], self.opening_s[batch] = load, seconds, opening_s
        self.spare_s[batch] = self.limit_s[self.round[batch]] - seconds - opening_s
        self.room[batch] = self.table.capacity_tokens[column] - load

    def evict(self, batch: int, limit_s: float) -> list[int]:
        """Take rows out until the rest ends within the limit: the shortest one that is enough, else the longest. The
        longest of them first."""
        column, seconds = int(self.column[batch]), float(self.seconds[batch])
        rows = sorted(self.rows[batch], key=self.standing.__getitem__)
        by_row, loads = self.marginals_s[column], self.loads[column]
        marginals_s = [by_row[row] for row in rows]
        out = []
        while rows and seconds > limit_s:
            place = min(bisect_left(marginals_s, seconds - limit_s), len(rows) - 1)
            seconds -= marginals_s.pop(place)
            out.append(rows.pop(place))
        self.rows[batch] = rows
        load = int(self.load[batch]) - sum(loads[row] for row in out) if rows else 0
        self._set(batch, load, seconds if rows else 0.0)
        return sorted(out, key=lambda row: (-self.shop.lengths[row], row))

    def add(self, batch: int, row: int) -> None:
        column = int(self.column[batch])
        seconds = float(self.seconds[batch] if self.rows[batch] else self.table.fixed_s[column])
        self.rows[batch].append(row)
        self._set(batch, int(self.load[batch]) + self.loads[column][row], seconds + self.marginals_s[column][row])

    def can_empty(self, place: int) -> bool:
        """Whether the memory left in the other rounds may hold what is in this one."""
        mine = self.round == place
        elsewhere = np.arange(len(self.free)) != place
        spare = (self.table.capacity_tokens[self.column] - self.load) * self.teams[self.column]
        room = int(spare[~mine].sum())
        if self.shop.has_local:
            room += int(self.free[elsewhere].sum()) * int(self.table.capacity_tokens[0])
        return int((self.load * self.teams[self.column])[mine].sum()) <= room

    def find(self, row: int) -> int:
        """The microbatch that takes the row within its round's limit and its memory for the fewest rank seconds, of
        these the one with the least time to spare; else a new one on a spare rank; -1 where there is none."""
        marginal_s = self.table.marginal_s[row].take(self.column)
        spare_s = self.spare_s - marginal_s
        fits = (spare_s >= 0) & (self.room >= self.table.load_tokens[row].take(self.column))
        places = fits.nonzero()[0]
        if len(places):
            spent_s = marginal_s.take(places) + self.opening_s.take(places)
            costs = self.table.degrees.take(self.column.take(places)) * spent_s
            cheapest = places[costs <= costs.min() + HAIR_S]
            return int(cheapest[spare_s.take(cheapest).argmin()])
        if not self.shop.has_local or not self.table.fits[row, 0]:
            return -1
        needed_s = float(self.table.fixed_s[0] + self.table.marginal_s[row, 0])
        open_rounds = np.flatnonzero((self.free > 0) & (self.limit_s >= needed_s))
        if not len(open_rounds):
            return -1
        chosen = int(open_rounds[np.argmin(self.limit_s[open_rounds])])
        self.free[chosen] -= 1
        self.column, self.round = _grown(self.column, 0), _grown(self.round, chosen)
        self.load, self.room, self.seconds = _grown(self.load, 0), _grown(self.room, 0), _grown(self.seconds, 0.0)
        self.opening_s, self.spare_s = _grown(self.opening_s, 0.0), _grown(self.spare_s, 0.0)
        self.rows.append([])
        self._set(len(self.rows) - 1, 0, 0.0)
        return len(self.rows) - 1

    def rounds(self) -> list[Round]:
        """The state as rounds of new microbatches."""
        return rebuilt(self.shop, [self.columns[place] for place in self.column.tolist()], self.rows)


def _grown(values: npt.NDArray[Scalar], last: float) -> npt.NDArray[Scalar]:
    """The values and one more."""
    grown = np.empty(len(values) + 1, dtype=values.dtype)
    grown[:-1] = values
    grown[-1] = last
    return grown
