"""Schedules are proven exact, broken ones are refused, and the engine overlaps messages with compute."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.engine import AttentionEngine
from parallel.program import compile_rank_program
from parallel.rounds import RoundWalker, bind_rounds
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, Span
from planner.schedules.check import check_schedules
from planner.schedules.exchange import ExchangeSchedule, GroupLimits, Task, schedule_of, write_schedule
from tests.plans import KINDS, inner_degree, verified_plan

CPU = torch.device("cpu")


def schedules_of(group, lengths):
    return [write_schedule(group, lengths, index) for index in range(group.degree)]


def group_of(kind, degree, lengths, node_size=None, ranks=None):
    return AttentionGroup(
        kind=kind, ranks=ranks or tuple(range(degree)), sequences=tuple(range(len(lengths))),
        inner_degree=inner_degree(kind, degree, node_size),
    )


lengths_lists = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 400)), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", AttentionKind)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), lengths_lists, st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_written_schedule_is_exact(kind, degree, lengths, node_size, rng):
    degree = 1 if kind is AttentionKind.LOCAL else degree
    group = group_of(kind, degree, lengths, node_size, ranks=tuple(rng.sample(range(12), degree)))
    check_schedules(group, lengths, schedules_of(group, lengths))


@pytest.mark.parametrize("kind", [AttentionKind.USP, AttentionKind.DOUBLE_RING, AttentionKind.ROUTED_RING])
@pytest.mark.parametrize("degree", [1, 2, 6, 8, 9, 12])
def test_every_inner_degree_is_exact(kind, degree):
    lengths = [200, 7, 31]
    for inner in range(1, degree + 1):
        if degree % inner == 0:
            group = dataclasses.replace(group_of(kind, degree, lengths), inner_degree=inner)
            check_schedules(group, lengths, schedules_of(group, lengths))


def sent_tokens(schedules, walk="forward", messages="sends"):
    """Tokens that each rank sends in one walk (forward or backward)."""
    return [
        sum(span.num_tokens for step in getattr(each, walk) for out in getattr(step, messages) for span in out.spans)
        for each in schedules
    ]


@given(st.integers(2, 9), lengths_lists)
@settings(max_examples=60, deadline=None)
def test_group_cast_sends_three_quarters_of_what_a_ring_sends(degree, lengths):
    ring, cast = (
        schedules_of(group_of(kind, degree, lengths), lengths)
        for kind in (AttentionKind.RING, AttentionKind.GROUP_CAST)
    )
    per_chunk = sum(lengths) / (2 * degree)
    uneven = len(lengths) * degree * degree  # chunks differ by at most one token
    wanted = 3 / 2 * degree * (degree - 1) * per_chunk
    assert sum(sent_tokens(ring)) == sum(lengths) * (degree - 1)
    for schedules, walk, messages in (
        (cast, "forward", "sends"), (cast, "backward", "sends"), (cast, "backward", "grad_sends")
    ):
        assert sum(sent_tokens(schedules, walk, messages)) <= min(wanted + uneven, sum(sent_tokens(ring)))
    for schedule in cast:  # one message out and one in at a time, everything from its owner
        assert all(len(step.sends) <= 1 and len(step.receives) <= 1 for step in schedule.forward)


def test_group_cast_sends_exactly_three_quarters_where_chunks_are_equal():
    for degree in range(2, 10):
        lengths = [2 * degree * 30, 2 * degree]
        ring, cast = (
            sum(sent_tokens(schedules_of(group_of(kind, degree, lengths), lengths)))
            for kind in (AttentionKind.RING, AttentionKind.GROUP_CAST)
        )
        assert 4 * cast == 3 * ring


def test_a_double_ring_crosses_each_boundary_once_for_each_block():
    degree, size, lengths = 12, 4, [960]
    group = group_of(AttentionKind.DOUBLE_RING, degree, lengths, node_size=size)
    assert group.inner_degree == size
    for walk, messages in (("forward", "sends"), ("backward", "sends"), ("backward", "grad_sends")):
        for index, schedule in enumerate(schedules_of(group, lengths)):
            crossing = [
                out for step in getattr(schedule, walk) for out in getattr(step, messages)
                if out.rank // size != index // size
            ]
            assert sum(span.num_tokens for out in crossing for span in out.spans) == 2 * 960 / degree  # of 8 remote
            assert all(out.lead == size for out in crossing if messages == "sends")


def boundary_tokens(group, schedules, walk, messages):
    """Tokens that go from node to node in one walk: by sender, by receiver, and by (sender, round)."""
    size, sent, received, by_round = group.inner_degree, Counter(), Counter(), Counter()
    for index, schedule in enumerate(schedules):
        for number, step in enumerate(getattr(schedule, walk)):
            for out in getattr(step, messages):
                other = group.ranks.index(out.rank)
                if other // size != index // size:
                    tokens = sum(span.num_tokens for span in out.spans)
                    sent[index] += tokens
                    received[other] += tokens
                    by_round[index, number] += tokens
    return sent, received, by_round


@pytest.mark.parametrize(("degree", "size"), [(8, 4), (12, 4), (24, 8)])
def test_a_routed_ring_loads_all_nics_of_a_node_alike(degree, size):
    block = 2 * size * 5
    lengths = [degree * block]
    group = group_of(AttentionKind.ROUTED_RING, degree, lengths, node_size=size)
    assert group.inner_degree == size
    schedules = schedules_of(group, lengths)
    for walk, messages in (("forward", "sends"), ("backward", "sends"), ("backward", "grad_sends")):
        sent, received, by_round = boundary_tokens(group, schedules, walk, messages)
        for loads in (sent, received):
            # a ring sends degree - 1 blocks from one rank; the owner of a block takes a piece of it from its own rows
            assert max(loads.values()) <= (degree - 1) * block // size
            assert min(loads.values()) >= (degree - 3) * block // size and len(loads) == degree
        assert max(by_round.values()) <= 2 * block // size  # a piece a round, two where a proxy's lead is 2
    plain = schedules_of(dataclasses.replace(group, kind=AttentionKind.RING, inner_degree=1), lengths)
    sent, _, _ = boundary_tokens(group, plain, "forward", "sends")
    assert set(sent.values()) == {(degree - 1) * block} and len(sent) == degree // size


def test_a_routed_ring_is_a_plain_ring_where_there_is_nothing_to_route():
    lengths = [200, 31]
    for inner in (1, 6):
        group = dataclasses.replace(group_of(AttentionKind.ROUTED_RING, 6, lengths), inner_degree=inner)
        assert schedules_of(group, lengths) == schedules_of(group_of(AttentionKind.RING, 6, lengths), lengths)


def test_messages_of_a_pair_must_stand_in_the_same_order_at_both_ends():
    """A node's last member dispatches one block to the first one and combines another there, in the same round."""
    lengths = [960]
    group = group_of(AttentionKind.ROUTED_RING, 12, lengths, node_size=4)
    schedules = schedules_of(group, lengths)
    index, number = next(
        (index, number) for index, schedule in enumerate(schedules) for number, step in enumerate(schedule.forward)
        if len({(out.rank, out.lead) for out in step.sends}) < len(step.sends)
    )
    rounds = list(schedules[index].forward)
    rounds[number] = dataclasses.replace(rounds[number], sends=rounds[number].sends[::-1])
    schedules[index] = dataclasses.replace(schedules[index], forward=tuple(rounds))
    with pytest.raises(PlanError, match="stands in another order at its other end"):
        check_schedules(group, lengths, schedules)


def test_all_gather_is_one_round():
    lengths = [300, 41]
    for schedule in schedules_of(group_of(AttentionKind.ALL_GATHER, 5, lengths), lengths):
        assert [len(step.receives) for step in schedule.forward] == [0, 4]
        assert [len(step.receives) for step in schedule.backward] == [0, 4, 0]


@pytest.mark.parametrize(
    ("kind", "degree", "node_size", "num_heads", "wanted"),
    [
        (AttentionKind.ULYSSES, 8, 8, 4, None), (AttentionKind.ULYSSES, 4, 8, 4, 1), (AttentionKind.USP, 16, 8, 32, 8),
        (AttentionKind.USP, 16, 8, 6, 4), (AttentionKind.USP, 12, 8, 32, 4), (AttentionKind.USP, 4, 8, 4, 2),
        (AttentionKind.USP, 13, 8, 32, 1), (AttentionKind.DOUBLE_RING, 24, 8, 1, 8),
        (AttentionKind.ROUTED_RING, 24, 8, 1, 8), (AttentionKind.ROUTED_RING, 12, 8, 1, 4),
        (AttentionKind.ROUTED_RING, 8, 8, 1, 8), (AttentionKind.DOUBLE_RING, 8, 8, 1, 2),
        (AttentionKind.DOUBLE_RING, 9, 8, 1, 1),
        (AttentionKind.RING, 1, 8, 1, None),
    ],
)
def test_inner_groups_fit_into_nodes_and_heads(kind, degree, node_size, num_heads, wanted):
    limits = GroupLimits(num_heads=num_heads, node_size=node_size)
    assert schedule_of(kind).inner_degree(degree, limits) == wanted


def broken(schedule: ExchangeSchedule, rng: random.Random) -> ExchangeSchedule | None:
    """The schedule with one detail of one round changed; None where the round has no such detail."""
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
        items[place] = rng.choice(
            [
                dataclasses.replace(transfer, rank=transfer.rank + 1),
                dataclasses.replace(transfer, lead=transfer.lead + 1),
                dataclasses.replace(transfer, spans=transfer.spans[1:]),
            ]
        )
    rounds[number] = dataclasses.replace(rounds[number], **{field: tuple(items)})
    return dataclasses.replace(schedule, **{walk: tuple(rounds)})


def test_all_of_2000_broken_schedules_are_refused():
    rng = random.Random(5)
    num_refused = 0
    while num_refused < 2000:
        degree = rng.randint(2, 6)
        lengths = [rng.randint(2 * degree, 90) for _ in range(rng.randint(1, 3))]
        group = group_of(rng.choice(KINDS), degree, lengths, node_size=rng.choice([2, 3, degree]))
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
    """A wire and a kernel that only record the engine's calls, in order."""

    name = "recorder"

    def __init__(self):
        self.forget()

    def forget(self):
        self.events, self.posted, self.kernel_rows = [], [], []

    def post(self, sends, receives, what):
        self.events.append("post")
        self.posted.append(what)
        return self

    def wait(self):
        self.events.append("wait")

    def forward(self, q, k, v, pairs, scale):
        self.events.append("kernel")
        rows = sum(stop - start for start, stop in pairs.query_rows)
        self.kernel_rows.append(rows)
        return torch.zeros(rows, *q.shape[1:]), torch.zeros(rows, q.shape[1])

    def backward(self, dout, q, k, v, out, lse, pairs, scale):
        self.events.append("kernel")
        self.kernel_rows.append(sum(stop - start for start, stop in pairs.query_rows))
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


@pytest.mark.parametrize("walk", ["forward", "backward"])
def test_every_groups_first_messages_leave_before_the_first_groups_kernels(walk):
    """Cluster ring, node ring, local, forward and backward: what takes longest on the wire is posted first."""
    groups = [
        AttentionGroup(kind=AttentionKind.RING, ranks=(0, 1, 2, 3), sequences=(0,)),
        AttentionGroup(kind=AttentionKind.RING, ranks=(0, 1), sequences=(1,)),
        AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(2,)),
    ]
    (microbatch,) = compile_rank_program(verified_plan([groups], [64, 32, 8], 4), 0).microbatches
    recorder = Recorder()
    engine = AttentionEngine(recorder, recorder, CPU)
    attention = engine.bind(microbatch, num_query_heads=2, num_kv_heads=1, head_dim=4)
    q, k, v = (torch.zeros(microbatch.num_rows, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    out = attention(q, k, v)
    if walk == "backward":
        recorder.forget()
        out.sum().backward()
    assert recorder.events[:3] == ["post", "post", "kernel"]
    cluster, node = ("(0, 1, 2, 3)", "(0, 1)")
    assert [cluster in recorder.posted[0], node in recorder.posted[1]] == [True, True], recorder.posted
    assert recorder.kernel_rows[0] == 16 and recorder.kernel_rows[-1] == 8  # the cluster ring's first, local last
    assert recorder.events.count("post") == recorder.events.count("wait") == (4 if walk == "forward" else 7)


def test_what_groups_saved_is_asked_for_once_each():
    """A memory policy brings a swapped or recomputed tensor back a single time."""
    groups = [
        AttentionGroup(kind=AttentionKind.RING, ranks=(0, 1), sequences=(0,)),
        AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(1,)),
    ]
    (microbatch,) = compile_rank_program(verified_plan([groups], [32, 8], 2), 0).microbatches
    recorder = Recorder()
    attention = AttentionEngine(recorder, recorder, CPU).bind(
        microbatch, num_query_heads=2, num_kv_heads=1, head_dim=4
    )
    q, k, v = (torch.zeros(microbatch.num_rows, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    packed, asked = [], []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(number):
        asked.append(number)
        return packed[number]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = attention(q, k, v)
    out.backward(torch.ones_like(out))
    assert len(packed) == 10 and sorted(asked) == list(range(10))


class Flight:
    def __init__(self, events, number):
        self.events, self.number = events, number

    def wait(self):
        self.events.append(f"wait {self.number}")


class FlightRecorder(Recorder):
    """Identifies messages by the order in which they are posted."""

    def post(self, sends, receives, what):
        number = sum(event.startswith("post") for event in self.events)
        self.events.append(f"post {number}")
        return Flight(self.events, number)


def test_a_double_rings_outer_hop_flies_for_a_whole_inner_cycle():
    group = group_of(AttentionKind.DOUBLE_RING, 9, [1])
    (microbatch,) = compile_rank_program(verified_plan([[group]], [18 * 9], 9), 4).microbatches
    (program,) = microbatch.groups
    recorder = FlightRecorder()
    walker = RoundWalker(program, bind_rounds(program.forward, CPU), (), recorder, recorder, 1.0)
    walker.forward(torch.zeros(18, 2, 4), torch.zeros(18, 1, 4), torch.zeros(18, 1, 4))
    events = [event for event in recorder.events if event != "kernel"]
    assert events == [
        "post 0", "post 1", "wait 0", "post 2", "wait 2", "wait 1",  # 1: the hop to the next ring
        "post 3", "post 4", "wait 3", "post 5", "wait 5", "wait 4",
        "post 6", "wait 6", "post 7", "wait 7",
    ]


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
