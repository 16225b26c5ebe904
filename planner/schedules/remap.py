"""Remapping for the token-wise layers: which tokens change ranks so that every rank holds its due share of them.

Attention leaves ranks with as many tokens as balance its quadratic work; matrix products want equal counts. Moving
tokens there and back is a transportation problem (Zeppelin, arXiv 2509.21841). With two costs, inside a node and
between nodes, it needs no solver: every plan in which no rank both sends and receives moves the same number of tokens,
the surplus; and a node cannot pass on less than what it has too much as a whole. So ranks first even out inside their
node, and only what is left travels.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

Move = tuple[int, int, int]
"""Source rank, destination rank, tokens (at least 1)."""


def balanced_counts(total: int, num_ranks: int) -> tuple[int, ...]:
    """``total`` tokens over the ranks, at most one apart, the first ranks holding one more. Raises ValueError on no
    ranks or a negative total."""
    if num_ranks < 1 or total < 0:
        raise ValueError(f"cannot share {total} tokens over {num_ranks} ranks")
    share, rest = divmod(total, num_ranks)
    return (share + 1,) * rest + (share,) * (num_ranks - rest)


def token_moves(current: SequenceOf[int], target: SequenceOf[int], node_size: int) -> tuple[Move, ...]:
    """The moves from ``current`` tokens of each rank to ``target``, sorted by source, then destination.

    Ranks fill nodes of ``node_size`` in order; the last node may be smaller. No rank both sends and receives; of all
    such moves these send the fewest tokens between nodes: the sum of what every node has too much. That traffic is
    spread as evenly over a node's ranks, and so over its NICs, as their surpluses and deficits allow. Raises ValueError
    where the counts do not match in number or sum, one is negative, or ``node_size`` is below 1.
    """
    if len(current) != len(target) or sum(current) != sum(target):
        raise ValueError(
            f"cannot move {sum(current)} tokens of {len(current)} ranks to {sum(target)} tokens of {len(target)} ranks"
        )
    if min((*current, *target), default=0) < 0 or node_size < 1:
        raise ValueError(f"token counts must be 0 or more and node_size at least 1, got {node_size}")
    moves: list[Move] = []
    senders: list[tuple[int, int]] = []
    receivers: list[tuple[int, int]] = []
    for first in range(0, len(current), node_size):
        ranks = range(first, min(first + node_size, len(current)))
        surplus = [max(0, current[rank] - target[rank]) for rank in ranks]
        deficit = [max(0, target[rank] - current[rank]) for rank in ranks]
        leaving = _even_parts(surplus, max(0, sum(surplus) - sum(deficit)))
        arriving = _even_parts(deficit, max(0, sum(deficit) - sum(surplus)))
        staying = [have - part for have, part in zip(surplus, leaving, strict=True)]
        filled = [need - part for need, part in zip(deficit, arriving, strict=True)]
        moves += _match(zip(ranks, staying, strict=True), zip(ranks, filled, strict=True))
        senders += zip(ranks, leaving, strict=True)
        receivers += zip(ranks, arriving, strict=True)
    return tuple(sorted([*moves, *_match(senders, receivers)]))


def _even_parts(amounts: SequenceOf[int], total: int) -> list[int]:
    """Parts of ``amounts`` that sum to ``total`` (at most their sum), the largest part as small as possible."""
    parts, left = [0] * len(amounts), total
    order = sorted(range(len(amounts)), key=lambda place: (amounts[place], place))
    for taken, place in enumerate(order):
        parts[place] = min(amounts[place], left // (len(order) - taken))
        left -= parts[place]
    return parts


def _match(senders: Iterable[tuple[int, int]], receivers: Iterable[tuple[int, int]]) -> list[Move]:
    """(Rank, tokens) of both sides, equal in sum, joined in order: the first sender to the first receiver."""
    moves: list[Move] = []
    waiting = [pair for pair in receivers if pair[1]]
    place, room = 0, waiting[0][1] if waiting else 0
    for source, tokens in senders:
        while tokens:
            step = min(tokens, room)
            moves.append((source, waiting[place][0], step))
            tokens, room = tokens - step, room - step
            if not room and place + 1 < len(waiting):
                place += 1
                room = waiting[place][1]
    return moves
