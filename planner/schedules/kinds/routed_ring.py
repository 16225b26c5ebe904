"""Routed ring: a zigzag ring whose hops between nodes use all NICs (Zeppelin's routing layer, arXiv 2509.21841).

In a ring one rank of each node sends to the next node while the other NICs are idle. Here a block that leaves a node is
cut into as many pieces as the node has members. The last member *dispatches* them to all members, called proxies; each
proxy *sends* its piece over its own NIC to the proxy at the same place of the next node; and there the first member
*combines* them. This takes three rounds instead of one. But blocks follow each other in every round, so dispatch, send
and combine of three successive blocks run at the same time, in parallel with hops within nodes.

A proxy holds a piece for one round and has no tasks on it. The block's owner takes a piece from its own rows. If a
proxy is the sender or the receiver itself, its part skips a round and has ``lead`` 2.

Backward: blocks move in the opposite direction, and their gradients travel with them through the same proxies. If the
owner is a proxy, the gradient of its piece ends there, and later ranks start a new sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import gcd

from planner.plan import AttentionGroup, Span
from planner.schedules.exchange import AttentionSchedule, ExchangeSchedule, GroupLimits, Round, Transfer, span_tasks
from planner.schedules.layout import cut_spans, team_spans
from planner.schedules.routing import routed_transfer_s
from planner.schedules.wire_price import WirePrice, WireSetting

ROUTED_ROUNDS = 3  # dispatch, send, combine
Spans = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Leg:
    """One message from ``source``, posted in round ``leaves``, to ``target``, for round ``arrives``. ``has_kv``,
    ``has_grad``: whether it carries K/V or gradients of these spans."""

    source: int
    target: int
    leaves: int
    arrives: int
    spans: Spans
    has_kv: bool
    has_grad: bool


@dataclass(frozen=True, slots=True)
class _Walk:
    """The walk of all blocks around the ring. Members are numbered in the direction of travel, which the backward
    reverses: blocks always go to the next member. ``pieces[b]``: block b, cut for the proxies."""

    degree: int
    size: int
    pieces: tuple[tuple[Spans, ...], ...]
    with_grads: bool

    @property
    def is_routed(self) -> bool:
        return 1 < self.size < self.degree

    def round_of(self, block: int, distance: int) -> int:
        """The round in which the member ``distance`` places after the block's owner has the block."""
        crossings = (block % self.size + distance) // self.size if self.is_routed else 0
        return distance + (ROUTED_ROUNDS - 1) * crossings

    @property
    def num_rounds(self) -> int:
        return 1 + max(self.round_of(block, self.degree - 1) for block in range(self.degree))

    def legs(self) -> Iterator[_Leg]:
        """Every message of all members, in an order that is the same for both ends."""
        for block in range(self.degree):
            for distance in range(self.degree if self.with_grads else self.degree - 1):
                yield from self._hop(block, distance)

    def _hop(self, block: int, distance: int) -> Iterator[_Leg]:
        """From the member ``distance`` places after the owner to the next one; the last hop returns the gradients."""
        source, start = (block + distance) % self.degree, self.round_of(block, distance)
        target = (source + 1) % self.degree
        if not self.is_routed or target % self.size:
            spans = tuple(span for piece in self.pieces[block] for span in piece)
            yield from self._route(block, [(source, start), (target, start + 1)], spans)
            return
        node, next_node = source - source % self.size, target
        for place, spans in enumerate(self.pieces[block]):
            stops = [(source, start)]
            if node + place != source:
                stops.append((node + place, start + 1))
            if place:
                stops.append((next_node + place, start + 2))
            stops.append((target, start + ROUTED_ROUNDS))
            yield from self._route(block, stops, spans)

    def _route(self, block: int, stops: list[tuple[int, int]], spans: Spans) -> Iterator[_Leg]:
        """From stop to stop (member, round). K/V are sent where they are still needed: for the tasks at the last stop,
        unless a later stop is the owner, which has them; and at stops where gradients are added. Gradients are sent as
        far as the owner, from where there are any."""
        owner = next((number for number, (member, _) in enumerate(stops) if number and member == block), None)
        carries = self.with_grads and stops[0][0] != block
        for number, ((source, leaves), (target, arrives)) in enumerate(zip(stops, stops[1:], strict=False), start=1):
            has_grad = carries and (owner is None or number <= owner)
            is_needed = owner is None or number > owner or has_grad
            has_kv = is_needed and target != block
            if spans and (has_kv or has_grad):
                yield _Leg(source, target, leaves, arrives, spans, has_kv, has_grad)

    def rounds(self, group_ranks: SequenceOf[int], place: int, mine: Spans) -> tuple[Round, ...]:
        """The rounds of the member at ``place``, which owns ``mine``. ``group_ranks``: in the direction of travel."""
        num_rounds = self.num_rounds + (1 if self.with_grads and self.degree > 1 else 0)  # gradients return to owners
        sends: list[list[Transfer]] = [[] for _ in range(num_rounds)]
        receives: list[list[Transfer]] = [[] for _ in range(num_rounds)]
        grad_sends: list[list[Transfer]] = [[] for _ in range(num_rounds)]
        grad_receives: list[list[Transfer]] = [[] for _ in range(num_rounds)]
        for leg in self.legs():
            lead = leg.arrives - leg.leaves
            if leg.source == place:
                out = Transfer(group_ranks[leg.target], leg.spans, lead)
                if leg.has_kv:
                    sends[leg.arrives].append(out)
                if leg.has_grad:
                    grad_sends[leg.leaves].append(out)
            if leg.target == place:
                into = Transfer(group_ranks[leg.source], leg.spans, lead)
                if leg.has_kv:
                    receives[leg.arrives].append(into)
                if leg.has_grad:
                    grad_receives[leg.arrives].append(into)
        keys = {
            self.round_of(block, (place - block) % self.degree): tuple(s for piece in self.pieces[block] for s in piece)
            for block in range(self.degree) if block != place
        }
        keys[0] = mine
        return tuple(
            Round(
                receives=tuple(receives[number]), sends=tuple(sends[number]),
                tasks=span_tasks(mine, keys.get(number, ())), grad_receives=tuple(grad_receives[number]),
                grad_sends=tuple(grad_sends[number]),
            )
            for number in range(num_rounds)
        )


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    degree, size = group.degree, group.inner_degree
    blocks = team_spans(group, lengths)
    pieces = tuple(cut_spans(spans, size if 1 < size < degree else 1) for spans in blocks)
    mine = blocks[group_index]
    forward = _Walk(degree, size, pieces, with_grads=False)
    backward = _Walk(degree, size, pieces[::-1], with_grads=True)
    return ExchangeSchedule(
        head_exchange=None, forward=forward.rounds(group.ranks, group_index, mine),
        backward=backward.rounds(group.ranks[::-1], degree - 1 - group_index, mine),
    )


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    """Members per node: the most that divide node and group. Within one node there is nothing to route."""
    if degree < 2:
        return None
    return degree if degree <= limits.node_size else gcd(degree, limits.node_size)


def _head_degree(degree: int, inner_degree: int) -> int:
    return 1


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    """All messages of a round are one batch, so a round takes as long as its longest stage: the hop within the node,
    with a proxy's piece on the same link, or dispatch, send and combine. NICs are idle in the extra rounds that a block
    needs at boundaries, compared with a plain ring."""
    if not 1 < inner_degree < degree:
        return setting.ring(degree, 1)
    intra_s = 1 / setting.cluster.intra_node.bytes_per_s
    hop_s = (1 + 1 / inner_degree) * intra_s
    routed_s = routed_transfer_s(
        1.0, intra_s_per_byte=intra_s, inter_s_per_byte=1 / setting.boundary_bytes_per_s(inner_degree),
        num_proxies=inner_degree, pipelined=True,
    )
    extra_rounds = (ROUTED_ROUNDS - 1) * (degree // inner_degree)
    rounds_s = (degree - 1) * max(hop_s, routed_s) + extra_rounds * hop_s
    return WirePrice(
        s_per_token=setting.beside_kernels(degree, 1, rounds_s * setting.kv_bytes / degree),
        fixed_s=setting.latency_s(degree, 2 * (degree - 1 + extra_rounds)),
    )


SCHEDULE = AttentionSchedule(write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price)
