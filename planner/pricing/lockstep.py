"""Rounds of a step whose ranks move in lockstep: what ``zero3`` sharding makes of a plan.

With parameters gathered layer by layer, every rank takes part in every gather, so all ranks go through the same number
of forwards and backwards side by side, with no microbatch where the plan has none for them. A microbatch runs in the
first round in which none of its ranks has work that comes before it in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable


def lockstep_rounds(rank_lists: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """For each round the microbatches in it (places in the plan, ascending). ``rank_lists[i]``: ranks of microbatch i.

    Microbatches of a round share no rank, and every rank meets its microbatches in the plan's order.
    """
    next_round: dict[int, int] = {}
    rounds: list[list[int]] = []
    for index, ranks in enumerate(rank_lists):
        number = max((next_round.get(rank, 0) for rank in ranks), default=0)
        next_round.update(dict.fromkeys(ranks, number + 1))
        rounds += [[] for _ in range(number + 1 - len(rounds))]
        rounds[number].append(index)
    return tuple(tuple(members) for members in rounds)
