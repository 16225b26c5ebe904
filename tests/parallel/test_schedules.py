"""Schedules are proven exact, broken ones are refused, and the engine overlaps messages with compute."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.program import compile_rank_program
from parallel.rounds import RoundWalker, bind_rounds
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, Span
from planner.schedule import ExchangeSchedule, Task, write_schedule
from planner.schedule_check import check_schedules
from tests.plans import verified_plan

CPU = torch.device("cpu")


def schedules_of(group, lengths):
    return [write_schedule(group, lengths, index) for index in range(group.degree)]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 400), min_size=1, max_size=6), st.sampled_from(list(AttentionKind)))
def test_every_written_schedule_is_exact(degree, lengths, kind):
    degree = 1 if kind is AttentionKind.LOCAL else degree
    group = AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=tuple(range(len(lengths))))
    check_schedules(group, lengths, schedules_of(group, lengths))


def broken(schedule: ExchangeSchedule, rng: random.Random) -> ExchangeSchedule | None:
    """The schedule with one thing of one round changed; None where there is nothing to change there."""
    walk = rng.choice(["forward", "backward"])
    rounds = list(getattr(schedule, walk))
    number = rng.randrange(len(rounds))
    field = rng.choice(["receives", "sends", "tasks", "grad_receives", "grad_sends"])
    items = list(getattr(rounds[number], field))
    if not items:
        return None
    place = rng.randrange(len(items))
    how = rng.choice(["drop", "double", "change"])
    if how == "drop":
        del items[place]
    elif how == "double":
        items.append(items[place])
    elif isinstance(items[place], Task):
        task = items[place]
        shifted = Span(task.key.sequence, task.key.start_token, task.key.stop_token + 1)
        items[place] = rng.choice(
            [dataclasses.replace(task, causal=not task.causal), dataclasses.replace(task, key=shifted)]
        )
    else:
        transfer = items[place]
        items[place] = dataclasses.replace(transfer, rank=transfer.rank + 1)
    rounds[number] = dataclasses.replace(rounds[number], **{field: tuple(items)})
    return dataclasses.replace(schedule, **{walk: tuple(rounds)})


def test_all_of_500_broken_schedules_are_refused():
    rng = random.Random(5)
    num_refused = 0
    while num_refused < 500:
        degree = rng.randint(2, 5)
        kind = rng.choice([AttentionKind.RING, AttentionKind.ULYSSES])
        lengths = [rng.randint(2 * degree, 90) for _ in range(rng.randint(1, 3))]
        group = AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=tuple(range(len(lengths))))
        schedules = schedules_of(group, lengths)
        victim = rng.randrange(degree)
        changed = broken(schedules[victim], rng)
        if changed is None:
            continue
        schedules[victim] = changed
        with pytest.raises(PlanError):
            check_schedules(group, lengths, schedules)
        num_refused += 1


class Recorder:
    """A wire and a kernel that only write down what the engine asks of them, in order."""

    name = "recorder"

    def __init__(self):
        self.events = []

    def post(self, sends, receives, what):
        self.events.append("post")
        return self

    def wait(self):
        self.events.append("wait")

    def forward(self, q, k, v, pairs, scale):
        self.events.append("kernel")
        rows = sum(stop - start for start, stop in pairs.query_rows)
        return torch.zeros(rows, *q.shape[1:]), torch.zeros(rows, q.shape[1])

    def backward(self, dout, q, k, v, out, lse, pairs, scale):
        self.events.append("kernel")
        return torch.zeros_like(q[pairs.query_index]), *(torch.zeros_like(k[pairs.key_index]) for _ in range(2))


@pytest.mark.parametrize("walk", ["forward", "backward"])
def test_next_rounds_messages_are_posted_before_this_rounds_kernels(walk):
    group = AttentionGroup(kind=AttentionKind.RING, ranks=(0, 1, 2, 3), sequences=(0,))
    (microbatch,) = compile_rank_program(verified_plan([[group]], [64], 4), 1).microbatches
    (program,) = microbatch.groups
    recorder = Recorder()
    walker = RoundWalker(
        program, bind_rounds(program.forward, CPU), bind_rounds(program.backward, CPU), recorder, recorder, 1.0
    )
    q, k = torch.zeros(16, 2, 4), torch.zeros(16, 1, 4)
    if walk == "forward":
        walker.forward(q, k, k)
    else:
        walker.backward(q, q, k, k, q, torch.zeros(16, 2))
    rounds = " ".join(recorder.events).replace("kernel kernel", "kernel").split("wait")
    for events in rounds[:3]:  # three messages to hide, each behind the kernels of the round before
        assert events.split() == ["post", "kernel"], recorder.events


def test_rows_of_all_ranks_are_the_sequences_exactly_once():
    lengths = [33, 5, 71, 1]
    groups = [
        AttentionGroup(kind=AttentionKind.RING, ranks=(2, 0, 1), sequences=(0, 3)),
        AttentionGroup(kind=AttentionKind.ULYSSES, ranks=(3, 4), sequences=(2, 1)),
    ]
    plan = verified_plan([groups], lengths, 6)
    seen = [
        (span.sequence, token)
        for rank in range(6)
        for microbatch in compile_rank_program(plan, rank).microbatches
        for span in microbatch.spans
        for token in range(span.start_token, span.stop_token)
    ]
    assert sorted(seen) == [(index, token) for index, size in enumerate(lengths) for token in range(size)]
    assert compile_rank_program(plan, 5).microbatches == ()
    with pytest.raises(PlanError, match="rank 6"):
        compile_rank_program(plan, 6)
