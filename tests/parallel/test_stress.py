"""Random legal plans run to completion on 8 ranks; illegal ones are refused before the first message.

Ranks are threads. Whatever the plan does at random (groups of any kind and degree that overlap, ranks with several
groups, ranks without work or without rows, tokens moved between ranks, unequal numbers of microbatches), every rank
must finish, no message may be left over, and output and gradients must be those of dense attention.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from parallel.comm import Message
from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, MemoryPolicy, StepPlan
from planner.pricing.assemble import GroupChoice
from planner.schedules.check import check_schedules
from planner.schedules.exchange import write_schedule
from tests.parallel.engine_cases import (
    CPU,
    HEAD_DIM,
    SHARED_KINDS,
    dense_results,
    engine_results,
    inner_degrees,
    make_case,
    random_documents,
    worst_error,
)
from tests.planner.random_plans import Case, merged, reprice, with_moves
from tests.ranks import ThreadFabric, run_threads

NUM_RANKS = 8
TOLERANCE = 1e-11
TIMEOUT_S = 20.0


def random_step(rng: random.Random, num_heads: int) -> Case:
    """A legal plan: each sequence in a random group; groups alone or several to a microbatch; ranks left idle;
    tokens moved for the token-wise layers."""
    lengths = tuple(rng.choice((1, 2, 3, rng.randint(1, 40))) for _ in range(rng.randint(1, 12)))
    shapes, choices = {}, []
    for kind in SHARED_KINDS:
        for degree in range(2, NUM_RANKS + 1):
            legal = inner_degrees(kind, degree, num_heads)
            if legal:
                shapes[(kind, degree)] = rng.choice(legal)
    pool = rng.sample(range(NUM_RANKS), rng.randint(1, NUM_RANKS))  # the others have nothing to do in this step
    waiting = rng.sample(range(len(lengths)), len(lengths))
    while waiting:
        taken = tuple(waiting.pop() for _ in range(rng.randint(1, min(4, len(waiting)))))
        kind, degree = rng.choice([(AttentionKind.LOCAL, 1), *(key for key in shapes if key[1] <= len(pool))])
        choices.append(GroupChoice(kind, tuple(rng.sample(pool, degree)), taken))
    case = make_case(choices, lengths, NUM_RANKS, num_heads=num_heads, shapes=shapes)
    if rng.random() < 0.5:
        case = replace(
            case, plan=reprice(replace(case.plan, microbatches=merged(rng, case.plan.microbatches)), case.cost)
        )
    return with_moves(rng, case) if rng.random() < 0.5 else case


def run_step(case: Case, fabric: ThreadFabric, num_heads: int, num_kv_heads: int, seed: int = 0) -> float:
    """The largest error of out, dq, dk, dv against dense attention. Raises what any rank raises."""
    documents = random_documents(case.lengths, num_heads, num_kv_heads, seed=seed)
    return worst_error(engine_results(case, documents, fabric), dense_results(documents))


def run_random_plans(first_seed: int, num_plans: int) -> set[AttentionKind]:
    """Every one of these plans must finish exactly. The kinds of attention that occurred."""
    seen = set()
    for seed in range(first_seed, first_seed + num_plans):
        rng = random.Random(seed)
        num_kv_heads, ratio = rng.choice([(1, 1), (2, 1), (1, 4), (2, 4), (8, 1)])
        case = random_step(rng, num_kv_heads * ratio)
        fabric = ThreadFabric(NUM_RANKS, timeout_s=TIMEOUT_S)
        error = run_step(case, fabric, num_kv_heads * ratio, num_kv_heads, seed)
        assert error < TOLERANCE, f"seed {seed}: {error}"
        assert not fabric.undelivered(), f"seed {seed}: {fabric.undelivered()}"
        seen |= {group.kind for microbatch in case.plan.microbatches for group in microbatch.groups}
    return seen


def test_dozens_of_random_plans_run_to_completion() -> None:
    assert run_random_plans(0, 80) == set(AttentionKind)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("first_seed", "num_plans"), [(80, 120), *((10_000 + 500 * part, 500) for part in range(10))]
)
def test_thousands_of_random_plans_run_to_completion(first_seed: int, num_plans: int) -> None:
    assert run_random_plans(first_seed, num_plans) == set(AttentionKind)


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_what_the_verifier_accepts_is_exact(kind: AttentionKind) -> None:
    """The stress test relies on the verifier to know the legal shapes of a kind: none may be missing or wrong."""
    for num_heads in (1, 8):
        shapes = [(degree, inner) for degree in range(2, 9) for inner in inner_degrees(kind, degree, num_heads)]
        assert shapes or num_heads == 1
        for degree, inner in shapes:
            group = AttentionGroup(
                kind=kind, ranks=tuple(range(degree)), sequences=(0, 1, 2), inner_degree=inner
            )
            lengths = (37, 5, 1)
            check_schedules(group, lengths, [write_schedule(group, lengths, index) for index in range(degree)])


def test_a_rank_that_stays_away_is_reported_by_who_waits_for_whom() -> None:
    case = ring_case()
    fabric = ThreadFabric(NUM_RANKS, timeout_s=0.5)

    def rank_main(rank: int) -> None:
        if rank == 2:
            return
        engine = AttentionEngine(CpuFlashKernel(), fabric.wire(rank), CPU)
        for microbatch in compile_rank_program(case.plan, rank).microbatches:
            rows = torch.zeros(microbatch.num_rows, 1, HEAD_DIM)
            engine.bind(microbatch, num_query_heads=1, num_kv_heads=1, head_dim=HEAD_DIM)(rows, rows, rows)

    with pytest.raises(TimeoutError, match=r"rank 0 waits for rank 2 in ring attention of group \(0, 1, 2\)"):
        run_threads(NUM_RANKS, rank_main)
    assert "rank 2 waits for nobody" in fabric.who_waits()


def test_sends_that_nobody_receives_do_not_count_as_done() -> None:
    """Ranks that wait for their sends before they post the receives: a real wire may hang then, and this one must."""
    fabric = ThreadFabric(2, timeout_s=0.5)

    def rank_main(rank: int) -> None:
        wire, message = fabric.wire(rank), Message(1 - rank, torch.zeros(1))
        wire.post([message], [], "send").wait()
        wire.post([], [message], "receive").wait()

    with pytest.raises(TimeoutError, match="rank 0 waits for rank 1 in send; rank 1 waits for rank 0 in send"):
        run_threads(2, rank_main)


def ring_case() -> Case:
    """Ranks 0, 1, 2 share two sequences; ranks 3 and 4 share one; rank 0 has one of its own."""
    choices = [
        GroupChoice(AttentionKind.RING, (0, 1, 2), (0, 1)),
        GroupChoice(AttentionKind.RING, (3, 4), (2,)),
        GroupChoice(AttentionKind.LOCAL, (0,), (3,)),
    ]
    return make_case(choices, (30, 12, 9, 5), NUM_RANKS, num_heads=1)


def with_microbatch(plan: StepPlan, index: int, **changes: object) -> StepPlan:
    batches = list(plan.microbatches)
    batches[index] = replace(batches[index], **changes)
    return replace(plan, microbatches=tuple(batches))


def with_group(plan: StepPlan, index: int, **changes: object) -> StepPlan:
    """The microbatch's first group changed, the microbatch's ranks following it."""
    group = replace(plan.microbatches[index].groups[0], **changes)
    rest = plan.microbatches[index].groups[1:]
    ranks = tuple(sorted({rank for each in (group, *rest) for rank in each.ranks}))
    return with_microbatch(plan, index, groups=(group, *rest), ranks=ranks)


def two_ranks(plan: StepPlan, index: int) -> tuple[int, int]:
    """Two of the microbatch's ranks; where it has one alone, a second that is not its own."""
    ranks = plan.microbatches[index].ranks
    return (ranks[0], ranks[1]) if len(ranks) > 1 else (ranks[0], (ranks[0] + 1) % NUM_RANKS)


MUTATIONS: dict[str, Callable[[StepPlan, int], StepPlan]] = {
    "a microbatch is lost": lambda p, i: replace(p, microbatches=p.microbatches[:i] + p.microbatches[i + 1 :]),
    "a microbatch runs twice": lambda p, i: replace(p, microbatches=(*p.microbatches, p.microbatches[i])),
    "a rank that does not exist": lambda p, i: with_group(p, i, ranks=(*p.microbatches[i].groups[0].ranks, NUM_RANKS)),
    "a negative rank": lambda p, i: with_group(p, i, ranks=(*p.microbatches[i].groups[0].ranks, -1)),
    "a rank twice in a group": lambda p, i: with_group(p, i, ranks=p.microbatches[i].groups[0].ranks * 2),
    "a group without ranks": lambda p, i: with_group(p, i, ranks=()),
    "a group without sequences": lambda p, i: with_group(p, i, sequences=()),
    "a sequence that does not exist": lambda p, i: with_group(p, i, sequences=(99,)),
    "a sequence twice": lambda p, i: with_group(p, i, sequences=p.microbatches[i].groups[0].sequences * 2),
    "an unknown kind": lambda p, i: with_group(p, i, kind="star"),
    "local over several ranks, or a kind of several on one": lambda p, i: with_group(
        p, i, kind=AttentionKind.LOCAL if p.microbatches[i].groups[0].degree > 1 else AttentionKind.RING
    ),
    "an inner degree that does not divide": lambda p, i: with_group(p, i, inner_degree=NUM_RANKS + 3),
    "a rank that is in no group": lambda p, i: with_microbatch(
        p, i, ranks=(*p.microbatches[i].ranks, *({*range(NUM_RANKS)} - {*p.microbatches[i].ranks}))[: NUM_RANKS]
        if len(p.microbatches[i].ranks) < NUM_RANKS else p.microbatches[i].ranks[:-1]
    ),
    "a move to a rank outside": lambda p, i: with_microbatch(
        p, i, moves=((p.microbatches[i].ranks[0], NUM_RANKS, 1),)
    ),
    "a move of more than there is": lambda p, i: with_microbatch(p, i, moves=((*two_ranks(p, i), 10**6),)),
    "a move that is not priced in": lambda p, i: with_microbatch(p, i, moves=((*two_ranks(p, i), 1),)),
    "a move of nothing": lambda p, i: with_microbatch(p, i, moves=((*two_ranks(p, i), 0),)),
    "a rank that sends and receives": lambda p, i: with_microbatch(
        p, i, moves=((*two_ranks(p, i), 1), (*two_ranks(p, i)[::-1], 1))
    ),
    "a microbatch without groups": lambda p, i: with_microbatch(p, i, groups=()),
    "another length": lambda p, i: replace(
        p, sequences=(replace(p.sequences[0], num_tokens=p.sequences[0].num_tokens + 1), *p.sequences[1:])
    ),
    "a sequence that the step does not have": lambda p, i: replace(
        p, sequences=(*p.sequences, replace(p.sequences[0], index=len(p.sequences)))
    ),
    "another number of ranks": lambda p, i: replace(p, num_ranks=NUM_RANKS - 1),
    "a memory policy that cannot run": lambda p, i: with_microbatch(
        p, i, memory=MemoryPolicy(keep_fraction=0.5, swap_fraction=0.75, recompute_fraction=-0.25)
    ),
    "less memory than it needs": lambda p, i: with_microbatch(p, i, peak_bytes=p.microbatches[i].peak_bytes - 1),
    "a price that is not the cost model's": lambda p, i: replace(p, predicted_s=p.predicted_s * 1.01),
    "another cost model": lambda p, i: replace(p, cost_digest="0" * 64),
    "another schema": lambda p, i: replace(p, schema=99),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_illegal_plan_is_refused_before_the_first_message(name: str) -> None:
    for seed in range(12):
        rng = random.Random(1000 + seed)
        case = random_step(rng, 8)
        illegal = MUTATIONS[name](case.plan, rng.randrange(len(case.plan.microbatches)))
        fabric = ThreadFabric(NUM_RANKS, timeout_s=TIMEOUT_S)
        with pytest.raises(PlanError):
            run_step(replace(case, plan=illegal), fabric, 8, 2)
        assert not fabric.posted


def test_the_legal_plan_does_send() -> None:
    fabric = ThreadFabric(NUM_RANKS, timeout_s=TIMEOUT_S)
    assert run_step(ring_case(), fabric, 1, 1) < TOLERANCE
    assert {(a, b) for a, b, _ in fabric.posted} == {(0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2), (3, 4), (4, 3)}
