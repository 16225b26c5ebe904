"""Exchange of single sequences between ranks until the last ranks to end have nothing to give.

Local microbatches lie on top of everything else on their rank, so what they hold may change without touching any
other rank. The rank that ends last gives a sequence to one that ends early, or swaps it for a shorter one, so that the
two end as near to each other as memory allows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.strategies.adaptive.workshop import Batch, Workshop, fullest_with_room
from planner.strategies.search.shapes import FloatArray

NUM_PARTNERS = 6
NUM_NEIGHBOURS = 3
MAX_GIVEN = 24
LEAST_GAIN = 1e-4  # of the step: smaller steps are not worth the time
MOVES_PER_RANK = 6


@dataclass(frozen=True, slots=True)
class _Move:
    """Row ``given`` of batch ``giver`` to batch ``taker`` (None: a new one), for row ``returned`` if there is one."""

    worse_end_s: float
    giver: Batch
    given: int
    taker: Batch | None
    returned: int | None


def balance_ranks(shop: Workshop, stacks: SequenceOf[list[Batch]], ends_s: FloatArray) -> None:
    """Change the local microbatches in ``stacks`` (one list per rank) and ``ends_s`` (seconds, per rank) in place."""
    if not shop.has_local or len(ends_s) < 2:
        return
    for _ in range(MOVES_PER_RANK * len(ends_s)):
        last = int(np.argmax(ends_s))
        least_gain_s = LEAST_GAIN * float(ends_s[last])
        if not any(_exchange(shop, stacks, ends_s, last, first, least_gain_s) for first in _earliest(ends_s, last)):
            return


def _earliest(ends_s: FloatArray, last: int) -> list[int]:
    """The ranks that end first, of those that end earlier than ``last``."""
    count = min(NUM_PARTNERS, len(ends_s) - 1)
    nearest = np.argpartition(ends_s, count - 1)[:count]
    return [rank for rank in sorted(nearest.tolist(), key=lambda rank: (ends_s[rank], rank)) if rank != last]


def _exchange(
    shop: Workshop, stacks: SequenceOf[list[Batch]], ends_s: FloatArray, last: int, first: int, least_gain_s: float
) -> bool:
    """Make the best move from rank ``last`` to rank ``first``; False where none helps enough."""
    late_s, early_s = float(ends_s[last]), float(ends_s[first])
    best = _best_move(shop, stacks[last], stacks[first], late_s, early_s)
    if best is None or late_s - best.worse_end_s < least_gain_s:
        return False
    before_s = sum(batch.seconds for batch in stacks[last]), sum(batch.seconds for batch in stacks[first])
    taker = best.taker
    if taker is None:
        taker = Batch(0, 1, shop.fixed[0], first_rank=first)
        stacks[first].append(taker)
    _shift(shop, best.giver, taker, best.given)
    if best.returned is not None:
        _shift(shop, taker, best.giver, best.returned)
    stacks[last][:] = [batch for batch in stacks[last] if batch.rows]
    ends_s[last] = late_s - before_s[0] + sum(batch.seconds for batch in stacks[last])
    ends_s[first] = early_s - before_s[1] + sum(batch.seconds for batch in stacks[first])
    return True


def _shift(shop: Workshop, giver: Batch, taker: Batch, row: int) -> None:
    load, seconds = shop.local_load[row], shop.local_s[row]
    giver.rows.remove(row)
    giver.load -= load
    giver.marginal_s -= seconds
    taker.add(row, load, seconds)


def _best_move(
    shop: Workshop, givers: SequenceOf[Batch], takers: SequenceOf[Batch], late_s: float, early_s: float
) -> _Move | None:
    """The move after which the later of the two ranks ends first."""
    capacity, fixed_s = shop.shapes[0].capacity_tokens, shop.fixed[0]
    returns = sorted(
        (shop.local_s[row], row, place) for place, batch in enumerate(takers) for row in batch.rows
    )
    keys = [seconds for seconds, _, _ in returns]
    half_s = (late_s - early_s) / 2
    best: _Move | None = None
    for giver in givers:
        emptied_s = fixed_s if len(giver.rows) == 1 else 0.0
        for row in giver.rows[-MAX_GIVEN:]:
            load, seconds = shop.local_load[row], shop.local_s[row]
            taker = fullest_with_room(takers, capacity - load)
            extra_s = fixed_s if taker is None else 0.0
            end_s = max(late_s - seconds - emptied_s, early_s + seconds + extra_s)
            if end_s < late_s and (best is None or end_s < best.worse_end_s):
                best = _Move(end_s, giver, row, taker, None)
            middle = bisect_left(keys, seconds - half_s)
            for place in range(max(0, middle - NUM_NEIGHBOURS), min(len(keys), middle + NUM_NEIGHBOURS)):
                back_s, back, holder = returns[place]
                if back_s >= seconds:
                    break
                end_s = max(late_s - seconds + back_s, early_s + seconds - back_s)
                if best is not None and end_s >= best.worse_end_s:
                    continue
                other, change = takers[holder], load - shop.local_load[back]
                if other.load + change <= capacity and giver.load - change <= capacity:
                    best = _Move(end_s, giver, row, other, back)
    return best
