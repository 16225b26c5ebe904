"""Compiles a StepPlan into what one rank does, as row numbers: pure integers, no tensors, no communication.

Rows are indices into the rank's local tensors. In attention, a microbatch's rows are those of its groups in order;
outside attention some rows may be on other ranks (``planner.schedules.linear_layout``). Within a group rows follow
``layout.shard_spans``; after a head exchange, ``layout.team_spans``. Held rows (received K/V) count from 0 in every
round.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from planner.errors import PlanError
from planner.plan import (
    AttentionGroup,
    AttentionKind,
    MemoryPolicy,
    Microbatch,
    Sharding,
    Span,
    StepPlan,
    plan_digest,
)
from planner.pricing.lockstep import lockstep_rounds
from planner.pricing.pipeline_order import StageWork, pipeline_order, rank_actions
from planner.schedules.exchange import Round, Task, Transfer, write_schedule
from planner.schedules.layout import local_token_counts, shard_spans, team_spans
from planner.schedules.linear_layout import RankMoves, linear_spans, rank_moves

Rows = tuple[int, int]
"""Half-open row range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRows:
    """Row ranges of one message, in order, adjacent ones merged. ``held``: rows of received K/V, else own rows."""

    rank: int
    rows: tuple[Rows, ...]
    num_rows: int
    held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """One varlen attention call over pairs of query and key rows. ``held``: keys are this round's received K/V."""

    causal: bool
    held: bool
    query_rows: tuple[Rows, ...]
    key_rows: tuple[Rows, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """Messages that are posted together in round i and must have arrived when round ``wait_after`` ends.

    ``sends``: K/V of own rows or of rows held in round i. ``receives``: K/V that will be held in round
    ``wait_after + 1``. ``grad_sends``: dK/dV of rows held in round i - 1. ``grad_receives``: dK/dV to add to those of
    own rows or of rows held in round ``wait_after``.
    """

    wait_after: int
    sends: tuple[PeerRows, ...]
    receives: tuple[PeerRows, ...]
    grad_sends: tuple[PeerRows, ...]
    grad_receives: tuple[PeerRows, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRound:
    """``planner.schedules.exchange.Round`` in row numbers, with each message in the round that posts it. ``num_held``:
    rows of K/V received for this round. ``departures`` are sorted by ``wait_after``, the same order on all ranks."""

    num_held: int
    departures: tuple[Departure, ...]
    calls: tuple[KernelCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTeam:
    """The ranks that exchange heads for tokens, this rank's index among them, and each member's number of rows."""

    ranks: tuple[int, ...]
    place: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupProgram:
    """One rank's part in one attention group. ``rows``: the group's rows within the microbatch. ``sequences``: the
    group's whole documents in packing order. With a ``team`` the rounds work on the rows of all its members, in the
    order of the members."""

    kind: AttentionKind
    ranks: tuple[int, ...]
    group_index: int
    sequences: tuple[Span, ...]
    rows: Rows
    team: HeadTeam | None
    forward: tuple[RankRound, ...]
    backward: tuple[RankRound, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicrobatch:
    """One microbatch of this rank. ``index``: its position in the plan's global order. ``spans``, ``num_rows``: what
    this rank holds outside attention (``planner.schedules.linear_layout``). ``moves``: how these rows become the rows
    of the groups; None where they are the same rows."""

    index: int
    spans: tuple[Span, ...]
    groups: tuple[GroupProgram, ...]
    num_rows: int
    memory: MemoryPolicy
    moves: RankMoves | None = None


@dataclass(frozen=True, slots=True)
class RankAction:
    """One forward or backward. ``place``: index into the program's microbatches; None: an empty microbatch, which keeps
    this rank in lockstep with the others.

    ``slots``: only with ``zero3``. All groups of the round are ordered into slots so that no rank is in two groups of
    one slot; each entry is this microbatch's group that runs in that slot on this rank, or None. Chunks need them to
    stay in lockstep. ``in_chunks``: at least one microbatch of the round runs in chunks."""

    place: int | None
    backward: bool
    slots: tuple[int | None, ...] = ()
    in_chunks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProgram:
    """Everything this rank runs in one step, in order. Empty where the plan gives the rank nothing to do.

    ``actions``: the order of forwards and backwards of ``microbatches``. Without pipeline stages each forward is
    followed directly by its backward.
    """

    step: int
    digest: str
    rank: int
    microbatches: tuple[RankMicrobatch, ...]
    actions: tuple[RankAction, ...]


def compile_rank_program(plan: StepPlan, rank: int, *, stage: int = 0, num_stages: int = 1) -> RankProgram:
    """What data rank ``rank`` does in this plan at pipeline stage ``stage``. Raises PlanError if there is no such rank,
    or if the plan was made for another number of stages than ``num_stages``."""
    if not 0 <= rank < plan.num_ranks:
        raise PlanError(f"step {plan.step}: rank {rank} is not in a plan of {plan.num_ranks} ranks")
    if plan.num_stages != num_stages:
        raise PlanError(f"step {plan.step}: plan is for {plan.num_stages} pipeline stages, there are {num_stages}")
    lengths = [sequence.num_tokens for sequence in plan.sequences]
    mine = [
        _compile_microbatch(index, microbatch, lengths, rank)
        for index, microbatch in enumerate(plan.microbatches)
        if rank in microbatch.ranks
    ]
    return RankProgram(
        step=plan.step, digest=plan_digest(plan), rank=rank, microbatches=tuple(mine),
        actions=_compile_actions(plan, rank, stage, num_stages),
    )


def _compile_actions(plan: StepPlan, rank: int, stage: int, num_stages: int) -> tuple[RankAction, ...]:
    work = [StageWork(ranks=batch.ranks, seconds=batch.predicted_s) for batch in plan.microbatches]
    places = {index: place for place, index in enumerate(i for i, item in enumerate(work) if rank in item.ranks)}
    if plan.sharding is Sharding.ZERO3:
        if num_stages > 1:
            raise PlanError(f"step {plan.step}: sharding {plan.sharding} cannot run in pipeline stages")
        rounds = lockstep_rounds(item.ranks for item in work) or ((),)
        _refuse_mixed(plan, rounds)
        return tuple(
            RankAction(place, backward, slots, any(plan.microbatches[index].memory.chunk_tokens for index in members))
            for members in rounds
            for place in (next((places[index] for index in members if index in places), None),)
            for slots in (_group_slots(plan, members, rank),)
            for backward in (False, True)
        )
    if num_stages == 1:
        return tuple(RankAction(place, backward) for place in places.values() for backward in (False, True))
    order = rank_actions(pipeline_order(work, num_stages=num_stages), work, rank=rank, stage=stage)
    return tuple(RankAction(places[action.microbatch], action.backward) for action in order)


def _refuse_mixed(plan: StepPlan, rounds: tuple[tuple[int, ...], ...]) -> None:
    """Refuse a lockstep round that mixes chunks with swap or recompute: it runs group by group, and so must keep the
    activations of every group in flight."""
    for members in rounds:
        policies = [plan.microbatches[index].memory for index in members]
        if any(policy.chunk_tokens for policy in policies) and any(policy.keep_fraction < 1 for policy in policies):
            raise PlanError(f"step {plan.step}: one round of zero3 mixes chunks with swapped or recomputed activations")


def _group_slots(plan: StepPlan, members: tuple[int, ...], rank: int) -> tuple[int | None, ...]:
    groups = [group for index in members for group in plan.microbatches[index].groups]
    numbers = {place: number for number, place in enumerate(p for p, group in enumerate(groups) if rank in group.ranks)}
    slots = lockstep_rounds(group.ranks for group in groups)
    return tuple(next((numbers[place] for place in slot if place in numbers), None) for slot in slots)


def _compile_microbatch(index: int, microbatch: Microbatch, lengths: list[int], rank: int) -> RankMicrobatch:
    if microbatch.memory.chunk_tokens and microbatch.memory.keep_fraction < 1:
        raise PlanError(f"microbatch {index}: chunks with swapped or recomputed activations cannot be run")
    spans: list[Span] = []
    groups: list[GroupProgram] = []
    first_row = 0
    for group in microbatch.groups:
        if rank not in group.ranks:
            continue
        own = shard_spans(group, lengths)[group.ranks.index(rank)]
        groups.append(_compile_group(group, lengths, rank, own, first_row))
        spans.extend(own)
        first_row = groups[-1].rows[1]
    if not microbatch.moves:
        return RankMicrobatch(
            index=index, spans=tuple(spans), groups=tuple(groups), num_rows=first_row, memory=microbatch.memory
        )
    if not microbatch.memory.is_keep:
        raise PlanError(f"microbatch {index}: remapped tokens with memory policy {microbatch.memory} cannot be run yet")
    moves = rank_moves(microbatch.moves, rank, first_row)
    return RankMicrobatch(
        index=index, spans=linear_spans(microbatch, lengths, rank), groups=tuple(groups), memory=microbatch.memory,
        num_rows=moves.num_linear_rows, moves=moves if moves.lent or moves.guests else None,
    )


def _compile_group(
    group: AttentionGroup, lengths: list[int], rank: int, own: tuple[Span, ...], first_row: int
) -> GroupProgram:
    group_index = group.ranks.index(rank)
    sizes = [lengths[index] for index in group.sequences]
    counts = local_token_counts(group.kind, group.degree, sizes, group.inner_degree)
    schedule = write_schedule(group, lengths, group_index)
    whole = tuple(Span(index, 0, lengths[index]) for index in group.sequences)
    team, resident = None, own
    if schedule.head_exchange is not None:
        members = schedule.head_exchange
        rows = tuple(counts[group.ranks.index(member)] for member in members)
        team = HeadTeam(ranks=members, place=members.index(rank), rows=rows)
        resident = team_spans(group, lengths)[group_index // len(members)]
    return GroupProgram(
        kind=group.kind,
        ranks=group.ranks,
        group_index=group_index,
        sequences=whole,
        rows=(first_row, first_row + counts[group_index]),
        team=team,
        forward=_compile_rounds(schedule.forward, _row_map(resident)),
        backward=_compile_rounds(schedule.backward, _row_map(resident)),
    )


def _rows_of(span: Span, rows: dict[Span, Rows]) -> Rows | None:
    """Row range of ``span``, which is one of these spans or part of one; None if it is neither."""
    found = rows.get(span)
    if found is not None:
        return found
    for whole, (first, _) in rows.items():
        if whole.sequence == span.sequence and whole.start_token <= span.start_token < whole.stop_token:
            start = first + span.start_token - whole.start_token
            return (start, start + span.num_tokens) if span.stop_token <= whole.stop_token else None
    return None


def _row_map(spans: Iterable[Span]) -> dict[Span, Rows]:
    rows, start = {}, 0
    for span in spans:
        rows[span] = (start, start + span.num_tokens)
        start += span.num_tokens
    return rows


def _compile_rounds(rounds: tuple[Round, ...], own: dict[Span, Rows]) -> tuple[RankRound, ...]:
    held = [_row_map(span for transfer in step.receives for span in transfer.spans) for step in rounds]
    messages: list[dict[int, _Messages]] = [{} for _ in rounds]
    for number, step in enumerate(rounds):
        for transfer in step.receives:
            found = _messages(messages[number - transfer.lead], number - 1)
            found.receives.append(_peer_rows(transfer, held[number], held=True))
        for transfer in step.sends:
            found = _messages(messages[number - transfer.lead], number - 1)
            found.sends.append(_source_rows(transfer, own, held[number - transfer.lead]))
        for transfer in step.grad_sends:
            found = _messages(messages[number + 1], number + transfer.lead)
            found.grad_sends.append(_source_rows(transfer, own, held[number]))
        for transfer in step.grad_receives:
            found = _messages(messages[number + 1 - transfer.lead], number)
            found.grad_receives.append(_source_rows(transfer, own, held[number]))
    return tuple(
        RankRound(
            num_held=sum(stop - start for start, stop in held[number].values()),
            departures=tuple(found.departure(wait_after) for wait_after, found in sorted(messages[number].items())),
            calls=_kernel_calls(step.tasks, own, held[number]),
        )
        for number, step in enumerate(rounds)
    )


@dataclass(frozen=True, slots=True)
class _Messages:
    """A departure under construction."""

    sends: list[PeerRows] = field(default_factory=list)
    receives: list[PeerRows] = field(default_factory=list)
    grad_sends: list[PeerRows] = field(default_factory=list)
    grad_receives: list[PeerRows] = field(default_factory=list)

    def departure(self, wait_after: int) -> Departure:
        return Departure(
            wait_after=wait_after, sends=tuple(self.sends), receives=tuple(self.receives),
            grad_sends=tuple(self.grad_sends), grad_receives=tuple(self.grad_receives),
        )


def _messages(posted: dict[int, _Messages], wait_after: int) -> _Messages:
    return posted.setdefault(wait_after, _Messages())


def _source_rows(transfer: Transfer, own: dict[Span, Rows], held: dict[Span, Rows]) -> PeerRows:
    """Look among held rows first: gradients of part of a held block are not in its keys but are not own rows either."""
    from_own = transfer.spans[0] not in held
    return _peer_rows(transfer, own if from_own else held, held=not from_own)


def _peer_rows(transfer: Transfer, rows: dict[Span, Rows], *, held: bool) -> PeerRows:
    found = [_rows_of(span, rows) for span in transfer.spans]
    if None in found:
        raise PlanError(f"message with rank {transfer.rank} names spans that this rank does not have: {transfer.spans}")
    merged = _merge(rows for rows in found if rows is not None)
    return PeerRows(rank=transfer.rank, rows=merged, num_rows=sum(b - a for a, b in merged), held=held)


def _merge(rows: Iterable[Rows]) -> tuple[Rows, ...]:
    merged: list[Rows] = []
    for start, stop in rows:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _kernel_calls(tasks: SequenceOf[Task], own: dict[Span, Rows], held: dict[Span, Rows]) -> tuple[KernelCall, ...]:
    """At most one causal and two full calls. No query row appears twice within a call, so its results need no merge.

    Own queries over own keys become as few causal calls as possible. Of the remaining tasks, those of one query over
    adjacent keys become one pair; then adjacent queries over the same keys become one pair.
    """
    own_keys = _keys_by_query((own[task.query], own[task.key]) for task in tasks if not task.causal and task.key in own)
    triangles = _triangles(sorted(own[task.query] for task in tasks if task.causal), own_keys)
    held_keys = _keys_by_query(
        (own[task.query], held[task.key]) for task in tasks if not task.causal and task.key in held
    )
    calls = [_call([(rows, rows) for rows in triangles], causal=True, held=False)] if triangles else []
    for from_held, keys in ((False, own_keys), (True, held_keys)):
        calls.extend(_call(layer, causal=False, held=from_held) for layer in _layers(_coalesce(keys)))
    return tuple(calls)


def _keys_by_query(pairs: Iterable[tuple[Rows, Rows]]) -> dict[Rows, tuple[Rows, ...]]:
    found: dict[Rows, list[Rows]] = {}
    for query, key in pairs:
        found.setdefault(query, []).append(key)
    return {query: _merge(sorted(keys)) for query, keys in found.items()}


def _triangles(queries: list[Rows], own_keys: dict[Rows, tuple[Rows, ...]]) -> list[Rows]:
    """Causal row ranges for these queries. Rows that directly follow others and see all of them join them in one larger
    triangle, as a document's two zigzag chunks always do; such pairs are removed from ``own_keys``."""
    triangles: list[Rows] = []
    for start, stop in queries:
        if triangles and own_keys.get((start, stop)) == ((triangles[-1][0], start),):
            del own_keys[start, stop]
            triangles[-1] = (triangles[-1][0], stop)
        else:
            triangles.append((start, stop))
    return triangles


def _call(pairs: list[tuple[Rows, Rows]], *, causal: bool, held: bool) -> KernelCall:
    queries, keys = zip(*pairs, strict=True)
    return KernelCall(causal=causal, held=held, query_rows=queries, key_rows=keys)


def _coalesce(keys: dict[Rows, tuple[Rows, ...]]) -> list[tuple[Rows, Rows]]:
    merged: list[tuple[Rows, Rows]] = []
    for query, key in ((query, key) for query, runs in keys.items() for key in runs):
        if merged and merged[-1][1] == key and merged[-1][0][1] == query[0]:
            merged[-1] = ((merged[-1][0][0], query[1]), key)
        else:
            merged.append((query, key))
    return merged


def _layers(pairs: list[tuple[Rows, Rows]]) -> list[list[tuple[Rows, Rows]]]:
    """Split into lists in which no two pairs share query rows (every current schedule needs just one list)."""
    layers: list[list[tuple[Rows, Rows]]] = []
    for query, key in sorted(pairs):
        for layer in layers:
            if layer[-1][0][1] <= query[0]:
                layer.append((query, key))
                break
        else:
            layers.append([(query, key)])
    return layers
