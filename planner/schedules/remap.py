"""Remapping for the token-wise layers: which tokens change ranks so that every rank gets its share of them.

Attention distributes tokens so that its quadratic work is balanced; matrix products need equal token counts. Moving
tokens there and back is a transportation problem (Zeppelin, arXiv 2509.21841). With two costs, within and between
nodes, it needs no solver: every plan in which no rank both sends and receives moves the same number of tokens, the
surplus; and each node must send at least its own net surplus. So ranks first balance within their node, and only the
rest moves between nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

Move = tuple[int, int, int]
"""Source rank, destination rank, tokens (at least 1)."""


def balanced_counts(total: int, num_ranks: int) -> tuple[int, ...]:
    """``total`` tokens over the ranks, counts differing by at most one, larger counts first. Raises ValueError if there
    are no ranks or the total is negative."""
    if num_ranks < 1 or total < 0:
        raise ValueError(f"cannot share {total} tokens over {num_ranks} ranks")
    share, rest = divmod(total, num_ranks)
    return (share + 1,) * rest + (share,) * (num_ranks - rest)


def token_moves(current: SequenceOf[int], target: SequenceOf[int], node_size: int) -> tuple[Move, ...]:
    """The moves from ``current`` tokens of each rank to ``target``, sorted by source, then destination.

    Ranks fill nodes of ``node_size`` in order; the last node may be smaller. No rank both sends and receives, and as
    few tokens as possible move between nodes: the sum of all nodes' net surpluses. That traffic is spread over a node's
    ranks, and so over its NICs, as evenly as their surpluses and deficits allow. Raises ValueError if the counts differ
    in number or sum, if one is negative, or if ``node_size`` is below 1.
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
    """Parts of ``amounts`` that sum to ``total`` (at most their sum), with the largest part as small as possible."""
    parts, left = [0] * len(amounts), total
    order = sorted(range(len(amounts)), key=lambda place: (amounts[place], place))
    for taken, place in enumerate(order):
        parts[place] = min(amounts[place], left // (len(order) - taken))
        left -= parts[place]
    return parts


def _match(senders: Iterable[tuple[int, int]], receivers: Iterable[tuple[int, int]]) -> list[Move]:
    """Moves that match senders to receivers in order. Both are (rank, tokens) with the same total."""
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
