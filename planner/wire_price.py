"""Parts of what communication costs, for the kinds of attention to put together (see ``planner.schedules``).

All of it is seconds of one forward plus backward over all layers, and linear in the tokens of the group: a bandwidth
term a token, and a latency term a microbatch. Nothing here knows about compute, except for how much it hides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.cluster import ClusterSpec, LinkSpec
from planner.model_spec import ModelSpec

EXPOSED_SHARE = 1 / 3
"""Of transfers that run beside kernels. With c seconds of transfer per token and a seconds of attention per token^2,
max(0, c s - a s^2) stays exposed of a sequence of s tokens, which is no longer linear. Averaged over the lengths where
anything is exposed (0 .. c / a) it is one third of c s; that share is charged at every length, too little for very
short sequences and, where attention dominates anyway, a little too much for long ones."""
PASSES = 3
"""K/V move in the forward, and in the backward once more, together with as many bytes of gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WirePrice:
    """``s_per_token``: per token of the group, exposed. ``fixed_s``: latencies of one microbatch. ``attention_factor``:
    what uneven heads multiply the slowest rank's share of the attention work by."""

    s_per_token: float = 0.0
    fixed_s: float = 0.0
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSetting:
    """Model and links as one data rank sees them. Groups are of consecutive ranks; those of several nodes start with a
    node. ``element_bytes``: of activations."""

    cluster: ClusterSpec
    model: ModelSpec
    tensor_parallel: int
    element_bytes: int

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.cluster.devices_per_node // self.tensor_parallel)

    @property
    def query_heads(self) -> int:
        return self.model.num_query_heads // self.tensor_parallel

    @property
    def kv_heads(self) -> int:
        return math.ceil(self.model.num_kv_heads / self.tensor_parallel)

    @property
    def head_bytes(self) -> int:
        """One head of one token, in all layers."""
        return self.model.head_dim * self.element_bytes * self.model.num_layers

    @property
    def kv_bytes(self) -> int:
        """K and V of one token, in all layers."""
        return 2 * self.kv_heads * self.head_bytes

    def link(self, num_ranks: int) -> LinkSpec:
        """The slowest link inside a group of this many consecutive data ranks."""
        return self.cluster.intra_node if num_ranks <= self.ranks_per_node else self.cluster.inter_node

    def latency_s(self, num_ranks: int, hops: int) -> float:
        """So many messages a layer, one after the other, in a group of this many ranks."""
        return hops * self.model.num_layers * self.link(num_ranks).latency_s

    def boundary_bytes_per_s(self, num_crossing: int) -> float:
        """What each of ``num_crossing`` ranks of a node gets that send to the next node while the others do not: they
        share the node's NICs, and none can use more than one."""
        nodes, nics = self.cluster, self.cluster.nics_per_node
        nic_bytes_per_s = nodes.inter_node.bytes_per_s * nodes.devices_per_node / nics
        return min(nodes.intra_node.bytes_per_s, nic_bytes_per_s * min(1.0, nics / num_crossing))

    def direct_s_per_token(self, degree: int, spread_bytes: float) -> float:
        """Everyone sends to everyone, per token of the group. ``spread_bytes``: of one token for all members together,
        its own rank (which needs no message) included. Of what a rank receives, the part from inside its node and the
        part that enters the node travel at the same time over their own links."""
        near = min(degree, self.ranks_per_node)
        intra_s = (near - 1) / degree * spread_bytes / self.cluster.intra_node.bytes_per_s
        inter_s = (degree - near) / degree * spread_bytes / self.cluster.inter_node.bytes_per_s
        return max(intra_s, inter_s) / degree

    def head_exchange(self, size: int, degree: int) -> WirePrice:
        """Teams of ``size`` of a group's ``degree`` ranks trade q, k, v and output, forward and backward; nothing
        overlaps that. K and V count the heads that are sent: at least one for each member, so they are replicated where
        the team is larger than the number of KV heads. Where it does not divide the query heads, the member with one
        head more sets the pace of the attention."""
        if size == 1:
            return WirePrice()
        heads = 2 * self.query_heads + 2 * size * math.ceil(self.kv_heads / size)
        return WirePrice(
            s_per_token=self.direct_s_per_token(size, 2 * heads * self.head_bytes) * (size / degree),
            fixed_s=self.latency_s(size, 8),
            attention_factor=math.ceil(self.query_heads / size) * size / self.query_heads,
        )

    def ring(self, num_teams: int, size: int) -> WirePrice:
        """Rings of one member of each team (of ``size``), hidden behind kernels. A rank passes its share of the KV
        heads of all teams' tokens but one on. Across nodes, the last team of each node sends over the boundary."""
        degree = num_teams * size
        inside = degree <= self.ranks_per_node
        bytes_per_s = self.cluster.intra_node.bytes_per_s if inside else self.boundary_bytes_per_s(size)
        rank_bytes = 2 * math.ceil(self.kv_heads / size) * self.head_bytes
        return WirePrice(
            s_per_token=EXPOSED_SHARE * PASSES * (num_teams - 1) / num_teams * rank_bytes / bytes_per_s,
            fixed_s=self.latency_s(degree, 2 * (num_teams - 1)),
        )
