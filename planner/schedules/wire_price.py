"""Parts of the cost of communication, which the kinds of attention combine (see ``planner.schedules``).

All costs are seconds of one forward plus backward over all layers. They are linear in the tokens of the group: a term
per token, and a latency term per microbatch.

Transfers that overlap with kernels are not linear. Per token of a group let c be the seconds of its transfers, r the
extra kernel seconds of working in rounds (``WireSetting.rounds_s``), b its token-wise compute, and A m its attention,
where m is the number of tokens per rank (of one sequence over the whole group). Then a token takes
b + max(c, r + A m), but a planner can only price b + p + A m. The p used here minimises the largest relative error over
all m: the price is too low by a factor e for short sequences, too high by the same e where kernels just hide the
transfers (m = (c - r) / A, or the most tokens that a rank can hold), and nearly exact for long sequences. e is at most
1.62 (the golden ratio, for b = r = 0); rings of Llama 3 8B have 1.0 within an H100 node and 1.26 to 1.38 across nodes.
Charging all of c would be exact for short sequences and up to twice too high; a fixed share of it is up to 1 / share
too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.inputs.cluster import ClusterSpec, LinkSpec
from planner.inputs.model import ModelSpec

WIDE_BYTES = 4
"""Bytes per element of partial results and gradients, which are summed in fp32."""
SPAN_BYTES = 72
"""Memory traffic in bytes that one more query element and one more key element per span cost the attention kernels,
forward and backward: from the curve that ``planner.replay.operations`` fits to measured H100 rows, times that device's
memory rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WirePrice:
    """``s_per_token``: exposed seconds per token of the group. ``fixed_s``: latencies of one microbatch.
    ``attention_factor``: the slowest rank's share of the attention work, relative to an even share; above 1 if heads do
    not divide evenly."""

    s_per_token: float = 0.0
    fixed_s: float = 0.0
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSetting:
    """Model, links and compute of one data rank. Groups have consecutive ranks; those of several nodes start at a node.
    ``element_bytes``: bytes per activation element."""

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
        """Bytes of one head of one token, over all layers."""
        return self.model.head_dim * self.element_bytes * self.model.num_layers

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token, over all layers."""
        return 2 * self.kv_heads * self.head_bytes

    @property
    def kv_passes(self) -> float:
        """How often ``kv_bytes`` are sent: in forward, in backward, and as gradients in fp32 or wider."""
        return 2 + max(WIDE_BYTES, self.element_bytes) / self.element_bytes

    @property
    def attention_s(self) -> float:
        """Attention seconds of one rank alone, per token squared."""
        device = self.cluster.device
        flop_per_s = device.peak_flop_per_s * device.attention_efficiency * self.tensor_parallel
        return self.model.attention_flop((1,)) / flop_per_s

    @property
    def linear_s(self) -> float:
        """Seconds of matrix products of one rank alone, per token."""
        device = self.cluster.device
        return self.model.linear_flop(1) / (device.peak_flop_per_s * device.linear_efficiency * self.tensor_parallel)

    @property
    def most_tokens(self) -> float:
        """Upper bound on the tokens of a rank: as many as fit with all activations kept and nothing else in memory."""
        device, model = self.cluster.device, self.model
        saved_bytes = model.num_layers * model.saved_bytes_per_token(self.element_bytes) / self.tensor_parallel
        return (device.memory_bytes - device.reserved_bytes) / saved_bytes

    def link(self, num_ranks: int) -> LinkSpec:
        """The slowest link inside a group of this many consecutive data ranks."""
        return self.cluster.intra_node if num_ranks <= self.ranks_per_node else self.cluster.inter_node

    def latency_s(self, num_ranks: int, hops: int) -> float:
        """Seconds of ``hops`` messages per layer, one after the other, in a group of this many ranks."""
        return hops * self.model.num_layers * self.link(num_ranks).latency_s

    def boundary_bytes_per_s(self, num_crossing: int) -> float:
        """Rate for each of ``num_crossing`` ranks of a node that send to the next node at the same time. They share the
        node's NICs, and each rank can use at most one."""
        nodes, nics = self.cluster, self.cluster.nics_per_node
        nic_bytes_per_s = nodes.inter_node.bytes_per_s * nodes.devices_per_node / nics
        return min(nodes.intra_node.bytes_per_s, nic_bytes_per_s * min(1.0, nics / num_crossing))

    def direct_s_per_token(self, degree: int, spread_bytes: float) -> float:
        """Seconds per token of the group if every rank sends to every other. ``spread_bytes``: bytes of one token
        summed over all members, including its own rank, which needs no message. What a rank receives from its own node
        and what enters the node travel at the same time over their own links."""
        near = min(degree, self.ranks_per_node)
        intra_s = (near - 1) / degree * spread_bytes / self.cluster.intra_node.bytes_per_s
        inter_s = (degree - near) / degree * spread_bytes / self.cluster.inter_node.bytes_per_s
        return max(intra_s, inter_s) / degree

    def head_exchange(self, size: int, degree: int) -> WirePrice:
        """Teams of ``size`` of a group's ``degree`` ranks exchange q, k, v and output, forward and backward, without
        overlap. For K and V the heads sent are counted: at least one per member, so they are replicated if the team is
        larger than the number of KV heads. If the size does not divide the query heads, a member with one head more
        determines the attention time."""
        if size == 1:
            return WirePrice()
        heads = 2 * self.query_heads + 2 * size * math.ceil(self.kv_heads / size)
        return WirePrice(
            s_per_token=self.direct_s_per_token(size, 2 * heads * self.head_bytes) * (size / degree),
            fixed_s=self.latency_s(size, 8),
            attention_factor=math.ceil(self.query_heads / size) * size / self.query_heads,
        )

    def rounds_s(self, num_teams: int, size: int) -> float:
        """Extra kernel seconds per token of the group for working on the keys of one team (of ``size``) at a time.
        Every round reads all queries of the rank, merges its result into the partial output, and adds to the gradients
        of queries and keys, through memory. Groups of any degree pay this for every token."""
        queries = math.ceil(self.query_heads / size) * self.model.head_dim * self.model.num_layers
        keys = math.ceil(self.kv_heads / size) * self.model.head_dim * self.model.num_layers
        merge_bytes = 2 * WIDE_BYTES + self.element_bytes
        moved_bytes = SPAN_BYTES * queries + merge_bytes * (2 * queries + 2 * keys)
        return (num_teams - 1) / num_teams * moved_bytes / self.cluster.device.memory_bytes_per_s

    def beside_kernels(self, degree: int, size: int, kv_pass_s: float) -> float:
        """Seconds per token to charge for rounds whose transfers overlap with kernels: p in the module's docstring.
        ``kv_pass_s``: seconds of one pass of K/V, per token of the group. Teams have ``size`` ranks."""
        transfer_s, rounds_s = self.kv_passes * kv_pass_s, self.rounds_s(degree // size, size)
        if transfer_s <= rounds_s:
            return rounds_s  # always hidden
        linear_s = self.linear_s / degree
        hidden_s = min(transfer_s - rounds_s, self.attention_s * self.most_tokens)
        return (math.hypot(hidden_s, 2 * (linear_s + transfer_s)) - hidden_s) / 2 - linear_s

    def ring(self, num_teams: int, size: int) -> WirePrice:
        """Rings over one member of each team (of ``size``), overlapping with kernels. A rank passes on its share of the
        KV heads for the tokens of all teams but one. The last team of each node sends across the node boundary."""
        degree = num_teams * size
        inside = degree <= self.ranks_per_node
        bytes_per_s = self.cluster.intra_node.bytes_per_s if inside else self.boundary_bytes_per_s(size)
        rank_bytes = 2 * math.ceil(self.kv_heads / size) * self.head_bytes
        return WirePrice(
            s_per_token=self.beside_kernels(degree, size, (num_teams - 1) / num_teams * rank_bytes / bytes_per_s),
            fixed_s=self.latency_s(degree, 2 * (num_teams - 1)),
        )
