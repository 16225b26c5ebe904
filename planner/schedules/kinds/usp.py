"""USP (Fang and Zhao, arXiv 2405.07719): Ulysses inside, ring outside.

Teams of ``inner_degree`` consecutive members exchange heads. Then each member, with its share of the heads, forms a
ring with the members at the same place of the other teams. The head exchange stays on a node's links, and traffic
between nodes uses all NICs, because each rank sends the part of its own heads.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from math import gcd, isqrt

from planner.plan import AttentionGroup
from planner.schedules.exchange import AttentionSchedule, ExchangeSchedule, GroupLimits
from planner.schedules.kinds.ring import ring_rounds
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice, WireSetting


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    size = group.inner_degree
    team, place = divmod(group_index, size)
    forward, backward = ring_rounds(group.ranks[place::size], team_spans(group, lengths), team)
    members = group.ranks[team * size : (team + 1) * size] if size > 1 else None
    return ExchangeSchedule(head_exchange=members, forward=forward, backward=backward)


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    """Across nodes, the largest team that divides node and group; within a node, both levels about equally large. Every
    member of a team needs a query head."""
    if degree < 2:
        return None
    whole = degree if degree <= limits.node_size else gcd(degree, limits.node_size)
    most = isqrt(degree) if degree <= limits.node_size else whole
    return max(size for size in range(1, min(most, limits.num_heads) + 1) if whole % size == 0)


def _head_degree(degree: int, inner_degree: int) -> int:
    return inner_degree


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    heads, ring = setting.head_exchange(inner_degree, degree), setting.ring(degree // inner_degree, inner_degree)
    return WirePrice(
        s_per_token=heads.s_per_token + ring.s_per_token, fixed_s=heads.fixed_s + ring.fixed_s,
        attention_factor=heads.attention_factor,
    )


SCHEDULE = AttentionSchedule(write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price)
