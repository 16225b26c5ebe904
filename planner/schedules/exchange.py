"""What one attention group sends and computes, as data: a single executor runs every schedule.

A schedule belongs to one rank. K and V move, queries stay. With a head exchange, ranks first exchange heads for tokens;
then each rank works on all tokens of its team, for some of the heads. The rules, which ``planner.schedules.check``
verifies:

- In round i a rank *holds* its own spans and the spans it receives for round i, no longer. It may send parts of its own
  spans, and gradients of these parts may return by different routes.
- A message that arrives for round i with lead n is posted in round i - n. It contains spans that the sender owns or
  holds in round i - n. A longer lead only starts the message earlier; nobody holds the spans for longer.
- Two ranks list the messages that they post together in the same order.
- The keys of a task are held in its round. Forward and backward use different routes but do the same tasks.
- Backward only: after the tasks of round i, the partial dK/dV of every span received for round i (if there are any) are
  sent by ``grad_sends``; the receiver adds them to what it has for that span in the round they arrive for. So every
  part of a gradient reaches its owner exactly once, either along the route of its keys or directly.

To add a kind of attention, add one file ``planner/schedules/kinds/<kind>.py`` with its ``SCHEDULE`` (an
``AttentionSchedule``), and its name to ``AttentionKind``, which lists the names for stored plans and flags.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.errors import PlanError, SpecError
from planner.plan import AttentionGroup, AttentionKind, Span
from planner.schedules.wire_price import WirePrice, WireSetting


@dataclass(frozen=True, slots=True)
class Transfer:
    """Spans sent in one message, in this order. ``rank``: the other end (data rank). ``lead``: how many rounds before
    the round it arrives for it is posted; for gradients, how many rounds after their tasks they arrive."""

    rank: int
    spans: tuple[Span, ...]
    lead: int = 1


@dataclass(frozen=True, slots=True)
class Task:
    """Attention of one query span over one key span of the same sequence.

    ``causal``: only with ``query == key``, the triangle. Otherwise the key span lies completely before the query span.
    """

    query: Span
    key: Span
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of the walk. Gradients move only in the backward.

    ``receives``, ``sends``: messages that arrive for this round, at this rank or at the peer. ``grad_receives``:
    gradients that arrive for this round. ``grad_sends``: gradients that are sent after it.
    """

    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()
    tasks: tuple[Task, ...] = ()
    grad_receives: tuple[Transfer, ...] = ()
    grad_sends: tuple[Transfer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSchedule:
    """One rank's part. ``head_exchange``: the ranks that exchange heads for tokens before the first round, or None."""

    head_exchange: tuple[int, ...] | None
    forward: tuple[Round, ...]
    backward: tuple[Round, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """What decides whether and how a group can be formed. ``num_heads``: query heads of one data rank. ``node_size``:
    consecutive data ranks per node; a group larger than that starts at a node."""

    num_heads: int
    node_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSchedule:
    """Everything that defines one kind of attention.

    ``write(group, lengths, group_index)``: the rank's schedule; ``lengths[i]`` is the tokens of the step's sequence i.
    ``inner_degree(degree, limits)``: the ``AttentionGroup.inner_degree`` of a group; None if there can be no such
    group. ``head_degree(degree, inner_degree)``: number of consecutive members that exchange heads, which decides the
    token layout (see ``planner.schedules.layout``). ``price(setting, degree, inner_degree)``: cost of its
    communication. ``in_auto``: whether ``--attention auto`` includes it. ``any_degree``: whether derived cost models
    price every degree and not only powers of two and all ranks.
    """

    write: Callable[[AttentionGroup, SequenceOf[int], int], ExchangeSchedule]
    inner_degree: Callable[[int, GroupLimits], int | None]
    head_degree: Callable[[int, int], int]
    price: Callable[[WireSetting, int, int], WirePrice]
    in_auto: bool = True
    any_degree: bool = True


def schedule_of(kind: AttentionKind) -> AttentionSchedule:
    """The ``SCHEDULE`` of ``planner/schedules/kinds/<kind>.py``. Raises PlanError if there is no such file."""
    name = f"planner.schedules.kinds.{kind}"
    try:
        module = sys.modules.get(name) or importlib.import_module(name)  # called for every group, and imports are slow
        found = getattr(module, "SCHEDULE", None)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):  # the kind exists, but an import inside it failed
            raise
        found = None
    if not isinstance(found, AttentionSchedule):
        raise PlanError(f"unknown attention kind {kind!r}")
    return found


def attention_names() -> tuple[str, ...]:
    """The values of ``--attention``: auto, and one per kind."""
    return ("auto", *(kind.value for kind in AttentionKind if kind is not AttentionKind.LOCAL))


def attention_kinds(name: str) -> tuple[AttentionKind, ...]:
    """The kinds for groups of two or more ranks that ``--attention name`` allows. Raises SpecError if it is unknown."""
    if name not in attention_names():
        raise SpecError(f"--attention: {name!r} is none of {', '.join(attention_names())}")
    if name != "auto":
        return (AttentionKind(name),)
    return tuple(kind for kind in AttentionKind if kind is not AttentionKind.LOCAL and schedule_of(kind).in_auto)


def write_schedule(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    """The schedule of the rank at ``group_index``; ``lengths[i]`` is the tokens of the step's sequence i."""
    return schedule_of(group.kind).write(group, lengths, group_index)


def message(rank: int, spans: SequenceOf[Span], lead: int = 1) -> tuple[Transfer, ...]:
    """One transfer, or none if there are no spans to send."""
    return (Transfer(rank, tuple(spans), lead),) if spans else ()


def span_tasks(queries: SequenceOf[Span], keys: SequenceOf[Span]) -> tuple[Task, ...]:
    """All causal attention of these query spans over these key spans, within each document.

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


def needed_spans(queries: SequenceOf[Span], keys: SequenceOf[Span]) -> tuple[Span, ...]:
    """Those of ``keys`` that at least one of the query spans reads, in their order."""
    last = {query.sequence: 0 for query in queries}
    for query in queries:
        last[query.sequence] = max(last[query.sequence], query.start_token)
    own = set(queries)
    return tuple(key for key in keys if key in own or key.stop_token <= last.get(key.sequence, -1))
