"""Seconds of one decoder layer, forward and backward, under rings, zones, routing and remapping.

A ring of G ranks takes (G - 1) max(c, m) + c in the forward, with c the attention of one round and m the K and V
handed on, and (G - 1) max(2.5 c, 2 m) + 2.5 c in the backward, where gradients travel along. The slowest hop paces a
ring. Over nodes that is the one hop that leaves each node, over the NICs next to its sender or, routed, over all NICs
of the node. A rank in several rings runs them one after the other, and its own sequences last. Kernels run at one rate
at every length, latency and launches are left out: what is compared are bytes and FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.inputs.cluster import ClusterSpec
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind
from planner.schedules.layout import local_token_counts
from planner.schedules.remap import Move, balanced_counts, token_moves
from planner.schedules.routing import best_num_proxies, routed_transfer_s

ELEMENT_BYTES = 2
BACKWARD_FLOP = 2.5  # of attention, over the forward's: scores are computed again
BACKWARD_BYTES = 2  # of a ring, over the forward's: K and V, and their gradients
NUM_REMAPS = 4  # to the balanced layout and back, forward and backward


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneGroup:
    """Sequences of these lengths (tokens) shared by a ring of these ranks, or whole on the one rank."""

    ranks: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of ``model`` on ``num_ranks`` data ranks of ``tensor_parallel`` neighbouring devices each. Ranks fill
    nodes in order."""

    cluster: ClusterSpec
    model: ModelSpec
    num_ranks: int
    tensor_parallel: int = 1

    @property
    def node_ranks(self) -> int:
        return self.cluster.devices_per_node // self.tensor_parallel

    @property
    def nic_bytes_per_s(self) -> float:
        """One NIC; the cluster's inter-node rate is a device's share of it with all devices at work."""
        return self.cluster.inter_node.bytes_per_s * self.cluster.devices_per_node / self.cluster.nics_per_node

    @property
    def devices_per_nic(self) -> int:
        return max(1, self.cluster.devices_per_node // self.cluster.nics_per_node)

    def te_cp_s(self, lengths: SequenceOf[int], *, routed: bool = False) -> float:
        """One ring of all ranks over every sequence."""
        everything = ZoneGroup(ranks=tuple(range(self.num_ranks)), lengths=tuple(lengths))
        return self.seconds((everything,), routed=routed, remapped=False)

    def seconds(self, groups: SequenceOf[ZoneGroup], *, routed: bool, remapped: bool) -> float:
        """The layer. Ranks wait for each other in the remap; without it, only at the layer's end."""
        attention_s, tokens = [0.0] * self.num_ranks, [0] * self.num_ranks
        for group in groups:
            group_s = self.ring_s(group, routed=routed)
            kind = AttentionKind.RING if len(group.ranks) > 1 else AttentionKind.LOCAL
            counts = local_token_counts(kind, len(group.ranks), group.lengths)
            for rank, count in zip(group.ranks, counts, strict=True):
                attention_s[rank] += group_s
                tokens[rank] += count
        if not remapped:
            return max(spent_s + self.linear_s(count) for spent_s, count in zip(attention_s, tokens, strict=True))
        balanced = balanced_counts(sum(tokens), self.num_ranks)
        moves_s = self.moves_s(token_moves(tokens, balanced, self.node_ranks))
        return max(attention_s) + NUM_REMAPS * moves_s + self.linear_s(balanced[0])

    def ring_s(self, group: ZoneGroup, *, routed: bool) -> float:
        degree = len(group.ranks)
        compute_s = self.attention_forward_s(sum((size / degree) ** 2 for size in group.lengths))
        num_nodes = len({rank // self.node_ranks for rank in group.ranks})
        hop_s = self.hop_s(sum(group.lengths) / degree, between_nodes=num_nodes > 1, routed=routed)
        backward_s = BACKWARD_FLOP * compute_s
        return (
            (degree - 1) * (max(compute_s, hop_s) + max(backward_s, BACKWARD_BYTES * hop_s)) + compute_s + backward_s
        )

    def attention_forward_s(self, num_tokens2: float) -> float:
        """Causal attention of one rank: 2 FLOPs a token^2 and element of the heads. The cluster's efficiency counts the
        backward as twice the forward, kernels do 2.5 times."""
        device, model = self.cluster.device, self.model
        flop_per_s = device.peak_flop_per_s * device.attention_efficiency * (1 + BACKWARD_FLOP) / 3
        return 2 * num_tokens2 * model.num_query_heads * model.head_dim / self.tensor_parallel / flop_per_s

    def hop_s(self, num_tokens: float, *, between_nodes: bool, routed: bool) -> float:
        """K and V of so many tokens from a rank to the next one of its ring, each of its devices with its own heads.

        Devices of a rank share the NICs next to them; routed, every NIC of the node takes an equal part.
        """
        kv_elements = 2 * self.model.num_kv_heads * self.model.head_dim
        device_bytes = num_tokens * kv_elements * ELEMENT_BYTES / self.tensor_parallel
        intra_s_per_byte = 1 / self.cluster.intra_node.bytes_per_s
        if not between_nodes:
            return device_bytes * intra_s_per_byte
        own_nics = min(math.ceil(self.tensor_parallel / self.devices_per_nic), self.cluster.nics_per_node)
        inter_s_per_byte = self.tensor_parallel / (own_nics * self.nic_bytes_per_s)
        num_proxies = 1
        if routed:
            num_proxies = best_num_proxies(
                intra_s_per_byte=intra_s_per_byte, inter_s_per_byte=inter_s_per_byte,
                num_available=self.cluster.nics_per_node // own_nics,
            )
        return max(device_bytes * intra_s_per_byte, routed_transfer_s(
            device_bytes, intra_s_per_byte=intra_s_per_byte, inter_s_per_byte=inter_s_per_byte, num_proxies=num_proxies,
        ))

    def linear_s(self, num_tokens: int) -> float:
        """Matrix products of a rank's tokens and, with tensor parallelism, four all-reduces of their hidden states."""
        device, size = self.cluster.device, self.tensor_parallel
        flop = 6 * self.model.layer_active_params * num_tokens / size
        wire_bytes = 2 * (size - 1) / size * self.model.hidden_dim * ELEMENT_BYTES * num_tokens
        products_s = flop / (device.peak_flop_per_s * device.linear_efficiency)
        return products_s + 4 * wire_bytes / self.cluster.intra_node.bytes_per_s

    def moves_s(self, moves: Iterable[Move]) -> float:
        """One exchange of hidden states, all moves at once, split over a rank's devices: the busiest link or NIC, in
        its busier direction."""
        token_bytes = self.model.hidden_dim * ELEMENT_BYTES / self.tensor_parallel
        inside: dict[tuple[str, int], int] = {}
        outside: dict[tuple[str, int], int] = {}
        for source, destination, tokens in moves:
            same_node = source // self.node_ranks == destination // self.node_ranks
            for way, rank in (("out", source), ("in", destination)):
                if same_node:
                    inside[way, rank] = inside.get((way, rank), 0) + tokens
                    continue
                for device in range(rank * self.tensor_parallel, (rank + 1) * self.tensor_parallel):
                    nic = (way, device // self.devices_per_nic)
                    outside[nic] = outside.get(nic, 0) + tokens
        return token_bytes * max(
            max(inside.values(), default=0) / self.cluster.intra_node.bytes_per_s,
            max(outside.values(), default=0) / self.nic_bytes_per_s,
        )
