"""Parts of what communication costs, for the kinds of attention to put together (see ``planner.schedules``).

All of it is seconds of one forward plus backward over all layers, and linear in the tokens of the group: a term a
token, and a latency term a microbatch.

Transfers that run beside kernels are not linear. Per token of a group let c be the seconds of its transfers, r what
going in rounds adds to its kernels (``WireSetting.rounds_s``), b its token-wise compute, A m its attention, with m the
tokens a rank holds (of one sequence over the whole group). Then a token takes b + max(c, r + A m); what a planner can
price is b + p + A m. The p here makes the largest relative error over all m as small as it can be: too low by a factor
e where sequences are short, too high by the same e where the kernels just hide the transfers (m = (c - r) / A, or the
most tokens a rank can hold), and nearly exact for long ones. e is at most 1.62 (the golden ratio, where b and r are
nothing); rings of Llama 3 8B have 1.0 inside an H100 node and 1.26 to 1.38 across nodes. Charging all of c would be
exact for short sequences and up to twice too high; a fixed share of it is up to 1 / share too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.inputs.cluster import ClusterSpec, LinkSpec
from planner.inputs.model import ModelSpec

WIDE_BYTES = 4
"""Partial results and gradients are summed in fp32."""
SPAN_BYTES = 72
"""Memory traffic that one query element and one key element more in a span are worth to the attention kernels, forward
and backward: the curve that ``planner.replay.operations`` fits to measured H100 rows, times that device's memory
rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WirePrice:
    """``s_per_token``: per token of the group, exposed. ``fixed_s``: latencies of one microbatch. ``attention_factor``:
    what uneven heads multiply the slowest rank's share of the attention work by."""

    s_per_token: float = 0.0
    fixed_s: float = 0.0
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSetting:
    """Model, links and compute as one data rank sees them. Groups are of consecutive ranks; those of several nodes
    start with a node. ``element_bytes``: of activations."""

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

    @property
    def kv_passes(self) -> float:
        """How often ``kv_bytes`` travel: forward, backward, and as gradients in fp32 or wider."""
        return 2 + max(WIDE_BYTES, self.element_bytes) / self.element_bytes

    @property
    def attention_s(self) -> float:
        """Of one rank alone, for a token squared."""
        device = self.cluster.device
        flop_per_s = device.peak_flop_per_s * device.attention_efficiency * self.tensor_parallel
        return self.model.attention_flop((1,)) / flop_per_s

    @property
    def linear_s(self) -> float:
        """Matrix products of one rank alone, for a token."""
        device = self.cluster.device
        return self.model.linear_flop(1) / (device.peak_flop_per_s * device.linear_efficiency * self.tensor_parallel)

    @property
    def most_tokens(self) -> float:
        """No rank can hold more, activations kept, even with nothing else in its memory."""
        device, model = self.cluster.device, self.model
        saved_bytes = model.num_layers * model.saved_bytes_per_token(self.element_bytes) / self.tensor_parallel
        return (device.memory_bytes - device.reserved_bytes) / saved_bytes

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

    def rounds_s(self, num_teams: int, size: int) -> float:
        """What it adds to the kernels of a rank, per token of the group, that a walk meets the keys of one team (of
        ``size``) at a time: every round works on all queries of the rank, merges what it finds into its partial result
        and adds to the gradients of queries and keys, over memory. A group of any degree pays this for every token."""
        queries = math.ceil(self.query_heads / size) * self.model.head_dim * self.model.num_layers
        keys = math.ceil(self.kv_heads / size) * self.model.head_dim * self.model.num_layers
        merge_bytes = 2 * WIDE_BYTES + self.element_bytes
        moved_bytes = SPAN_BYTES * queries + merge_bytes * (2 * queries + 2 * keys)
        return (num_teams - 1) / num_teams * moved_bytes / self.cluster.device.memory_bytes_per_s

    def beside_kernels(self, degree: int, size: int, kv_pass_s: float) -> float:
        """Seconds to charge a token for rounds whose transfers run beside kernels (p in the module's text).
        ``kv_pass_s``: of one pass of K/V, per token of the group. Teams are of ``size`` ranks."""
        transfer_s, rounds_s = self.kv_passes * kv_pass_s, self.rounds_s(degree // size, size)
        if transfer_s <= rounds_s:
            return rounds_s  # always hidden
        linear_s = self.linear_s / degree
        hidden_s = min(transfer_s - rounds_s, self.attention_s * self.most_tokens)
        return (math.hypot(hidden_s, 2 * (linear_s + transfer_s)) - hidden_s) / 2 - linear_s

    def ring(self, num_teams: int, size: int) -> WirePrice:
        """Rings of one member of each team (of ``size``), beside kernels. A rank passes its share of the KV heads of
        all teams' tokens but one on. Across nodes, the last team of each node sends over the boundary."""
        degree = num_teams * size
        inside = degree <= self.ranks_per_node
        bytes_per_s = self.cluster.intra_node.bytes_per_s if inside else self.boundary_bytes_per_s(size)
        rank_bytes = 2 * math.ceil(self.kv_heads / size) * self.head_bytes
        return WirePrice(
            s_per_token=self.beside_kernels(degree, size, (num_teams - 1) / num_teams * rank_bytes / bytes_per_s),
            fixed_s=self.latency_s(degree, 2 * (num_teams - 1)),
        )
