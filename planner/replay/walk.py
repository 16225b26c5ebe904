"""Walks groups of one shape through the rounds of their schedules, as ``parallel.rounds`` does: post this round's
messages, run its kernels, wait for the messages that are due.

A message starts when both ends have posted it and have finished what they posted before, because a rank has one
communicator, which runs its batches one after the other. Waiting for it to arrive is exposed communication; waiting
because the other end posted late counts as idle time at first (``planner.replay.step`` decides why the other end was
late). Messages of a group in one batch are in flight together: those that share a port or a NIC end together. The NIC
use of other groups is taken into account by ``slowed``.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.replay.flows import Messages
from planner.replay.state import BoolArray, DataRanks, Recorder, TimeLedger, Traffic
from planner.replay.work import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """Messages of several groups of one shape, in the order in which they are posted.

    ``source``, ``target``: member, numbered over all groups. ``port_bytes``, ``nic_bytes``: bytes of the message's
    batch through the busier of the two ports, and of the two NICs, that it uses (no NICs within a node).
    ``batches[round]``: (round that waits, first message, last message + 1) of what is posted in that round.
    ``is_chained``: whether a batch may still be in flight when a later one is posted.
    """

    source: IntArray
    target: IntArray
    num_bytes: FloatArray
    port_bytes: FloatArray
    nic_bytes: FloatArray
    is_far: BoolArray
    batches: tuple[tuple[tuple[int, int, int], ...], ...]
    is_chained: bool


def flows_of(messages: SequenceOf[Messages], ranks: IntArray, data_ranks: DataRanks, num_rounds: int) -> Flows:
    """The flows of all groups; ``messages[g]`` are those of the group of ``ranks[g]``."""
    degree = ranks.shape[1]
    group = np.repeat(np.arange(len(messages)), [len(each.posted) for each in messages])
    posted, wait_after, source, target = (
        np.concatenate([getattr(each, name) for each in messages])
        for name in ("posted", "wait_after", "source", "target")
    )
    num_bytes = np.concatenate([each.num_bytes for each in messages])
    batch = posted * (num_rounds + 1) + wait_after
    if (batch[1:] < batch[:-1]).any():
        order = np.argsort(batch, kind="stable")
        batch, group, source, target = batch[order], group[order], source[order], target[order]
        num_bytes = num_bytes[order]
    starts = np.flatnonzero(np.diff(batch, prepend=-1))
    number = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(batch)))
    source, target = group * degree + source, group * degree + target
    member_ranks = ranks.ravel()
    nodes, nics = data_ranks.node_of(member_ranks), data_ranks.nic_of(member_ranks)
    is_far = nodes[source] != nodes[target]
    port_bytes, nic_bytes = num_bytes, np.zeros_like(num_bytes)
    for end in (source, target):
        port_bytes = np.maximum(port_bytes, _shared((number * len(member_ranks) + end) * 2 + is_far, num_bytes))
    if is_far.any():
        far, num_nics = np.flatnonzero(is_far), 1 + int(nics.max())
        for end in (source, target):
            nic = (number[far] * len(ranks) + group[far]) * num_nics + nics[end[far]]
            nic_bytes[far] = np.maximum(nic_bytes[far], _shared(nic, num_bytes[far]))
    return Flows(
        source=source, target=target, num_bytes=num_bytes, port_bytes=port_bytes, nic_bytes=nic_bytes, is_far=is_far,
        batches=_batches(batch, starts, num_rounds), is_chained=bool((posted != wait_after).any()),
    )


def _batches(batch: IntArray, starts: IntArray, num_rounds: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(num_rounds)]
    stops = np.append(starts, len(batch))[1:]
    for number, start, stop in zip(batch[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
        posted, wait_after = divmod(number, num_rounds + 1)
        found[posted].append((wait_after, start, stop))
    return tuple(map(tuple, found))


def _shared(owner: IntArray, num_bytes: FloatArray) -> FloatArray:
    """For each message the bytes of all messages with the same owner."""
    return np.asarray(np.bincount(owner, weights=num_bytes)[owner], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """One direction of all groups of a run. ``kernel_s``: ``[round, member]``. ``latency_s``, ``wire_s``: of each
    message of ``flows``."""

    flows: Flows
    kernel_s: FloatArray
    latency_s: FloatArray
    wire_s: FloatArray

    def run(self, ranks: IntArray, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        """Advance the clocks of ``ranks[group, member]``, in which no rank appears twice."""
        flat = ranks.ravel()
        start = clock[flat]
        exposed, idle, free_s = np.zeros(len(flat)), np.zeros(len(flat)), start
        due: dict[int, tuple[FloatArray, FloatArray]] = {}
        all_s = self.latency_s + self.wire_s
        for number, kernel_s in enumerate(self.kernel_s):
            after = finish = start + kernel_s
            for wait_after, first, last in self.flows.batches[number]:
                source, target = self.flows.source[first:last], self.flows.target[first:last]
                ready = np.maximum(start, free_s) if self.flows.is_chained else start
                begins = np.maximum(ready[source], ready[target])
                arrives = begins + all_s[first:last]
                done, posted = due.pop(wait_after, (start, start))
                ended = _latest(ready, source, target, arrives, arrives)
                if self.flows.is_chained:
                    free_s = np.maximum(free_s, ended)
                done = np.maximum(done, ended)
                posted = np.maximum(posted, _latest(start, source, target, start[target], start[source]))
                due[wait_after] = (done, posted)
                if record is not None:
                    self._draw(record, number, flat, slice(first, last), begins, arrives)
            if number in due:
                done, posted = due.pop(number)
                after = np.maximum(finish, done)
                late = np.maximum(posted, finish) - finish
                idle += late
                exposed += after - finish - late
            if record is not None:
                record("compute", f"round {number}", flat, start, finish)
            start = after
        clock[flat] = start
        ledger.compute_s[flat] += self.kernel_s.sum(axis=0)
        ledger.exposed_s[flat] += exposed
        ledger.idle_s[flat] += idle

    def _draw(
        self, record: Recorder, number: int, ranks: IntArray, places: slice, begins: FloatArray, arrives: FloatArray
    ) -> None:
        """Record messages on the receivers' lanes."""
        name, target, is_far = f"message of round {number}", self.flows.target[places], self.flows.is_far[places]
        record("exchange", name, ranks[target], begins, arrives)
        record("nic", name, ranks[target[is_far]], begins[is_far], arrives[is_far])

    def traffic(self, shape: tuple[int, ...]) -> Traffic:
        flows, size = self.flows, self.kernel_s.shape[1]

        def added(member: IntArray, is_chosen: BoolArray) -> FloatArray:
            total = np.bincount(member, weights=np.where(is_chosen, flows.num_bytes, 0.0), minlength=size)
            return np.asarray(total.reshape(shape), dtype=np.float64)

        return Traffic(
            far_sent=added(flows.source, flows.is_far), far_received=added(flows.target, flows.is_far),
            near_sent=added(flows.source, ~flows.is_far), near_received=added(flows.target, ~flows.is_far),
        )

    def slowed(self, factor: FloatArray) -> Walk:
        """``factor[group, member]``: multiplies the seconds per byte through the member's NIC."""
        factor = factor.ravel()
        slow = np.maximum(factor[self.flows.source], factor[self.flows.target])
        return replace(self, wire_s=np.where(self.flows.is_far, self.wire_s * slow, self.wire_s))

    def freed(self) -> Walk:
        nothing = np.zeros_like(self.wire_s)
        return replace(self, latency_s=nothing, wire_s=nothing)


def _latest(
    floor: FloatArray, source: IntArray, target: IntArray, at_source: FloatArray, at_target: FloatArray
) -> FloatArray:
    """The latest time of each member's messages, but at least its floor."""
    found = floor.copy()
    np.maximum.at(found, source, at_source)
    np.maximum.at(found, target, at_target)
    return found


def walk_of(flows: Flows, kernel_s: FloatArray, data_ranks: DataRanks) -> Walk:
    """The walk of these flows at this machine's rates."""
    machine = data_ranks.machine
    nic_s = data_ranks.flows_per_rank * flows.nic_bytes / machine.nic_bytes_per_s
    near, far = machine.intra_node, machine.inter_node
    return Walk(
        flows=flows, kernel_s=kernel_s, latency_s=np.where(flows.is_far, far.latency_s, near.latency_s),
        wire_s=np.maximum(flows.port_bytes / near.bytes_per_s, nic_s),
    )
