"""Shared by the parts of the replay: the data_ranks, the ledger of seconds, and how kernels and NICs are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from planner.inputs.model import ModelSpec
from planner.replay.operations import MachineModel
from planner.replay.work import AttentionWork, FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
WIDE_BYTES = 4  # partial results and gradients are sent in fp32

Recorder = Callable[[str, str, IntArray, FloatArray, FloatArray], None]
"""``record(lane, name, ranks, start_s, stop_s)``: keeps an event for drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRanks:
    """Inputs of the replay that all groups share. A data rank is ``tensor_parallel`` adjacent devices; all bytes and
    heads are those of one of these devices."""

    machine: MachineModel
    model: ModelSpec
    num_ranks: int
    tensor_parallel: int
    element_bytes: int

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.machine.cluster.devices_per_node // self.tensor_parallel)

    @property
    def query_heads(self) -> int:
        return self.model.num_query_heads // self.tensor_parallel

    @property
    def kv_heads(self) -> int:
        return -(-self.model.num_kv_heads // self.tensor_parallel)

    @property
    def flows_per_rank(self) -> int:
        """Devices of one data rank that share a NIC and send at the same time."""
        cluster = self.machine.cluster
        return min(self.tensor_parallel, max(1, cluster.devices_per_node // cluster.nics_per_node))

    @property
    def shares_nics(self) -> bool:
        """Whether different ranks share a NIC."""
        cluster = self.machine.cluster
        return cluster.num_nodes > 1 and cluster.devices_per_node > cluster.nics_per_node * self.tensor_parallel

    def node_of(self, ranks: IntArray) -> IntArray:
        return ranks * self.tensor_parallel // self.machine.cluster.devices_per_node

    def nic_of(self, ranks: IntArray) -> IntArray:
        """The NIC of a rank's first device, numbered over the cluster; adjacent devices share one."""
        cluster = self.machine.cluster
        place = ranks * self.tensor_parallel % cluster.devices_per_node
        nics = min(cluster.nics_per_node, cluster.devices_per_node)
        return self.node_of(ranks) * nics + place * nics // cluster.devices_per_node


@dataclass(slots=True)
class TimeLedger:
    """Seconds of each rank by activity, summed up while clocks advance."""

    compute_s: FloatArray
    exposed_s: FloatArray
    swap_s: FloatArray
    idle_s: FloatArray

    @classmethod
    def empty(cls, num_ranks: int) -> TimeLedger:
        return cls(*(np.zeros(num_ranks) for _ in range(4)))

    def add(self, other: TimeLedger, times: float = 1.0) -> None:
        self.compute_s += times * other.compute_s
        self.exposed_s += times * other.exposed_s
        self.swap_s += times * other.swap_s
        self.idle_s += times * other.idle_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of each rank of each group through its NIC (far) and its node's links (near) in one walk, ``[group,
    rank]``."""

    far_sent: FloatArray
    far_received: FloatArray
    near_sent: FloatArray
    near_received: FloatArray


class GroupRun(Protocol):
    """Groups of one shape over disjoint ranks."""

    @property
    def ranks(self) -> IntArray: ...
    @property
    def forward_traffic(self) -> Traffic: ...
    @property
    def backward_traffic(self) -> Traffic: ...

    def forward(self, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None: ...
    def backward(self, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None: ...
    def slowed(self, forward: FloatArray, backward: FloatArray) -> GroupRun: ...
    def freed(self) -> GroupRun: ...


def kernel_seconds(
    work: AttentionWork, data_ranks: DataRanks, heads: FloatArray | float
) -> tuple[FloatArray, FloatArray]:
    """Forward and backward seconds of a group's kernels, including merging partial results and gradients."""
    machine, head_dim, wide = data_ranks.machine, data_ranks.model.head_dim, 2 * WIDE_BYTES + data_ranks.element_bytes
    forward_s = machine.attention.forward_s(
        calls=work.calls, queries=work.queries, keys=work.keys, pairs=work.pairs, heads=heads, head_dim=head_dim
    )
    kv_heads = np.minimum(heads, data_ranks.kv_heads)
    grads = heads * work.queries + 2 * kv_heads * work.keys
    merge_s = machine.move_s(wide * head_dim * heads * work.merged)
    return forward_s + merge_s, machine.backward_ratio * forward_s + machine.move_s(wide * head_dim * grads)


def nic_load(nics: IntArray, active: BoolArray) -> FloatArray:
    """For each rank, how many active members of its own group use the same NIC, ``[group, rank]``."""
    groups, _ = nics.shape
    span = int(nics.max()) + 1
    keys = np.arange(groups)[:, None] * span + nics
    counts = np.bincount(keys.ravel(), weights=active.ravel().astype(np.float64), minlength=groups * span)
    return np.asarray(counts[keys], dtype=np.float64)
