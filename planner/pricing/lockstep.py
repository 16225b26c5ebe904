"""The rounds of a step whose ranks move in lockstep, as ``zero3`` sharding requires.

Parameters are gathered layer by layer and every rank takes part in every gather. So all ranks run the same number of
forwards and backwards side by side, and a rank for which the plan has no work in a round runs an empty microbatch. A
microbatch runs in the first round that comes after those of all earlier microbatches of its ranks.
"""

from __future__ import annotations

from collections.abc import Iterable


def lockstep_rounds(rank_lists: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The microbatches of each round (places in the plan, ascending). ``rank_lists[i]``: ranks of microbatch i.

    Microbatches of a round share no rank, and every rank runs its microbatches in the plan's order.
    """
    next_round: dict[int, int] = {}
    rounds: list[list[int]] = []
    for index, ranks in enumerate(rank_lists):
        number = max((next_round.get(rank, 0) for rank in ranks), default=0)
        next_round.update(dict.fromkeys(ranks, number + 1))
        rounds += [[] for _ in range(number + 1 - len(rounds))]
        rounds[number].append(index)
    return tuple(tuple(members) for members in rounds)
