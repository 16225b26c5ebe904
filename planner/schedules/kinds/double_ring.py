"""Double ring (LoongTrain, arXiv 2406.18485): rings of ``inner_degree`` consecutive members inside a ring of rings.

In cycle c the inner rings pass around the blocks of the inner ring c places behind. The hop to the next inner ring is
posted at the start of a cycle and arrives for the next one, so a whole cycle hides it. Every rank makes such a hop of
its own, so all NICs of a node are used. A block crosses each boundary between nodes only once, not once per rank.

Backward: blocks move in the opposite direction. In its own inner ring a block's gradient travels with the block, as in
a ring. In another inner ring the gradient sums up the parts of all members on its way around, and the last member sends
the sum directly to the owner, where it arrives a cycle later.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import gcd, isqrt

from planner.plan import AttentionGroup, Span
from planner.schedules.exchange import (
    AttentionSchedule,
    ExchangeSchedule,
    GroupLimits,
    Round,
    Transfer,
    message,
    span_tasks,
)
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice, WireSetting


@dataclass(frozen=True, slots=True)
class _Place:
    """One rank's view of the rings: other ranks are named by how many rings and places they are ahead."""

    ranks: tuple[int, ...]
    blocks: tuple[tuple[Span, ...], ...]
    group_index: int
    size: int

    @property
    def num_rings(self) -> int:
        return len(self.ranks) // self.size

    def index(self, ring: int, place: int) -> int:
        own_ring, own_place = divmod(self.group_index, self.size)
        return (own_ring + ring) % self.num_rings * self.size + (own_place + place) % self.size

    def message(self, peer: tuple[int, int], block: tuple[int, int], lead: int = 1) -> tuple[Transfer, ...]:
        return message(self.ranks[self.index(*peer)], self.blocks[self.index(*block)], lead)

    def hop(self, cycle: int, step: int, way: int) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """Receives and sends for one round. ``way``: where blocks come from, -1 from behind, 1 from ahead."""
        if step:
            return (
                self.message((0, way), (way * cycle, way * step)),
                self.message((0, -way), (way * cycle, way * (step - 1))),
            )
        if cycle:
            return (
                self.message((way, 0), (way * cycle, 0), lead=self.size),
                self.message((-way, 0), (way * (cycle - 1), 0), lead=self.size),
            )
        return (), ()

    def forward_round(self, cycle: int, step: int) -> Round:
        receives, sends = self.hop(cycle, step, way=-1)
        mine, block = self.blocks[self.group_index], self.blocks[self.index(-cycle, -step)]
        return Round(receives=receives, sends=sends, tasks=span_tasks(mine, block))

    def backward_round(self, cycle: int, step: int) -> Round:
        receives, sends = self.hop(cycle, step, way=1)
        mine, block = self.blocks[self.group_index], self.blocks[self.index(cycle, step)]
        passed_on = step > (1 if cycle == 0 else 0)  # the previous member computed a part of this block's gradient
        grad_receives = self.message((0, 1), (cycle, step)) if passed_on else ()
        home = cycle - 1  # the cycle whose gradient sums arrive at their owners in this round
        if step == self.size - 1 and home >= 1:
            grad_receives += self.homecoming(home, lead=self.size)
        elif step == 0 and cycle == 1:
            grad_receives += self.homecoming(0, lead=1)
        grad_sends: tuple[Transfer, ...] = ()
        if cycle or step:
            last = step == self.size - 1
            peer = (cycle, step) if last else (0, -1)
            waits = last and cycle and cycle < self.num_rings - 1
            grad_sends = self.message(peer, (cycle, step), lead=self.size if waits else 1)
        return Round(
            receives=receives, sends=sends, tasks=span_tasks(mine, block), grad_receives=grad_receives,
            grad_sends=grad_sends,
        )

    def homecoming(self, cycle: int, lead: int) -> tuple[Transfer, ...]:
        """Receives the own block's gradient from where it ended ``cycle``: the next place, this many rings behind."""
        if cycle == 0 and self.size == 1:
            return ()
        return self.message((-cycle, 1), (0, 0), lead)


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    place = _Place(group.ranks, team_spans(group, lengths), group_index, group.inner_degree)
    rounds = [(cycle, step) for cycle in range(place.num_rings) for step in range(place.size)]
    backward = [place.backward_round(*each) for each in rounds]
    if len(rounds) > 1:
        backward.append(Round(grad_receives=place.homecoming(place.num_rings - 1, lead=1)))
    return ExchangeSchedule(
        head_exchange=None, forward=tuple(place.forward_round(*each) for each in rounds), backward=tuple(backward)
    )


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    """Across nodes, the largest ring that divides node and group; within a node, both levels about equally large."""
    if degree < 2:
        return None
    if degree > limits.node_size:
        return gcd(degree, limits.node_size)
    return max(size for size in range(1, isqrt(degree) + 1) if degree % size == 0)


def _head_degree(degree: int, inner_degree: int) -> int:
    return 1


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    """Inner and outer hops add up: on one communicator they do not overlap. The last ring of each node sends across the
    node boundary, from all its ranks."""
    num_rings = degree // inner_degree
    outer_bytes_per_s = setting.boundary_bytes_per_s(inner_degree)
    if degree <= setting.ranks_per_node:
        outer_bytes_per_s = setting.cluster.intra_node.bytes_per_s
    inner_s = (num_rings * (inner_degree - 1)) / degree * setting.kv_bytes / setting.cluster.intra_node.bytes_per_s
    outer_s = (num_rings - 1) / degree * setting.kv_bytes / outer_bytes_per_s
    inner_hops, outer_hops = 2 * num_rings * (inner_degree - 1), 2 * (num_rings - 1)
    return WirePrice(
        s_per_token=setting.beside_kernels(degree, 1, inner_s + outer_s),
        fixed_s=setting.latency_s(inner_degree, inner_hops) + setting.latency_s(degree, outer_hops),
    )


SCHEDULE = AttentionSchedule(write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price)
