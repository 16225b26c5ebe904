"""Tokens moved for the token-wise layers: every row is at one rank, and attention and gradients are still exact."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.program import compile_rank_program
from parallel.remap import Remap
from planner.plan import AttentionKind
from planner.pricing.assemble import GroupChoice
from planner.schedules.linear_layout import rank_moves
from tests.parallel.engine_cases import dense_results, engine_results, make_case, random_documents, worst_error
from tests.planner.random_plans import Case, reprice, with_moves
from tests.ranks import ThreadFabric, run_threads

RING, ULYSSES, LOCAL = AttentionKind.RING, AttentionKind.ULYSSES, AttentionKind.LOCAL
TOLERANCE = 1e-11
LENGTHS = (41, 13, 30, 7, 3)


def zones_case(moves: tuple[tuple[int, int, int], ...] = ()) -> Case:
    """One microbatch on 4 ranks: a ring of all, a head exchange of two, whole sequences. Rank 3 has the fewest."""
    groups = (
        GroupChoice(RING, (0, 1, 2, 3), (0,)), GroupChoice(ULYSSES, (0, 1), (1,)), GroupChoice(LOCAL, (2,), (2, 3)),
        GroupChoice(LOCAL, (0,), (4,)),
    )
    case = make_case([groups], LENGTHS, 4, num_heads=4)
    plan = replace(case.plan, microbatches=(replace(case.plan.microbatches[0], moves=moves),))
    return replace(case, plan=reprice(plan, case.cost))


def test_moved_rows_come_from_the_end_in_the_order_listed() -> None:
    before = [compile_rank_program(zones_case().plan, rank).microbatches[0] for rank in range(4)]
    moves = ((2, 3, 8), (0, 3, 2), (2, 1, 1))
    after = [compile_rank_program(zones_case(moves).plan, rank).microbatches[0] for rank in range(4)]

    def tokens(microbatch):
        return [(s.sequence, t) for s in microbatch.spans for t in range(s.start_token, s.stop_token)]

    was, now = [tokens(each) for each in before], [tokens(each) for each in after]
    assert now == [was[0][:-2], was[1] + was[2][-9:-8], was[2][:-9], was[3] + was[2][-8:] + was[0][-2:]]
    assert [each.num_rows for each in after] == [len(rows) for rows in now]
    assert [each.groups for each in after] == [each.groups for each in before]  # attention is what it was
    assert [each.moves for each in before] == [None] * 4


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_random_moves_are_exact(seed: int) -> None:
    rng = random.Random(seed)
    case = with_moves(rng, zones_case())
    documents = random_documents(LENGTHS, 4, 2, seed=seed)
    fabric = ThreadFabric(4, timeout_s=20)
    assert worst_error(engine_results(case, documents, fabric), dense_results(documents)) < TOLERANCE
    assert not fabric.undelivered()


def test_a_rank_may_be_left_without_any_token() -> None:
    num_held = compile_rank_program(zones_case().plan, 3).microbatches[0].num_rows
    case = zones_case(((3, 1, num_held),))
    assert compile_rank_program(case.plan, 3).microbatches[0].spans == ()
    documents = random_documents(LENGTHS, 4, 2)
    assert worst_error(engine_results(case, documents), dense_results(documents)) < TOLERANCE


@pytest.mark.parametrize("moves", [((0, 1, 3), (0, 2, 1)), ((0, 2, 5), (1, 2, 2))])
def test_there_and_back_is_nothing_and_each_way_is_the_others_adjoint(moves) -> None:
    counts = (6, 4, 2)
    fabric, products = ThreadFabric(3), {}

    def rank_main(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        remap = Remap(rank_moves(moves, rank, counts[rank]), fabric.wire(rank))
        x = torch.randn(remap.moves.num_linear_rows, 2, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(counts[rank], 2, 3, generator=generator, dtype=torch.float64)
        there = remap.exchange(x, to_attention=True)
        back = remap.exchange(there, to_attention=False)
        assert torch.equal(back, x)
        home = remap.exchange(y, to_attention=False)
        products[rank] = (float((there * y).sum()), float((x * home).sum()))

    run_threads(3, rank_main)
    one, other = (sum(each[side] for each in products.values()) for side in (0, 1))
    assert one == pytest.approx(other, rel=1e-12) and one != 0
