"""What one attention group does on the wire and in the kernel, as data: one executor runs every schedule.

A schedule belongs to one rank. K and V move, queries stay (or, with a head exchange, heads are traded for tokens
first, and then every rank of the group holds all tokens of some heads). Rules, which ``schedule_check`` proves:

- In round i a rank *holds* its own spans and the spans it receives in round i, not longer.
- What it sends in round i arrives for the peer's round i, and is its own or was received in round i - 1.
- The keys of a task are held in that round. Forward and backward walk different routes but do the same tasks.
- Backward only: after the tasks of round i the partial dK/dV of every span received in round i leave through
  ``grad_sends``; they arrive in the peer's round i + 1 and are added to what that rank has for the same spans. So a
  chunk's gradient gathers along its way and ends, once, at its owner.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.layout import shard_spans
from planner.plan import AttentionGroup, AttentionKind, Span


@dataclass(frozen=True, slots=True)
class Transfer:
    """Spans that travel in one message, in this order. ``rank`` is the other end (data rank)."""

    rank: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Attention of one query span over one key span of the same sequence.

    ``causal`` only with ``query == key``: the triangle. Otherwise the key span lies wholly before the query span.
    """

    query: Span
    key: Span
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One step of the walk. Gradients only move in the backward."""

    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()
    tasks: tuple[Task, ...] = ()
    grad_receives: tuple[Transfer, ...] = ()
    grad_sends: tuple[Transfer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSchedule:
    """One rank's part. ``head_exchange``: the ranks that trade heads for tokens before the first round, or None."""

    head_exchange: tuple[int, ...] | None
    forward: tuple[Round, ...]
    backward: tuple[Round, ...]


def write_schedule(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    """The schedule of the rank at ``group_index``; ``lengths[i]`` is the tokens of the step's sequence i."""
    if group.kind is AttentionKind.RING:
        return _write_ring(group, lengths, group_index)
    whole = tuple(Span(index, 0, lengths[index]) for index in group.sequences)
    local = (Round(tasks=span_tasks(whole, whole)),)
    exchange = group.ranks if group.kind is AttentionKind.ULYSSES else None
    return ExchangeSchedule(head_exchange=exchange, forward=local, backward=local)


def span_tasks(queries: SequenceOf[Span], keys: SequenceOf[Span]) -> tuple[Task, ...]:
    """All the causal attention these query spans owe these key spans, document by document.

    Two spans of one sequence must be equal or disjoint (true of any partition of the tokens).
    """
    by_sequence: dict[int, list[Span]] = {}
    for key in keys:
        by_sequence.setdefault(key.sequence, []).append(key)
    tasks = []
    for query in queries:
        for key in by_sequence.get(query.sequence, ()):
            if key == query:
                tasks.append(Task(query, key, causal=True))
            elif key.stop_token <= query.start_token:
                tasks.append(Task(query, key, causal=False))
    return tuple(tasks)


def _write_ring(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    """Zigzag ring over any number of ranks.

    Forward, round i: the chunk of the rank i places behind arrives from the rank just behind. Backward: round 0 is
    the rank's own chunk (so the first message hides behind it); then chunks come the other way, from the rank just
    ahead, each carrying its dK/dV along, and reach their owner in the last round: degree - 1 hops each way, where a
    ring that keeps its direction needs degree hops for the gradients.
    """
    degree, ranks = group.degree, group.ranks
    shards = shard_spans(group, lengths)
    mine = shards[group_index]
    behind, ahead = ranks[group_index - 1], ranks[(group_index + 1) % degree]

    def shard(offset: int) -> tuple[Span, ...]:
        return shards[(group_index + offset) % degree]

    def message(rank: int, spans: tuple[Span, ...]) -> tuple[Transfer, ...]:
        return (Transfer(rank, spans),) if spans else ()

    own = Round(tasks=span_tasks(mine, mine))
    forward = [own]
    backward = [own]
    for step in range(1, degree):
        forward.append(
            Round(
                receives=message(behind, shard(-step)),
                sends=message(ahead, shard(1 - step)),
                tasks=span_tasks(mine, shard(-step)),
            )
        )
        backward.append(
            Round(
                receives=message(ahead, shard(step)),
                sends=message(behind, shard(step - 1)),
                tasks=span_tasks(mine, shard(step)),
                grad_receives=message(ahead, shard(step)) if step > 1 else (),
                grad_sends=message(behind, shard(step)),
            )
        )
    if degree > 1:
        backward.append(Round(grad_receives=message(ahead, mine)))
    return ExchangeSchedule(head_exchange=None, forward=tuple(forward), backward=tuple(backward))
