"""Every kind of attention is replayed as its schedule says: closed forms equal the written schedules, and the arrays
equal a walk over the schedules one message at a time."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planner.errors import SpecError
from planner.plan import AttentionGroup, AttentionKind, Sharding, StepPlan
from planner.pricing.assemble import GroupChoice
from planner.pricing.lockstep import lockstep_rounds
from planner.replay.flows import Messages, WalkShape, group_shape
from planner.replay.groups import ExchangeRun, stack_groups
from planner.replay.state import DataRanks, TimeLedger, kernel_seconds
from planner.replay.step import estimated_s
from planner.replay.waves import split_waves
from planner.replay.work import AttentionWork, FloatArray
from planner.schedules.exchange import Round, schedule_of, write_schedule
from tests.planner.replay.test_step import (
    MODEL,
    RING,
    cluster_of,
    data_ranks_of,
    plan_of,
    random_plan,
    replayed,
    round_work,
)

KINDS = tuple(kind for kind in AttentionKind if kind is not AttentionKind.LOCAL)
NUM_RANKS = 12


def random_group(draw: random.Random, kind: AttentionKind) -> tuple[AttentionGroup, list[int]]:
    """A random group of 2 to 12 ranks in any order, with any inner degree that the kind can have, and its lengths."""
    degree = draw.randint(2, NUM_RANKS)
    lengths = [draw.choice([draw.randint(1, 30), draw.randint(1, 40_000)]) for _ in range(draw.randint(1, 4))]
    inner_degree = 1
    if kind in (AttentionKind.USP, AttentionKind.DOUBLE_RING):
        inner_degree = draw.choice([size for size in range(1, degree + 1) if degree % size == 0])
    group = AttentionGroup(
        kind=kind, ranks=tuple(draw.sample(range(NUM_RANKS), degree)), sequences=tuple(range(len(lengths))),
        inner_degree=inner_degree,
    )
    return group, lengths


def ordered(messages: Messages) -> list[FloatArray]:
    order = np.lexsort((messages.target, messages.source, messages.wait_after, messages.posted))
    return [np.asarray(getattr(messages, name))[order].astype(np.float64) for name in Messages.__slots__]


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_are_the_written_schedules(kind: AttentionKind) -> None:
    draw, data_ranks = random.Random(1), data_ranks_of(cluster_of(3, 4, 4), NUM_RANKS)
    for _ in range(25):
        group, lengths = random_group(draw, kind)
        quick, written = (group_shape(group, lengths, data_ranks, is_written=way) for way in (False, True))
        for walk in ("forward", "backward"):
            found: WalkShape = getattr(quick, walk)
            expected: WalkShape = getattr(written, walk)
            for name in AttentionWork.__slots__:
                np.testing.assert_allclose(getattr(found.work, name), getattr(expected.work, name), rtol=1e-9)
            for ours, theirs in zip(ordered(found.messages), ordered(expected.messages), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_move_the_clock_as_the_written_schedules(kind: AttentionKind) -> None:
    draw = random.Random(2)
    for _ in range(8):
        group, lengths = random_group(draw, kind)
        data_ranks = data_ranks_of(cluster_of(3, 4, draw.choice([1, 2, 4]), speed=draw.choice([0.01, 1.0])), NUM_RANKS)
        start = np.array([draw.uniform(0, 1e-3) for _ in range(NUM_RANKS)])
        for is_forward in (True, False):
            clocks = []
            for is_written in (False, True):
                run = stack_groups([group], lengths, data_ranks, is_written=is_written).priced(data_ranks)
                clock, ledger = start.copy(), TimeLedger.empty(NUM_RANKS)
                (run.forward if is_forward else run.backward)(clock, ledger, None)
                clocks.append(clock)
                np.testing.assert_allclose(
                    clock - start, ledger.compute_s + ledger.exposed_s + ledger.idle_s, rtol=1e-9, atol=1e-15
                )
            np.testing.assert_allclose(*clocks, rtol=1e-9)


@pytest.fixture
def a_later_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[AttentionKind]:
    """A kind without a closed form, made by giving local another schedule."""
    from tests.parallel import test_new_kind

    file = ModuleType("planner.schedules.kinds.local")
    file.SCHEDULE = replace(  # type: ignore[attr-defined]
        schedule_of(AttentionKind.LOCAL), write=test_new_kind.write,
        inner_degree=lambda degree, limits: 1, head_degree=lambda degree, inner_degree: 1,
    )
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setattr("planner.replay.flows._CLOSED_FORMS", {})
    yield AttentionKind.LOCAL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_group_is_walked_message_by_message(kind: AttentionKind, seed: int) -> None:
    check_walk(kind, seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_kind_of_later_is_walked_by_its_schedule(a_later_kind: AttentionKind, seed: int) -> None:
    check_walk(a_later_kind, seed)


def check_walk(kind: AttentionKind, seed: int) -> None:
    """Every device has a NIC of its own, so that only ports are shared."""
    draw = random.Random(seed)
    group, lengths = random_group(draw, kind)
    data_ranks = data_ranks_of(cluster_of(3, 4, 4, speed=draw.choice([0.01, 0.3, 1.0])), NUM_RANKS)
    run = stack_groups([group], lengths, data_ranks).priced(data_ranks)
    assert isinstance(run, ExchangeRun)
    for is_forward in (True, False):
        start = np.array([draw.uniform(0, 1e-3) for _ in range(NUM_RANKS)])
        clock, expected = start.copy(), start.copy()
        (run.forward if is_forward else run.backward)(clock, TimeLedger.empty(NUM_RANKS), None)
        nothing = TimeLedger.empty(NUM_RANKS)
        if run.head_exchanges is not None:
            run.head_exchanges.before(is_forward, expected, nothing, None)
        walked = walk([float(expected[rank]) for rank in group.ranks], group, lengths, data_ranks, is_forward)
        expected[list(group.ranks)] = walked
        if run.head_exchanges is not None:
            run.head_exchanges.after(is_forward, expected, nothing, None)
        np.testing.assert_allclose(clock, expected, rtol=1e-9)


def walk(
    clock: list[float], group: AttentionGroup, lengths: list[int], data_ranks: DataRanks, is_forward: bool
) -> list[float]:
    """When each rank ends one layer: in a round a rank posts its batches one after the other, computes, and waits for
    the batches that are due. A batch starts when earlier ones have ended at both ends of each of its messages."""
    shape = group_shape(group, lengths, data_ranks, is_written=True)
    schedules = [write_schedule(group, lengths, index) for index in range(group.degree)]
    walks = [schedule.forward if is_forward else schedule.backward for schedule in schedules]
    index_of = {rank: index for index, rank in enumerate(group.ranks)}
    token_bytes = [2 * MODEL.head_dim * float(shape.heads.kv[index % shape.team_size]) for index in range(group.degree)]
    posted: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for index, rounds in enumerate(walks):
        for number, step in enumerate(rounds):
            for out in step.sends:
                batch = posted.setdefault((number - out.lead, number - 1), {})
                pair, tokens = (index, index_of[out.rank]), sum(span.num_tokens for span in out.spans)
                batch[pair] = batch.get(pair, 0.0) + 2 * token_bytes[index] * tokens
            for out in step.grad_sends:
                batch = posted.setdefault((number + 1, number + out.lead), {})
                pair, tokens = (index, index_of[out.rank]), sum(span.num_tokens for span in out.spans)
                batch[pair] = batch.get(pair, 0.0) + 4 * token_bytes[index] * tokens
    through, free = {}, list(clock)  # of (rank, round that waits); of the rank's communicator
    for number in range(max(map(len, walks))):
        for key in sorted(key for key in posted if key[0] == number):
            ready = [max(now, then) for now, then in zip(clock, free, strict=True)]
            for (source, target), seconds in batch_seconds(posted[key], group, data_ranks).items():
                arrives = max(ready[source], ready[target]) + seconds
                for end in (source, target):
                    free[end] = max(free[end], arrives)
                    through[end, key[1]] = max(through.get((end, key[1]), 0.0), arrives)
        for index, rounds in enumerate(walks):
            heads = shape.heads.queries[index % shape.team_size]
            step_s = kernels(rounds[number], data_ranks, heads, is_forward) if number < len(rounds) else 0.0
            clock[index] = max(clock[index] + step_s, through.get((index, number), 0.0))
    return clock


def batch_seconds(
    batch: dict[tuple[int, int], float], group: AttentionGroup, data_ranks: DataRanks
) -> dict[tuple[int, int], float]:
    """Seconds of each message of a batch. It ends when everything that shares a port with it has ended; NVLink and NIC
    are separate ports."""
    node_of = [int(data_ranks.node_of(np.array(rank))) for rank in group.ranks]
    machine, found = data_ranks.machine, {}
    for source, target in batch:
        is_far = node_of[source] != node_of[target]
        same = {pair: size for pair, size in batch.items() if (node_of[pair[0]] != node_of[pair[1]]) is is_far}
        shared = max(
            sum(size for pair, size in same.items() if pair[0] == source),
            sum(size for pair, size in same.items() if pair[1] == target),
        )
        found[source, target] = (machine.inter_node if is_far else machine.intra_node).transfer_s(shared)
    return found


def kernels(step: Round, data_ranks: DataRanks, heads: float, is_forward: bool) -> float:
    queries, keys, pairs = round_work(step)
    message_of = {span: place for place, into in enumerate(step.receives) for span in into.spans}
    calls = len({(task.causal, message_of.get(task.key)) for task in step.tasks})
    own = sum(task.query.num_tokens for task in step.tasks if task.causal)
    arrays = (np.array([float(value)]) for value in (calls, queries, keys, pairs, queries - own))
    work = AttentionWork(**dict(zip(("calls", "queries", "keys", "pairs", "merged"), arrays, strict=True)))
    return float(kernel_seconds(work, data_ranks, heads)[0 if is_forward else 1][0])


@pytest.mark.parametrize("seed", range(20))
def test_waves_are_the_rounds_that_zero3_runs(seed: int) -> None:
    plan = replace(random_plan(seed), sharding=Sharding.ZERO3)
    places = {id(microbatch): index for index, microbatch in enumerate(plan.microbatches)}
    waves = tuple(tuple(places[id(each)] for each in wave) for wave in split_waves(plan.microbatches))
    assert waves == lockstep_rounds(microbatch.ranks for microbatch in plan.microbatches)


def of_degree(degree: int) -> StepPlan:
    plan = plan_of(64, [100_000], GroupChoice(RING, (0, 1), (0,)))
    (microbatch,) = plan.microbatches
    group = AttentionGroup(kind=RING, ranks=tuple(range(degree)), sequences=(0,))
    return replace(plan, microbatches=(replace(microbatch, ranks=group.ranks, groups=(group,)),))


def test_the_estimate_grows_with_the_groups() -> None:
    few, many = estimated_s(of_degree(4)), estimated_s(of_degree(64))
    assert 0 < few < many < 0.2, "a ring of 64 takes a fraction of a second"


def test_a_plan_of_stages_is_refused() -> None:
    staged: Any = SimpleNamespace(step=3, num_stages=2)
    with pytest.raises(SpecError, match="step 3: a plan of 2 pipeline stages cannot be replayed"):
        replayed(staged, cluster_of(8, 8, 8))
