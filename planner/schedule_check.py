"""Proof, in plain Python, that the schedules of a group's ranks compute every allowed (query, key) pair exactly once,
that every receive has its send, and that every partial gradient reaches its owner exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

from planner.errors import PlanError
from planner.layout import shard_spans
from planner.plan import AttentionGroup, Span
from planner.schedule import ExchangeSchedule, Round, Task

_Contribution = tuple[int, int]  # (rank, round) whose tasks added to a span's dK/dV


def check_schedules(
    group: AttentionGroup, lengths: SequenceOf[int], schedules: SequenceOf[ExchangeSchedule]
) -> None:
    """Raises PlanError naming the rank, round or sequence where the schedules (by group index) are not exact."""
    if len(schedules) != group.degree:
        raise PlanError(f"group of {group.degree} ranks has {len(schedules)} schedules")
    owned = _owned_spans(group, lengths, schedules)
    for walk in ("forward", "backward"):
        rounds = [getattr(schedule, walk) for schedule in schedules]
        _check_messages(group, rounds, walk)
        _check_holdings(group, rounds, owned, walk)
        if schedules[0].head_exchange is None:
            _check_coverage(group, lengths, [task for walked in rounds for r in walked for task in r.tasks], walk)
        else:  # every rank does all pairs, for its own heads
            for walked in rounds:
                _check_coverage(group, lengths, [task for r in walked for task in r.tasks], walk)
    _check_gradients(group, [schedule.backward for schedule in schedules], owned)


def _owned_spans(
    group: AttentionGroup, lengths: SequenceOf[int], schedules: SequenceOf[ExchangeSchedule]
) -> list[frozenset[Span]]:
    exchanges = {schedule.head_exchange for schedule in schedules}
    if len(exchanges) != 1:
        raise PlanError(f"ranks {group.ranks} disagree on the head exchange: {exchanges}")
    if exchanges == {None}:
        return [frozenset(spans) for spans in shard_spans(group, lengths)]
    if exchanges != {group.ranks}:
        raise PlanError(f"head exchange over {exchanges} is not over the group's ranks {group.ranks}")
    whole = frozenset(Span(index, 0, lengths[index]) for index in group.sequences)
    return [whole] * group.degree


def _check_messages(group: AttentionGroup, rounds: SequenceOf[SequenceOf[Round]], walk: str) -> None:
    for grad in (False, True):
        sent: Counter[tuple[object, ...]] = Counter()
        received: Counter[tuple[object, ...]] = Counter()
        for rank, walked in zip(group.ranks, rounds, strict=True):
            for number, step in enumerate(walked):
                for out in step.grad_sends if grad else step.sends:
                    sent[(number + grad, rank, out.rank, out.spans)] += 1
                for into in step.grad_receives if grad else step.receives:
                    received[(number, into.rank, rank, into.spans)] += 1
        if sent != received:
            odd = next(iter((sent - received) + (received - sent)))
            what = "gradient" if grad else "K/V"
            raise PlanError(f"{walk} round {odd[0]}: {what} message {odd[1]} -> {odd[2]} has only one end")


def _check_holdings(
    group: AttentionGroup, rounds: SequenceOf[SequenceOf[Round]], owned: list[frozenset[Span]], walk: str
) -> None:
    for index, (rank, walked) in enumerate(zip(group.ranks, rounds, strict=True)):
        previous: frozenset[Span] = frozenset()
        for number, step in enumerate(walked):
            held = frozenset(span for into in step.receives for span in into.spans)
            for out in step.sends:
                if not (set(out.spans) <= owned[index] or set(out.spans) <= previous):
                    raise PlanError(f"{walk} round {number}: rank {rank} sends spans it does not hold")
            for task in step.tasks:
                if task.query not in owned[index] or task.key not in owned[index] | held:
                    raise PlanError(f"{walk} round {number}: rank {rank} has a task on spans it does not hold: {task}")
                if task.causal != (task.query == task.key):
                    raise PlanError(f"{walk} round {number}: rank {rank}: causal flag is wrong in {task}")
            previous = held


def _check_coverage(group: AttentionGroup, lengths: SequenceOf[int], tasks: SequenceOf[Task], walk: str) -> None:
    by_sequence: dict[int, list[Task]] = {index: [] for index in group.sequences}
    for task in tasks:
        if task.query.sequence != task.key.sequence or task.query.sequence not in by_sequence:
            raise PlanError(f"{walk}: task crosses documents: {task}")
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
                raise PlanError(f"{walk}: sequence {index}, queries {start}..{stop}: pairs missing or computed twice")


def _check_gradients(
    group: AttentionGroup, rounds: SequenceOf[SequenceOf[Round]], owned: list[frozenset[Span]]
) -> None:
    totals: list[dict[Span, Counter[_Contribution]]] = [{span: Counter() for span in spans} for spans in owned]
    in_flight: dict[tuple[int, int, Span], Counter[_Contribution]] = {}
    for number in range(max(len(walked) for walked in rounds)):
        departing: dict[tuple[int, int, Span], Counter[_Contribution]] = {}
        for index, (rank, walked) in enumerate(zip(group.ranks, rounds, strict=True)):
            if number >= len(walked):
                continue
            step = walked[number]
            held = {span: Counter[_Contribution]() for into in step.receives for span in into.spans}
            for task in step.tasks:
                target = held if task.key in held else totals[index]
                target[task.key][(rank, number)] = 1
            for into in step.grad_receives:
                for span in into.spans:
                    (held if span in held else totals[index])[span].update(in_flight.pop((into.rank, rank, span)))
            for out in step.grad_sends:
                for span in out.spans:
                    departing[(rank, out.rank, span)] = held.pop(span)
            if any(held.values()):
                raise PlanError(f"backward round {number}: rank {rank} drops gradients of received spans")
        in_flight = departing
    if in_flight:
        raise PlanError("backward: gradients are still on their way after the last round")
    _check_totals(group, rounds, owned, totals)


def _check_totals(
    group: AttentionGroup,
    rounds: SequenceOf[SequenceOf[Round]],
    owned: list[frozenset[Span]],
    totals: list[dict[Span, Counter[_Contribution]]],
) -> None:
    exchanged = owned[0] is owned[-1] and len(owned) > 1  # after a head exchange each rank keeps its own heads
    for index, spans in enumerate(owned):
        for span in spans:
            wanted = Counter(
                {
                    (rank, number): 1
                    for rank, walked in zip(group.ranks, rounds, strict=True)
                    for number, step in enumerate(walked)
                    if any(task.key == span for task in step.tasks) and (not exchanged or rank == group.ranks[index])
                }
            )
            if totals[index][span] != wanted:
                raise PlanError(f"backward: rank {group.ranks[index]}: gradient of {span} is not the sum of its parts")
