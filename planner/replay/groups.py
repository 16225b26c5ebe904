"""One layer's attention in the replay: groups of the same shape as arrays that advance a clock per rank.

``GroupStack`` holds what the groups do, without rates, so that it is computed once for a machine and both ends of its
spread; ``priced`` gives seconds.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from planner.plan import AttentionGroup
from planner.replay.flows import group_shape
from planner.replay.head_exchange import HeadExchanges, head_exchanges_of
from planner.replay.state import DataRanks, GroupRun, Recorder, TimeLedger, Traffic, kernel_seconds
from planner.replay.walk import Flows, Walk, flows_of, walk_of
from planner.replay.work import AttentionWork, FloatArray, HeadSplit, IntArray, side_by_side


@dataclass(frozen=True, slots=True)
class LocalRun:
    """Groups of one rank each, without messages. A rank may be in several of them."""

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

    def forward(self, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        self._run(self.forward_s, clock, ledger, record)

    def backward(self, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        self._run(self.backward_s, clock, ledger, record)

    def _run(self, seconds: FloatArray, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
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


@dataclass(frozen=True, slots=True)
class ExchangeRun:
    """Groups of one kind and degree over disjoint ranks: head exchange, rounds, head exchange back."""

    ranks: IntArray
    forward_walk: Walk
    backward_walk: Walk
    head_exchanges: HeadExchanges | None

    @property
    def forward_traffic(self) -> Traffic:
        return self._traffic(True)

    @property
    def backward_traffic(self) -> Traffic:
        return self._traffic(False)

    def _traffic(self, is_forward: bool) -> Traffic:
        walked = (self.forward_walk if is_forward else self.backward_walk).traffic(self.ranks.shape)
        if self.head_exchanges is None:
            return walked
        heads = self.head_exchanges.traffic(is_forward, self.ranks.shape)
        return Traffic(
            far_sent=walked.far_sent + heads.far_sent, far_received=walked.far_received + heads.far_received,
            near_sent=walked.near_sent + heads.near_sent, near_received=walked.near_received + heads.near_received,
        )

    def forward(self, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        self._run(True, clock, ledger, record)

    def backward(self, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        self._run(False, clock, ledger, record)

    def _run(self, is_forward: bool, clock: FloatArray, ledger: TimeLedger, record: Recorder | None) -> None:
        if self.head_exchanges is not None:
            self.head_exchanges.before(is_forward, clock, ledger, record)
        (self.forward_walk if is_forward else self.backward_walk).run(self.ranks, clock, ledger, record)
        if self.head_exchanges is not None:
            self.head_exchanges.after(is_forward, clock, ledger, record)

    def slowed(self, forward: FloatArray, backward: FloatArray) -> ExchangeRun:
        return ExchangeRun(
            self.ranks, self.forward_walk.slowed(forward), self.backward_walk.slowed(backward),
            self.head_exchanges.slowed(forward, backward) if self.head_exchanges is not None else None,
        )

    def freed(self) -> ExchangeRun:
        return replace(
            self, forward_walk=self.forward_walk.freed(), backward_walk=self.backward_walk.freed(),
            head_exchanges=self.head_exchanges.freed() if self.head_exchanges is not None else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStack:
    """Groups of one shape, ``[group, member]``; work is ``[round, member of all groups]``. ``rows``: tokens of each
    member outside attention."""

    ranks: IntArray
    rows: FloatArray
    heads: HeadSplit
    forward_work: AttentionWork
    backward_work: AttentionWork
    forward_flows: Flows
    backward_flows: Flows

    def priced(self, data_ranks: DataRanks) -> GroupRun:
        heads = np.tile(self.heads.queries, self.ranks.size // len(self.heads.queries))
        forward_s, _ = kernel_seconds(self.forward_work, data_ranks, heads)
        _, backward_s = kernel_seconds(self.backward_work, data_ranks, heads)
        if self.ranks.shape[1] == 1:
            return LocalRun(self.ranks, forward_s.sum(axis=0)[:, None], backward_s.sum(axis=0)[:, None])
        return ExchangeRun(
            self.ranks, walk_of(self.forward_flows, forward_s, data_ranks),
            walk_of(self.backward_flows, backward_s, data_ranks),
            head_exchanges_of(self.ranks, self.rows, self.heads, data_ranks) if len(self.heads.queries) > 1 else None,
        )


def stack_groups(
    groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], data_ranks: DataRanks, *, is_written: bool = False
) -> GroupStack:
    """Stack groups of one kind and degree; ranks must be disjoint unless the degree is 1. ``is_written``: see
    ``group_shape``."""
    shapes = [group_shape(group, lengths, data_ranks, is_written=is_written) for group in groups]
    ranks = np.array([group.ranks for group in groups])
    forward_work, backward_work = (
        side_by_side([getattr(shape, walk).work for shape in shapes]) for walk in ("forward", "backward")
    )
    return GroupStack(
        ranks=ranks, rows=np.array([shape.rows for shape in shapes], dtype=np.float64), heads=shapes[0].heads,
        forward_work=forward_work, backward_work=backward_work,
        forward_flows=flows_of(
            [shape.forward.messages for shape in shapes], ranks, data_ranks, len(forward_work.calls)
        ),
        backward_flows=flows_of(
            [shape.backward.messages for shape in shapes], ranks, data_ranks, len(backward_work.calls)
        ),
    )
