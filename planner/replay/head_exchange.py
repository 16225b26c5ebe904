"""Head exchanges in the replay: the all-to-alls inside teams, before and after the rounds (ulysses, usp)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.replay.state import DataRanks, Recorder, TimeLedger, Traffic, nic_load
from planner.replay.work import FloatArray, HeadSplit, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAllToAll:
    """One all-to-all of every team, ``[team, place]``. It starts when the last member arrives and takes as long as the
    slowest member; traffic within a node and traffic that leaves it travel at the same time."""

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

    def run(self, teams: IntArray, clock: FloatArray, ledger: TimeLedger, record: Recorder | None, name: str) -> None:
        here = clock[teams]
        start = here.max(axis=1, keepdims=True)
        stop = start + self.seconds()
        ledger.idle_s[teams] += start - here
        ledger.exposed_s[teams] += stop - start
        clock[teams] = stop
        if record is not None:
            starts, stops = np.broadcast_to(start, teams.shape), np.broadcast_to(stop, teams.shape)
            record("exchange", name, teams, starts, stops)
            far = self.far_sent > 0
            record("nic", name, teams[far], starts[far], stops[far])

    def slowed(self, factor: FloatArray) -> HeadAllToAll:
        return replace(self, far_s_per_byte=self.far_s_per_byte * factor)

    def freed(self) -> HeadAllToAll:
        return replace(self, latency_s=0.0, near_s_per_byte=0.0, far_s_per_byte=np.zeros_like(self.far_s_per_byte))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadExchanges:
    """The four all-to-alls of a layer. Forward: q, k, v before and output after; backward: dout before, dqkv after."""

    teams: IntArray
    qkv: HeadAllToAll
    out: HeadAllToAll
    out_grad: HeadAllToAll
    qkv_grad: HeadAllToAll

    def before(self, is_forward: bool, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        name = "all-to-all of q, k, v" if is_forward else "all-to-all of the output's gradient"
        (self.qkv if is_forward else self.out_grad).run(self.teams, clock, ledger, record, name)

    def after(self, is_forward: bool, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        name = "all-to-all of the output" if is_forward else "all-to-all of dq, dk, dv"
        (self.out if is_forward else self.qkv_grad).run(self.teams, clock, ledger, record, name)

    def traffic(self, is_forward: bool, shape: tuple[int, ...]) -> Traffic:
        first, second = (self.qkv, self.out) if is_forward else (self.out_grad, self.qkv_grad)
        return Traffic(
            far_sent=(first.far_sent + second.far_sent).reshape(shape),
            far_received=(first.far_received + second.far_received).reshape(shape),
            near_sent=(first.near_sent + second.near_sent).reshape(shape),
            near_received=(first.near_received + second.near_received).reshape(shape),
        )

    def slowed(self, forward: FloatArray, backward: FloatArray) -> HeadExchanges:
        forward, backward = forward.reshape(self.teams.shape), backward.reshape(self.teams.shape)
        return replace(
            self, qkv=self.qkv.slowed(forward), out=self.out.slowed(forward), out_grad=self.out_grad.slowed(backward),
            qkv_grad=self.qkv_grad.slowed(backward),
        )

    def freed(self) -> HeadExchanges:
        return replace(
            self, qkv=self.qkv.freed(), out=self.out.freed(), out_grad=self.out_grad.freed(),
            qkv_grad=self.qkv_grad.freed(),
        )


def head_exchanges_of(ranks: IntArray, rows: FloatArray, heads: HeadSplit, data_ranks: DataRanks) -> HeadExchanges:
    """``ranks[group, member]`` and their tokens. A team is as many consecutive members as ``heads`` has places."""
    size = len(heads.queries)
    teams, rows = ranks.reshape(-1, size), rows.reshape(-1, size)
    nodes = data_ranks.node_of(teams)
    near = (nodes[:, :, None] == nodes[:, None, :]) & ~np.eye(size, dtype=np.bool_)
    far = nodes[:, :, None] != nodes[:, None, :]
    leaves = far.any(axis=2).reshape(ranks.shape)  # all teams of a group exchange heads at about the same time
    load = data_ranks.flows_per_rank * nic_load(data_ranks.nic_of(ranks), leaves).reshape(teams.shape)
    machine, head_bytes = data_ranks.machine, data_ranks.model.head_dim * data_ranks.element_bytes
    latency_s = machine.collective_latency_s(size, data_ranks.ranks_per_node)

    def gather(width: FloatArray, is_way_back: bool) -> HeadAllToAll:
        """From own rows of all heads to all rows of own heads, or back."""
        near_rows, far_rows = (np.einsum("gij,gj->gi", mask, rows) for mask in (near, far))
        near_width, far_width = (np.einsum("gij,j->gi", mask, width) for mask in (near, far))
        sent = [head_bytes * rows * each for each in (near_width, far_width)]
        received = [head_bytes * width * each for each in (near_rows, far_rows)]
        if is_way_back:
            sent, received = received, sent
        return HeadAllToAll(
            latency_s=latency_s, near_sent=sent[0], far_sent=sent[1], near_received=received[0],
            far_received=received[1], near_s_per_byte=1 / machine.intra_node.bytes_per_s,
            far_s_per_byte=load / machine.nic_bytes_per_s,
        )

    return HeadExchanges(
        teams=teams, qkv=gather(heads.width, False), out=gather(heads.queries, True),
        out_grad=gather(heads.queries, False), qkv_grad=gather(heads.width, True),
    )
