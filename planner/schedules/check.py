"""Proves, in plain Python, that the schedules of a group's ranks compute every allowed (query, key) pair exactly once,
that every receive has its send, and that every partial gradient reaches its owner exactly once.

After a head exchange, ranks of a team work on the same tokens for different heads. So the group consists of *head
shares*: the ranks at the same index of every team, which hold the same heads. Each share is checked on its own; without
a head exchange there is one share with all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise

from planner.errors import PlanError
from planner.plan import AttentionGroup, Span
from planner.schedules.exchange import ExchangeSchedule, Round, Task
from planner.schedules.layout import head_degree, shard_spans, team_spans

_Contribution = tuple[int, int]  # (rank, round) whose tasks added to a span's dK/dV
_Parts = dict[Span, Counter[_Contribution]]


@dataclass(frozen=True, slots=True)
class _HeadShare:
    """Ranks with the same heads, the spans each of them has without messages, and its rounds of one walk (forward or
    backward)."""

    walk: str
    ranks: tuple[int, ...]
    owned: tuple[frozenset[Span], ...]
    rounds: tuple[tuple[Round, ...], ...]

    def held(self, index: int, number: int) -> frozenset[Span]:
        """The spans that the rank receives for this round."""
        walked = self.rounds[index]
        if not 0 <= number < len(walked):
            return frozenset()
        return frozenset(span for into in walked[number].receives for span in into.spans)


def check_schedules(
    group: AttentionGroup, lengths: SequenceOf[int], schedules: SequenceOf[ExchangeSchedule]
) -> None:
    """Raise PlanError naming the rank, round or sequence if the schedules (by group index) are not exact."""
    if len(schedules) != group.degree:
        raise PlanError(f"group of {group.degree} ranks has {len(schedules)} schedules")
    size = head_degree(group.kind, group.degree, group.inner_degree)
    owned = _owned_spans(group, lengths, schedules, size)
    for walk in ("forward", "backward"):
        for place in range(size):
            share = _HeadShare(
                walk=walk,
                ranks=group.ranks[place::size],
                owned=owned,
                rounds=tuple(getattr(schedule, walk) for schedule in schedules[place::size]),
            )
            _check_messages(share)
            _check_holdings(share)
            _check_coverage(share, {index: lengths[index] for index in group.sequences})
            if walk == "backward":
                _check_gradients(share)


def _owned_spans(
    group: AttentionGroup, lengths: SequenceOf[int], schedules: SequenceOf[ExchangeSchedule], size: int
) -> tuple[frozenset[Span], ...]:
    """The spans that each team's members work on. Checks that they exchange heads with each other, and that their rows
    in order are the team's rows."""
    shards, owned = shard_spans(group, lengths), []
    for team, spans in enumerate(team_spans(group, lengths)):
        members = range(team * size, (team + 1) * size)
        ranks = tuple(group.ranks[index] for index in members)
        for index in members:
            exchange = schedules[index].head_exchange or (group.ranks[index],)
            if exchange != ranks:
                raise PlanError(f"rank {group.ranks[index]} exchanges heads with {exchange}, its team is {ranks}")
        if _rows(span for index in members for span in shards[index]) != _rows(spans):
            raise PlanError(f"team {ranks} holds other rows than its members")
        owned.append(frozenset(spans))
    return tuple(owned)


def _rows(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """(sequence, token) where each contiguous range of rows begins and ends; adjacent ranges are merged."""
    edges: list[tuple[int, int]] = []
    for span in spans:
        if edges and edges[-1] == (span.sequence, span.start_token):
            edges.pop()
        else:
            edges.append((span.sequence, span.start_token))
        edges.append((span.sequence, span.stop_token))
    return edges


def _check_messages(share: _HeadShare) -> None:
    """Both ends of a message must agree on round, lead and spans, and on the order of messages with the same round and
    lead. Then both ends post the messages of a pair of ranks in the same order."""
    for grad in (False, True):
        what = "gradient" if grad else "K/V"
        sent: dict[tuple[int, int, int, int], list[tuple[Span, ...]]] = {}  # by arrival, source, target, lead
        received: dict[tuple[int, int, int, int], list[tuple[Span, ...]]] = {}
        for rank, walked in zip(share.ranks, share.rounds, strict=True):
            for number, step in enumerate(walked):
                for out in step.grad_sends if grad else step.sends:
                    arrival = number + out.lead if grad else number
                    sent.setdefault((arrival, rank, out.rank, out.lead), []).append(out.spans)
                for into in step.grad_receives if grad else step.receives:
                    received.setdefault((number, into.rank, rank, into.lead), []).append(into.spans)
        for key in {**sent, **received}:
            ends = sent.get(key, []), received.get(key, [])
            place = f"{share.walk} round {key[0]}: {what} message {key[1]} -> {key[2]}"
            if sorted(ends[0]) != sorted(ends[1]):
                raise PlanError(f"{place} has only one end")
            if ends[0] != ends[1]:
                raise PlanError(f"{place} stands in another order at its other end")
            if key[1] == key[2]:
                raise PlanError(f"{place} stays where it is")


def _check_holdings(share: _HeadShare) -> None:
    for index, (rank, walked) in enumerate(zip(share.ranks, share.rounds, strict=True)):
        owned = share.owned[index]
        for number, step in enumerate(walked):
            place = f"{share.walk} round {number}: rank {rank}"
            held = share.held(index, number)
            received = [span for into in step.receives for span in into.spans]
            if len(held) != len(received) or any(_is_part(span, owned) for span in held):
                raise PlanError(f"{place} receives spans that it has")
            for transfer in (*step.sends, *step.receives):
                if not (transfer.spans and 1 <= transfer.lead <= number):
                    raise PlanError(f"{place} has a message that is empty or posted before the first round: {transfer}")
            for out in step.sends:
                is_own = all(_is_part(span, owned) for span in out.spans)
                if not (is_own or set(out.spans) <= share.held(index, number - out.lead)):
                    raise PlanError(f"{place} sends spans it does not hold")
            for task in step.tasks:
                if task.query not in owned or task.key not in owned | held:
                    raise PlanError(f"{place} has a task on spans it does not hold: {task}")
                if task.causal != (task.query == task.key):
                    raise PlanError(f"{place}: causal flag is wrong in {task}")


def _check_coverage(share: _HeadShare, lengths: dict[int, int]) -> None:
    by_sequence: dict[int, list[Task]] = {index: [] for index in lengths}
    for task in (task for walked in share.rounds for step in walked for task in step.tasks):
        if task.query.sequence != task.key.sequence or task.query.sequence not in by_sequence:
            raise PlanError(f"{share.walk}: task crosses documents: {task}")
        by_sequence[task.query.sequence].append(task)
    for index, owed in by_sequence.items():
        edges = {edge for t in owed for edge in (t.query.start_token, t.query.stop_token)}
        borders = sorted({0, lengths[index]} | edges)
        for start, stop in zip(borders, borders[1:], strict=False):
            over = [t for t in owed if t.query.start_token <= start and stop <= t.query.stop_token]
            triangles = [t for t in over if t.causal]
            edge = 0
            for key in sorted(t.key for t in over if not t.causal):
                if key.start_token != edge:
                    break
                edge = key.stop_token
            complete = len(triangles) == 1 and edge == triangles[0].key.start_token
            if not complete or sum(t.key.num_tokens for t in over if not t.causal) != edge:
                raise PlanError(f"{share.walk}: sequence {index}, queries {start}..{stop}: pairs missing or twice")


def _is_part(span: Span, owned: frozenset[Span]) -> bool:
    """Whether the span is one of these or part of one."""
    if span in owned:
        return True
    return any(
        own.sequence == span.sequence and own.start_token <= span.start_token < span.stop_token <= own.stop_token
        for own in owned
    )


def _check_gradients(share: _HeadShare) -> None:
    """Follow every part of every span's gradient from the round that computes it to the rank where it ends up."""
    cuts = _cut_owned(share)
    totals: list[_Parts] = [{cut: Counter() for cut in own} for own in cuts]
    in_flight: dict[tuple[int, int, int, Span], Counter[_Contribution]] = {}
    for number in range(max(len(walked) for walked in share.rounds)):
        for index, (rank, walked) in enumerate(zip(share.ranks, share.rounds, strict=True)):
            if number >= len(walked):
                continue
            step, place = walked[number], f"backward round {number}: rank {rank}"
            held: _Parts = {span: Counter() for span in share.held(index, number)}
            for task in step.tasks:
                for part in [task.key] if task.key in held else _covered(task.key, cuts[index]):
                    (held if task.key in held else totals[index])[part][(rank, number)] += 1
            for into in step.grad_receives:
                for span in into.spans:
                    parts = in_flight.pop((number, into.rank, rank, span), None)
                    own = _covered(span, cuts[index])
                    if parts is None or (span not in held and not own):
                        raise PlanError(f"{place} receives a gradient of {span} that it has no place for")
                    for part in [span] if span in held else own:
                        (held if span in held else totals[index])[part].update(parts)
            for out in step.grad_sends:
                for span in out.spans:
                    if span not in held or out.lead < 1:
                        raise PlanError(f"{place} sends a gradient of {span}, which it does not hold")
                    in_flight[(number + out.lead, rank, out.rank, span)] = held.pop(span)
            if any(held.values()):
                raise PlanError(f"{place} drops gradients of received spans")
    if in_flight:
        raise PlanError("backward: gradients are still on their way after the last round")
    _check_totals(share, cuts, totals)


def _check_totals(share: _HeadShare, cuts: list[tuple[Span, ...]], totals: list[_Parts]) -> None:
    """Every cut must have received all gradients that tasks computed for it on any rank, each exactly once."""
    wanted: _Parts = {cut: Counter() for own in cuts for cut in own}
    everywhere = tuple(wanted)
    for rank, walked in zip(share.ranks, share.rounds, strict=True):
        for number, step in enumerate(walked):
            for task in step.tasks:
                for cut in _covered(task.key, everywhere):
                    wanted[cut][(rank, number)] += 1
    for rank, total in zip(share.ranks, totals, strict=True):
        for cut, parts in total.items():
            if parts != wanted[cut]:
                raise PlanError(f"backward: rank {rank}: gradient of {cut} is not the sum of its parts")


def _cut_owned(share: _HeadShare) -> list[tuple[Span, ...]]:
    """Each rank's own spans, cut wherever a task's key or a gradient begins or ends."""
    edges: dict[int, set[int]] = {}
    for step in (step for walked in share.rounds for step in walked):
        for span in (*(task.key for task in step.tasks), *(s for into in step.grad_receives for s in into.spans)):
            edges.setdefault(span.sequence, set()).update((span.start_token, span.stop_token))
    found = []
    for spans in share.owned:
        cuts: list[Span] = []
        for span in sorted(spans):
            inside = sorted(e for e in edges.get(span.sequence, ()) if span.start_token < e < span.stop_token)
            borders = [span.start_token, *inside, span.stop_token]
            cuts += [Span(span.sequence, start, stop) for start, stop in pairwise(borders)]
        found.append(tuple(cuts))
    return found


def _covered(span: Span, cuts: SequenceOf[Span]) -> list[Span]:
    """Those of ``cuts`` that make up the span; empty if they do not cover it."""
    inside = [
        cut for cut in cuts
        if cut.sequence == span.sequence and span.start_token <= cut.start_token and cut.stop_token <= span.stop_token
    ]
    return inside if sum(cut.num_tokens for cut in inside) == span.num_tokens else []
