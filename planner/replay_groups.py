"""One layer's attention in the replay: groups of one shape as arrays that move a clock per rank.

A group's ranks go through its rounds as ``parallel.rounds`` walks them: post the next round's messages, run this
round's kernels, wait for both ends of the messages. A message starts when both ends have posted it. Waiting for it to
arrive is exposed communication; waiting because the other end posted late is idle time at first sight (see
``planner.replay`` for what the other end was late for).

Arrays are ``[group, rank]`` (group index) or ``[round, group, rank]``. Flows of one group in one round are under way
together: a NIC's rate is divided evenly among those that use it. What other groups take of it comes with ``slowed``.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.plan import AttentionGroup
from planner.replay_state import (
    WIDE_BYTES,
    BoolArray,
    Ledger,
    Recorder,
    Setting,
    Traffic,
    kernel_seconds,
    nic_load,
)
from planner.replay_work import FloatArray, IntArray, attention_work, group_tokens


@dataclass(frozen=True, slots=True)
class LocalRun:
    """Groups of one rank each: no messages. A rank may be there several times."""

    ranks: IntArray
    forward_s: FloatArray
    backward_s: FloatArray

    @property
    def forward_traffic(self) -> Traffic:
        nothing = np.zeros(self.ranks.shape)
        return Traffic(far_sent=nothing, far_received=nothing, near_sent=nothing, near_received=nothing)

    @property
    def backward_traffic(self) -> Traffic:
        return self.forward_traffic

    def forward(self, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        self._run(self.forward_s, clock, ledger, record)

    def backward(self, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        self._run(self.backward_s, clock, ledger, record)

    def _run(self, seconds: FloatArray, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        ranks = self.ranks.ravel()
        total_s = np.bincount(ranks, weights=seconds.ravel(), minlength=len(clock))
        if record is not None:
            unique = np.unique(ranks)
            record("compute", "local attention", unique, clock[unique], clock[unique] + total_s[unique])
        clock += total_s
        ledger.compute_s += total_s

    def slowed(self, forward: FloatArray, backward: FloatArray) -> LocalRun:
        return self

    def freed(self) -> LocalRun:
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class RingWalk:
    """One direction: ``kernel_s`` of each round and the message posted in it, ``[round, group, rank]``.

    ``source``, ``target``: group index of the other end of what a rank receives and sends. ``hop_bytes``: into the
    rank. ``is_far``: it comes from another node. ``has_message``: of each round, whether any group sends.
    """

    source: IntArray
    target: IntArray
    kernel_s: FloatArray
    hop_bytes: FloatArray
    latency_s: FloatArray
    s_per_byte: FloatArray
    is_far: BoolArray

    def run(self, ranks: IntArray, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        start = clock[ranks]
        exposed, idle = np.zeros(start.shape), np.zeros(start.shape)
        has_hop = np.asarray(self.hop_bytes > 0, dtype=np.bool_)
        hop_s = np.where(has_hop, self.latency_s + self.hop_bytes * self.s_per_byte, 0.0)
        left_s, leaves = hop_s[:, :, self.target], has_hop[:, :, self.target]
        full, some = (np.asarray(each((1, 2))).tolist() for each in (has_hop.all, has_hop.any))
        for number, kernel_s in enumerate(self.kernel_s):
            after = finish = start + kernel_s
            if some[number]:
                into, out = start[:, self.source], start[:, self.target]
                arrive = np.maximum(start, into) + hop_s[number]
                left = np.maximum(start, out) + left_s[number]
                posted = np.maximum(into, out)
                if not full[number]:
                    arrive, left = np.where(has_hop[number], arrive, start), np.where(leaves[number], left, start)
                    posted = np.maximum(
                        np.where(has_hop[number], into, start), np.where(leaves[number], out, start)
                    )
                after = np.maximum(finish, np.maximum(arrive, left))
                late = np.maximum(posted, finish) - finish
                idle += late
                exposed += after - finish - late
            if record is not None:
                self._draw(record, number, ranks, start, finish, hop_s)
            start = after
        clock[ranks] = start
        ledger.compute_s[ranks] += self.kernel_s.sum(axis=0)
        ledger.exposed_s[ranks] += exposed
        ledger.idle_s[ranks] += idle

    def _draw(
        self, record: Recorder, number: int, ranks: IntArray, start: FloatArray, finish: FloatArray, hop_s: FloatArray
    ) -> None:
        record("compute", f"round {number}", ranks, start, finish)
        posted = np.maximum(start, start[:, self.source])
        arrived, name = posted + hop_s[number], f"message of round {number}"
        for lane, chosen in (("exchange", hop_s[number] > 0), ("nic", (hop_s[number] > 0) & self.is_far)):
            record(lane, name, ranks[chosen], posted[chosen], arrived[chosen])

    @property
    def traffic(self) -> Traffic:
        received = self.hop_bytes.sum(axis=0)
        far, near = np.where(self.is_far, received, 0.0), np.where(self.is_far, 0.0, received)
        return Traffic(
            far_sent=far[:, self.target], far_received=far, near_sent=near[:, self.target], near_received=near
        )

    def slowed(self, factor: FloatArray) -> RingWalk:
        slow = np.maximum(factor, factor[:, self.source])
        return replace(self, s_per_byte=np.where(self.is_far, self.s_per_byte * slow, self.s_per_byte))

    def freed(self) -> RingWalk:
        nothing = np.zeros_like(self.latency_s)
        return replace(self, latency_s=nothing, s_per_byte=nothing)


@dataclass(frozen=True, slots=True)
class RingRun:
    """Zigzag rings of one degree."""

    ranks: IntArray
    there: RingWalk
    back: RingWalk

    @property
    def forward_traffic(self) -> Traffic:
        return self.there.traffic

    @property
    def backward_traffic(self) -> Traffic:
        return self.back.traffic

    def forward(self, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        self.there.run(self.ranks, clock, ledger, record)

    def backward(self, clock: FloatArray, ledger: Ledger, record: Recorder | None) -> None:
        self.back.run(self.ranks, clock, ledger, record)

    def slowed(self, forward: FloatArray, backward: FloatArray) -> RingRun:
        return RingRun(self.ranks, self.there.slowed(forward), self.back.slowed(backward))

    def freed(self) -> RingRun:
        return RingRun(self.ranks, self.there.freed(), self.back.freed())


def local_run(groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], setting: Setting) -> LocalRun:
    """Groups of one rank: their kernels, nothing else."""
    seconds = [kernel_seconds(attention_work(group, lengths), setting, setting.query_heads) for group in groups]
    return LocalRun(
        np.array([group.ranks for group in groups]), np.array([float(each[0].sum()) for each in seconds])[:, None],
        np.array([float(each[1].sum()) for each in seconds])[:, None],
    )


def ring_run(groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], setting: Setting) -> RingRun:
    """Rings of one degree over disjoint ranks: forward degree rounds, backward one more (see ``planner.schedule``)."""
    ranks = np.array([group.ranks for group in groups])
    degree = ranks.shape[1]
    place, hops = np.arange(degree), np.arange(degree + 1)[:, None]
    behind, ahead = (place - hops) % degree, (place + hops) % degree
    tokens = np.array([group_tokens(group, lengths) for group in groups], dtype=np.float64)
    works = [kernel_seconds(attention_work(group, lengths), setting, setting.query_heads) for group in groups]
    there_s = np.stack([forward_s[place, behind[:degree]] for forward_s, _ in works], axis=1)
    back_s = np.stack([backward_s[place, ahead[:degree]] for _, backward_s in works], axis=1)
    token_bytes = 2 * setting.kv_heads * setting.model.head_dim
    kv_bytes, grad_bytes = token_bytes * setting.element_bytes, token_bytes * max(WIDE_BYTES, setting.element_bytes)
    arriving = tokens.T[behind].transpose(0, 2, 1)  # [hops, group, rank]: tokens of the shard that many places behind
    returning = tokens.T[ahead].transpose(0, 2, 1)
    there, back = np.zeros((degree, *tokens.shape)), np.zeros((degree + 1, *tokens.shape))
    there[:-1] = kv_bytes * arriving[1:degree]
    back[: degree - 1] = kv_bytes * returning[1:degree]
    back[2:] += grad_bytes * returning[2:]
    return RingRun(
        ranks, _ring_walk(setting, ranks, behind[1], there_s, there),
        _ring_walk(setting, ranks, ahead[1], np.concatenate([back_s, np.zeros((1, *tokens.shape))]), back),
    )


def _ring_walk(
    setting: Setting, ranks: IntArray, source: IntArray, kernel_s: FloatArray, hop_bytes: FloatArray
) -> RingWalk:
    machine, target = setting.machine, np.argsort(source)
    nodes, nics = setting.node_of(ranks), setting.nic_of(ranks)
    is_far = nodes != nodes[:, source]
    load = np.maximum(nic_load(nics, is_far), nic_load(nics, is_far[:, target])[:, source])
    near_s = 1 / machine.intra_node.bytes_per_s
    far_s = np.maximum(near_s, setting.flows_per_rank * load / machine.nic_bytes_per_s)
    return RingWalk(
        source=source, target=target, kernel_s=kernel_s, hop_bytes=hop_bytes, is_far=is_far,
        latency_s=np.where(is_far, machine.inter_node.latency_s, machine.intra_node.latency_s),
        s_per_byte=np.where(is_far, far_s, near_s),
    )
