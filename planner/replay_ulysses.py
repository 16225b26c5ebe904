"""Ulysses groups in the replay: all-to-alls around kernels over whole sequences. See ``planner.replay_groups``."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.plan import AttentionGroup
from planner.replay_state import Ledger, Recorder, Setting, Traffic, kernel_seconds, nic_load
from planner.replay_work import FloatArray, IntArray, attention_work, group_tokens, split_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTrade:
    """One all-to-all of every group. It starts when the last member is there and takes as long as its slowest member;
    what stays in a node and what leaves it travel at the same time."""

    latency_s: float
    near_sent: FloatArray
    near_received: FloatArray
    far_sent: FloatArray
    far_received: FloatArray
    near_s_per_byte: float
    far_s_per_byte: FloatArray

    def seconds(self) -> FloatArray:
        near_s = np.maximum(self.near_sent, self.near_received) * self.near_s_per_byte
        far_s = np.maximum(self.far_sent, self.far_received) * self.far_s_per_byte
        return np.asarray(self.latency_s + np.maximum(near_s, far_s).max(axis=1, keepdims=True), dtype=np.float64)

    def run(self, ranks: IntArray, clock: FloatArray, ledger: Ledger, record: Recorder | None, name: str) -> None:
        here = clock[ranks]
        start = here.max(axis=1, keepdims=True)
        stop = start + self.seconds()
        ledger.idle_s[ranks] += start - here
        ledger.exposed_s[ranks] += stop - start
        clock[ranks] = stop
        if record is not None:
            starts, stops = np.broadcast_to(start, ranks.shape), np.broadcast_to(stop, ranks.shape)
            record("exchange", name, ranks, starts, stops)
            far = self.far_sent > 0
            record("nic", name, ranks[far], starts[far], stops[far])

    def slowed(self, factor: FloatArray) -> HeadTrade:
        return replace(self, far_s_per_byte=self.far_s_per_byte * factor)

    def freed(self) -> HeadTrade:
        return replace(self, latency_s=0.0, near_s_per_byte=0.0, far_s_per_byte=np.zeros_like(self.far_s_per_byte))


@dataclass(frozen=True, slots=True, kw_only=True)
class UlyssesRun:
    """Ulysses groups of one degree: q, k, v in, output out; in the backward its gradient in, theirs out."""

    ranks: IntArray
    forward_s: FloatArray
    backward_s: FloatArray
    qkv: HeadTrade
    out: HeadTrade
    out_grad: HeadTrade
    qkv_grad: HeadTrade

    @property
    def forward_traffic(self) -> Traffic:
        return _total(self.qkv, self.out)

    @property
    def backward_traffic(self) -> Traffic:
        return _total(self.out_grad, self.qkv_grad)

    def forward(self, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        self.qkv.run(self.ranks, clock, ledger, record, "all-to-all of q, k, v")
        self._kernels(self.forward_s, clock, ledger, record)
        self.out.run(self.ranks, clock, ledger, record, "all-to-all of the output")

    def backward(self, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        self.out_grad.run(self.ranks, clock, ledger, record, "all-to-all of the output's gradient")
        self._kernels(self.backward_s, clock, ledger, record)
        self.qkv_grad.run(self.ranks, clock, ledger, record, "all-to-all of dq, dk, dv")

    def _kernels(self, seconds: FloatArray, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        if record is not None:
            record("compute", "attention", self.ranks, clock[self.ranks], clock[self.ranks] + seconds)
        clock[self.ranks] += seconds
        ledger.compute_s[self.ranks] += seconds

    def slowed(self, forward: FloatArray, backward: FloatArray) -> UlyssesRun:
        return replace(
            self, qkv=self.qkv.slowed(forward), out=self.out.slowed(forward), out_grad=self.out_grad.slowed(backward),
            qkv_grad=self.qkv_grad.slowed(backward),
        )

    def freed(self) -> UlyssesRun:
        return replace(
            self, qkv=self.qkv.freed(), out=self.out.freed(), out_grad=self.out_grad.freed(),
            qkv_grad=self.qkv_grad.freed(),
        )


def _total(first: HeadTrade, second: HeadTrade) -> Traffic:
    return Traffic(
        far_sent=first.far_sent + second.far_sent, far_received=first.far_received + second.far_received,
        near_sent=first.near_sent + second.near_sent, near_received=first.near_received + second.near_received,
    )


def ulysses_run(groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], setting: Setting) -> UlyssesRun:
    """Ulysses groups of one degree over disjoint ranks."""
    ranks = np.array([group.ranks for group in groups])
    degree = ranks.shape[1]
    heads = split_heads(setting.query_heads, setting.kv_heads, degree)
    rows = np.array([group_tokens(group, lengths) for group in groups], dtype=np.float64)
    seconds = [
        kernel_seconds(attention_work(group, lengths), setting, heads.queries[:, None]) for group in groups
    ]
    nodes = setting.node_of(ranks)
    near = (nodes[:, :, None] == nodes[:, None, :]) & ~np.eye(degree, dtype=np.bool_)
    far = nodes[:, :, None] != nodes[:, None, :]
    load = setting.flows_per_rank * nic_load(setting.nic_of(ranks), far.any(axis=2))
    machine, head_bytes = setting.machine, setting.model.head_dim * setting.element_bytes
    latency_s = machine.collective_latency_s(degree, setting.ranks_per_node)

    def gather(width: FloatArray, is_way_back: bool) -> HeadTrade:
        """Own rows of all heads -> all rows of own heads, or the way back."""
        near_rows, far_rows = (np.einsum("gij,gj->gi", mask, rows) for mask in (near, far))
        near_width, far_width = (np.einsum("gij,j->gi", mask, width) for mask in (near, far))
        sent = [head_bytes * rows * each for each in (near_width, far_width)]
        received = [head_bytes * width * each for each in (near_rows, far_rows)]
        if is_way_back:
            sent, received = received, sent
        return HeadTrade(
            latency_s=latency_s, near_sent=sent[0], far_sent=sent[1], near_received=received[0],
            far_received=received[1], near_s_per_byte=1 / machine.intra_node.bytes_per_s,
            far_s_per_byte=load / machine.nic_bytes_per_s,
        )

    return UlyssesRun(
        ranks=ranks, forward_s=np.stack([each[0][:, 0] for each in seconds]),
        backward_s=np.stack([each[1][:, 0] for each in seconds]), qkv=gather(heads.width, False),
        out=gather(heads.queries, True), out_grad=gather(heads.queries, False), qkv_grad=gather(heads.width, True),
    )
