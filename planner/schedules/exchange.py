"""What one attention group does on the wire and in the kernel, as data: one executor runs every schedule.

A schedule belongs to one rank. K and V move, queries stay; with a head exchange, heads are traded for tokens first, and
then a rank works on all tokens of its exchange group, for some of the heads. Rules, which ``schedule_check`` proves:

- In round i a rank *holds* its own spans and the spans it receives for round i, not longer. Of its own spans it may
  send parts, and parts of their gradients may come home by different ways.
- A message that arrives for round i with lead n is posted while round i - n runs. It holds spans that are the sender's
  own or that it holds in round i - n. A longer lead lets nobody use them longer: the message only starts earlier.
- Messages between two ranks that are posted together stand in the same order at both ends.
- The keys of a task are held in that round. Forward and backward walk different routes but do the same tasks.
- Backward only: after the tasks of round i, the partial dK/dV of every span received for round i that has any leaves
  through ``grad_sends`` and is added to what its receiver has for the same span in the round it arrives for. So each
  part of a gradient ends, once, at its owner: along the way its keys came, or directly.

Adding a kind of attention is adding one file, ``planner/schedules/kinds/<kind>.py``, that holds its ``SCHEDULE`` (an
``AttentionSchedule``), and its name to ``AttentionKind``, the names that stored plans and flags may use.
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
    """Spans that travel in one message, in this order. ``rank`` is the other end (data rank). ``lead``: how many
    rounds before the one it arrives for it is posted; for gradients, how many rounds after their tasks it arrives."""

    rank: int
    spans: tuple[Span, ...]
    lead: int = 1


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
    """One step of the walk. Gradients only move in the backward.

    ``receives`` and ``sends`` arrive for this round at this rank and at the peer; ``grad_receives`` arrive for this
    round; ``grad_sends`` leave after it.
    """

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """What forming a group depends on. ``num_heads``: query heads of one data rank. ``node_size``: consecutive data
    ranks of a node; a group larger than that starts with a node."""

    num_heads: int
    node_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSchedule:
    """Everything that one kind of attention is.

    ``write(group, lengths, group_index)``: the rank's schedule; ``lengths[i]`` is the tokens of the step's sequence i.
    ``inner_degree(degree, limits)``: the ``AttentionGroup.inner_degree`` of such a group, None where there can be none.
    ``head_degree(degree, inner_degree)``: consecutive members that trade heads; it decides who holds which tokens (see
    ``planner.schedules.layout``). ``price(setting, degree, inner_degree)``: its communication. ``in_auto``: whether a
    planner that may choose may choose it. ``any_degree``: else derived cost models price powers of two and all ranks
    only.
    """

    write: Callable[[AttentionGroup, SequenceOf[int], int], ExchangeSchedule]
    inner_degree: Callable[[int, GroupLimits], int | None]
    head_degree: Callable[[int, int], int]
    price: Callable[[WireSetting, int, int], WirePrice]
    in_auto: bool = True
    any_degree: bool = True


def schedule_of(kind: AttentionKind) -> AttentionSchedule:
    """The ``SCHEDULE`` of ``planner/schedules/kinds/<kind>.py``. Raises PlanError where there is no such file."""
    name = f"planner.schedules.kinds.{kind}"
    try:
        module = sys.modules.get(name) or importlib.import_module(name)  # every group asks, and importing takes time
        found = getattr(module, "SCHEDULE", None)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):  # a kind's own import that fails is not its absence
            raise
        found = None
    if not isinstance(found, AttentionSchedule):
        raise PlanError(f"unknown attention kind {kind!r}")
    return found


def attention_names() -> tuple[str, ...]:
    """What ``--attention`` takes: auto, then one kind each."""
    return ("auto", *(kind.value for kind in AttentionKind if kind is not AttentionKind.LOCAL))


def attention_kinds(name: str) -> tuple[AttentionKind, ...]:
    """The kinds for groups of two and more that ``--attention name`` allows. Raises SpecError for an unknown name."""
    if name not in attention_names():
        raise SpecError(f"--attention: {name!r} is none of {', '.join(attention_names())}")
    if name != "auto":
        return (AttentionKind(name),)
    return tuple(kind for kind in AttentionKind if kind is not AttentionKind.LOCAL and schedule_of(kind).in_auto)


def write_schedule(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    """The schedule of the rank at ``group_index``; ``lengths[i]`` is the tokens of the step's sequence i."""
    return schedule_of(group.kind).write(group, lengths, group_index)


def message(rank: int, spans: SequenceOf[Span], lead: int = 1) -> tuple[Transfer, ...]:
    """One transfer, or none where there is nothing to send."""
    return (Transfer(rank, tuple(spans), lead),) if spans else ()


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


def needed_spans(queries: SequenceOf[Span], keys: SequenceOf[Span]) -> tuple[Span, ...]:
    """Those of ``keys`` that some of the query spans read, in their order."""
    last = {query.sequence: 0 for query in queries}
    for query in queries:
        last[query.sequence] = max(last[query.sequence], query.start_token)
    own = set(queries)
    return tuple(key for key in keys if key in own or key.stop_token <= last.get(key.sequence, -1))
