"""Lockstep rounds: every microbatch once, no rank twice in a round, nobody overtakes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.pricing.lockstep import lockstep_rounds

RANKS = st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True).map(tuple)


@given(rank_lists=st.lists(RANKS, max_size=20))
def test_rounds_are_disjoint_and_in_order(rank_lists):
    rounds = lockstep_rounds(rank_lists)
    assert sorted(index for members in rounds for index in members) == list(range(len(rank_lists)))
    for members in rounds:
        ranks = [rank for index in members for rank in rank_lists[index]]
        assert members and len(set(ranks)) == len(ranks)
    for rank in range(6):
        mine = [index for members in rounds for index in members if rank in rank_lists[index]]
        assert mine == sorted(mine)


@given(rank_lists=st.lists(RANKS, min_size=1, max_size=20))
def test_no_microbatch_could_run_a_round_earlier(rank_lists):
    rounds = lockstep_rounds(rank_lists)
    for number, members in enumerate(rounds[1:], start=1):
        for index in members:
            before = {rank for other in rounds[number - 1] for rank in rank_lists[other]}
            assert before & set(rank_lists[index])


def test_nothing_to_do_has_no_rounds():
    assert lockstep_rounds([]) == ()
