"""Exchange of single sequences between ranks until the last ranks to end have nothing to give.

Local microbatches come after everything else on their rank, so what they hold may change without touching any other
rank. The rank that ends last gives a sequence to one that ends early, or swaps it for a shorter one, so that the two
end as near to each other as memory allows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf

import numpy as np

from planner.strategies.adaptive.effort import LEAST_GAIN, MOVES_PER_RANK, NUM_PARTNERS
from planner.strategies.adaptive.priced_step import Batch, PricedStep, fullest_with_room
from planner.strategies.search.shapes import FloatArray

_Move = tuple[float, Batch, int, Batch | None, int | None]
"""When the later of two ranks then ends; a microbatch and the row it gives; the one that takes it (None: a new one),
and the row that comes back for it, if any."""


def balance_ranks(step: PricedStep, stacks: SequenceOf[list[Batch]], ends_s: FloatArray) -> None:
    """Change the local microbatches in ``stacks`` (one list per rank) and ``ends_s`` (seconds, per rank) in place."""
    for _ in range(MOVES_PER_RANK * len(ends_s) if step.has_local else 0):
        last = int(np.argmax(ends_s))
        earliest = np.argsort(ends_s, kind="stable")[:NUM_PARTNERS].tolist()
        if not any(_exchange(step, stacks, ends_s, last, first) for first in earliest if first != last):
            return


def _exchange(step: PricedStep, stacks: SequenceOf[list[Batch]], ends_s: FloatArray, last: int, first: int) -> bool:
    """Make the best move from rank ``last`` to rank ``first``; False where none helps enough."""
    late_s, early_s = float(ends_s[last]), float(ends_s[first])
    best = _best_move(step, stacks[last], stacks[first], late_s, early_s)
    if best is None or late_s - best[0] < LEAST_GAIN * late_s:
        return False
    before_s = [sum(batch.seconds for batch in stacks[rank]) for rank in (last, first)]
    _, giver, given, taker, returned = best
    if taker is None:
        taker = Batch(0, 1, step.fixed[0], first_rank=first)
        stacks[first].append(taker)
    _shift(step, giver, taker, given)
    if returned is not None:
        _shift(step, taker, giver, returned)
    stacks[last][:] = [batch for batch in stacks[last] if batch.rows]
    for rank, seconds in zip((last, first), before_s, strict=True):
        ends_s[rank] += sum(batch.seconds for batch in stacks[rank]) - seconds
    return True


def _shift(step: PricedStep, giver: Batch, taker: Batch, row: int) -> None:
    load, seconds = step.local_load[row], step.local_s[row]
    giver.rows.remove(row)
    giver.load -= load
    giver.marginal_s -= seconds
    taker.add(row, load, seconds)


def _best_move(
    step: PricedStep, givers: SequenceOf[Batch], takers: SequenceOf[Batch], late_s: float, early_s: float
) -> _Move | None:
    """The move after which the later of the two ranks ends first. Of the rows that may come back for one, only those
    nearest to what evens the two ranks out are looked at."""
    capacity, fixed_s = step.shapes[0].capacity_tokens, step.fixed[0]
    returns = sorted((step.local_s[row], row, place) for place, batch in enumerate(takers) for row in batch.rows)
    keys = [seconds for seconds, _, _ in returns]
    best: _Move | None = None
    for giver in givers:
        emptied_s = fixed_s if len(giver.rows) == 1 else 0.0
        for row in giver.rows:
            load, seconds = step.local_load[row], step.local_s[row]
            taker = fullest_with_room(takers, capacity - load)
            extra_s = fixed_s if taker is None else 0.0
            end_s = max(late_s - seconds - emptied_s, early_s + seconds + extra_s)
            if end_s < (late_s if best is None else best[0]):
                best = (end_s, giver, row, taker, None)
            middle = bisect_left(keys, seconds - (late_s - early_s) / 2)
            for back_s, back, holder in returns[max(0, middle - 1) : middle + 1]:
                end_s = max(late_s - seconds + back_s, early_s + seconds - back_s)
                if end_s >= (late_s if best is None else best[0]):
                    continue
                other, change = takers[holder], load - step.local_load[back]
                if other.load + change <= capacity and giver.load - change <= capacity:
                    best = (end_s, giver, row, other, back)
    return best
