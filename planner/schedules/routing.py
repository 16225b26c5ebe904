"""Routed transfers: one message between nodes uses several NICs of its node, as in Zeppelin's routing layer.

The sender scatters the message over proxy ranks of its own node, each proxy sends its part over its own NIC to a proxy
of the other node, and the receiver gathers the parts there (Chen et al., arXiv 2509.21841; the formula is our own,
because the paper's was not legible).
"""

from __future__ import annotations

import math


def routed_transfer_s(
    num_bytes: float, *, intra_s_per_byte: float, inter_s_per_byte: float, num_proxies: int, pipelined: bool = False
) -> float:
    """Seconds of a message over ``num_proxies`` proxies in each of the two nodes; 1 means a direct message.

    The three stages run one after the other. A stage takes as long as its transfers at the given rates; latency is not
    included. The sender keeps 1 / num_proxies of the message for its own NIC, and the receiver gets as much directly.
    ``pipelined``: seconds per message in a long series, whose stages overlap; this is the longest stage. Raises
    ValueError for fewer than one proxy or a negative size or rate.
    """
    if num_proxies < 1:
        raise ValueError(f"a routed transfer needs at least 1 proxy, got {num_proxies}")
    _require_rates(num_bytes=num_bytes, intra_s_per_byte=intra_s_per_byte, inter_s_per_byte=inter_s_per_byte)
    aside_bytes = num_bytes * (num_proxies - 1) / num_proxies
    aside_s, send_s = aside_bytes * intra_s_per_byte, num_bytes * inter_s_per_byte / num_proxies
    return max(aside_s, send_s) if pipelined else 2 * aside_s + send_s


def best_num_proxies(*, intra_s_per_byte: float, inter_s_per_byte: float, num_available: int) -> int:
    """The number of proxies, 1 .. ``num_available``, with the shortest ``routed_transfer_s``, for a message of any
    size.

    That time is a constant plus (inter - 2 intra) / num_proxies. So all proxies are best, or none but the sender if a
    hop within the node costs at least half of a direct one.
    """
    if num_available < 1:
        raise ValueError(f"a routed transfer needs at least 1 proxy, got {num_available}")
    _require_rates(intra_s_per_byte=intra_s_per_byte, inter_s_per_byte=inter_s_per_byte)
    return num_available if inter_s_per_byte > 2 * intra_s_per_byte else 1


def _require_rates(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"routed transfer: {name} must be 0 or more and finite, got {value}")
