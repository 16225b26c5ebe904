"""Routed transfers: one message between nodes spread over several NICs of its node, as Zeppelin's routing layer does.

The sender scatters the message over proxy ranks of its own node, every proxy sends its part over its own NIC to a
proxy of the other node, and these gather the parts on the receiver (Chen et al., arXiv 2509.21841; the formula is ours,
the paper's could not be read).
"""

from __future__ import annotations

import math


def routed_transfer_s(
    num_bytes: float, *, intra_s_per_byte: float, inter_s_per_byte: float, num_proxies: int, pipelined: bool = False
) -> float:
    """Seconds of a message over ``num_proxies`` proxies in each of the two nodes; with 1, of a direct message.

    The three stages run one after the other and a stage is as long as its transfers at their rates, latency left out.
    Of the message 1 / num_proxies stays with the sender, and as much is at the receiver already. ``pipelined``: each of
    many such messages in a row, whose stages overlap: the longest stage. Raises ValueError on fewer than one proxy or
    on a negative size or rate.
    """
    if num_proxies < 1:
        raise ValueError(f"a routed transfer needs at least 1 proxy, got {num_proxies}")
    _require_rates(num_bytes=num_bytes, intra_s_per_byte=intra_s_per_byte, inter_s_per_byte=inter_s_per_byte)
    aside_bytes = num_bytes * (num_proxies - 1) / num_proxies
    aside_s, send_s = aside_bytes * intra_s_per_byte, num_bytes * inter_s_per_byte / num_proxies
    return max(aside_s, send_s) if pipelined else 2 * aside_s + send_s


def best_num_proxies(*, intra_s_per_byte: float, inter_s_per_byte: float, num_available: int) -> int:
    """The number of proxies, 1 .. ``num_available``, with the shortest ``routed_transfer_s`` of any message.

    That time is a constant plus (inter - 2 intra) / num_proxies, so it is all of them or, where a hop inside the node
    costs half a direct one or more, none but the sender.
    """
    if num_available < 1:
        raise ValueError(f"a routed transfer needs at least 1 proxy, got {num_available}")
    _require_rates(intra_s_per_byte=intra_s_per_byte, inter_s_per_byte=inter_s_per_byte)
    return num_available if inter_s_per_byte > 2 * intra_s_per_byte else 1


def _require_rates(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"routed transfer: {name} must be 0 or more and finite, got {value}")
