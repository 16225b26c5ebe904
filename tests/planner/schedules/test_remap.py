"""Token moves: conservation, least traffic by a bound and by a linear program, even use of the NICs."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules.remap import Move, balanced_counts, token_moves

NODE_SIZES = st.integers(1, 9)


def apply_moves(current: list[int], moves: tuple[Move, ...]) -> list[int]:
    after = list(current)
    for source, destination, tokens in moves:
        after[source] -= tokens
        after[destination] += tokens
    return after


def crossing_tokens(moves: tuple[Move, ...], node_size: int) -> int:
    return sum(tokens for source, destination, tokens in moves if source // node_size != destination // node_size)


def net_excess(current: list[int], target: list[int], node_size: int) -> list[int]:
    """Surplus tokens of each node (negative where it has too few)."""
    starts = range(0, len(current), node_size)
    return [sum(current[first : first + node_size]) - sum(target[first : first + node_size]) for first in starts]


def shuffled_target(current: list[int], seed: int) -> list[int]:
    """Random counts with the same sum."""
    draw = random.Random(seed)
    cuts = sorted(draw.randint(0, sum(current)) for _ in current[1:])
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, sum(current)], strict=True)]


def program_cost(current: list[int], target: list[int], node_size: int, crossing_cost: int) -> float:
    """Least cost of the transportation problem, by a linear program: a token costs 1 inside a node and
    ``crossing_cost`` between nodes."""
    ranks = range(len(current))
    program = pulp.LpProblem("moves", pulp.LpMinimize)
    tokens = {
        (source, destination): program.add_variable(f"t_{source}_{destination}", lowBound=0)
        for source, destination in product(ranks, ranks) if source != destination
    }
    program += pulp.lpSum(
        (1 if source // node_size == destination // node_size else crossing_cost) * tokens[source, destination]
        for source, destination in tokens
    )
    for rank in ranks:
        sent = pulp.lpSum(value for pair, value in tokens.items() if pair[0] == rank)
        received = pulp.lpSum(value for pair, value in tokens.items() if pair[1] == rank)
        program += sent - received == current[rank] - target[rank]
    program.solve(pulp.HiGHS(msg=False))
    return float(pulp.value(program.objective))


@given(st.integers(0, 10**9), st.integers(1, 1000))
@settings(max_examples=100, deadline=None)
def test_balanced_counts_are_even_and_complete(total: int, num_ranks: int) -> None:
    counts = balanced_counts(total, num_ranks)
    assert len(counts) == num_ranks and sum(counts) == total
    assert counts[0] - counts[-1] <= 1 and list(counts) == sorted(counts, reverse=True)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(0, 10**6), NODE_SIZES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_moves_reach_the_target_with_the_least_traffic(
    current: list[int], seed: int, node_size: int, balance: bool
) -> None:
    target = list(balanced_counts(sum(current), len(current))) if balance else shuffled_target(current, seed)
    moves = token_moves(current, target, node_size)
    assert apply_moves(current, moves) == target
    assert all(tokens > 0 for *_, tokens in moves)
    assert not {source for source, *_ in moves} & {destination for _, destination, _ in moves}
    assert len({move[:2] for move in moves}) == len(moves) and list(moves) == sorted(moves)
    # Neither can be less: a rank must lose its surplus, a node its net excess.
    surplus = sum(max(0, have - want) for have, want in zip(current, target, strict=True))
    assert sum(tokens for *_, tokens in moves) == surplus
    assert crossing_tokens(moves, node_size) == sum(max(0, excess) for excess in net_excess(current, target, node_size))


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_linear_program_finds_a_cheaper_plan(current: list[int], seed: int, node_size: int) -> None:
    target = shuffled_target(current, seed)
    moves = token_moves(current, target, node_size)
    crossing = crossing_tokens(moves, node_size)
    ours = sum(tokens for *_, tokens in moves) + 9 * crossing
    assert ours == pytest.approx(program_cost(current, target, node_size, crossing_cost=10))


@given(st.lists(st.integers(0, 500), min_size=8, max_size=8), st.lists(st.integers(0, 500), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_traffic_between_nodes_is_spread_over_their_ranks(first: list[int], second: list[int]) -> None:
    """A rank's part is the smaller of its surplus and one level that all others share."""
    current = first + second
    target = list(balanced_counts(sum(current), 16))
    moves = token_moves(current, target, 8)
    sent = Counter[int]()
    for source, destination, tokens in moves:
        if source // 8 != destination // 8:
            sent[source] += tokens
    level = max(sent.values(), default=0)
    senders = range(8) if sum(first) > sum(second) else range(8, 16)
    assert all(sent[rank] >= min(current[rank] - target[rank], level - 1) for rank in senders if sent)


def test_nothing_moves_where_nothing_has_to() -> None:
    assert token_moves((3, 3, 3), (3, 3, 3), 2) == ()
    assert token_moves((), (), 8) == ()


def test_impossible_moves_are_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens of 2 ranks to 6 tokens of 2 ranks"):
        token_moves((3, 4), (3, 3), 8)
    with pytest.raises(ValueError, match="of 2 ranks to 7 tokens of 1 ranks"):
        token_moves((3, 4), (7,), 8)
    with pytest.raises(ValueError, match="0 or more"):
        token_moves((-1, 2), (1, 0), 8)
    with pytest.raises(ValueError, match="node_size at least 1, got 0"):
        token_moves((1, 0), (0, 1), 0)
    with pytest.raises(ValueError, match="share 5 tokens over 0 ranks"):
        balanced_counts(5, 0)
