"""Routed transfers: stages by hand, limits, and the rule for the number of proxies against all numbers of proxies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules.routing import best_num_proxies, routed_transfer_s

RATES = st.floats(1e-12, 1e-6)


def test_stages_add_up() -> None:
    """52.4 MB over four NICs of 24 GB/s: three quarters leave and join at 155 GB/s."""
    seconds = routed_transfer_s(52.4e6, intra_s_per_byte=1 / 155e9, inter_s_per_byte=1 / 24e9, num_proxies=4)
    assert seconds == pytest.approx(2 * 39.3e6 / 155e9 + 13.1e6 / 24e9)


@given(st.floats(0, 1e12), RATES, RATES, st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_between_a_direct_message_and_its_own_parts(
    num_bytes: float, intra: float, inter: float, num_proxies: int
) -> None:
    direct_s = routed_transfer_s(num_bytes, intra_s_per_byte=intra, inter_s_per_byte=inter, num_proxies=1)
    routed_s = routed_transfer_s(num_bytes, intra_s_per_byte=intra, inter_s_per_byte=inter, num_proxies=num_proxies)
    assert direct_s == pytest.approx(num_bytes * inter)
    assert routed_s >= direct_s / num_proxies
    assert routed_s <= direct_s / num_proxies + 2 * num_bytes * intra


@given(RATES, RATES, st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_best_number_of_proxies_is_best(intra: float, inter: float, num_available: int) -> None:
    times = [
        routed_transfer_s(1e6, intra_s_per_byte=intra, inter_s_per_byte=inter, num_proxies=count)
        for count in range(1, num_available + 1)
    ]
    best = best_num_proxies(intra_s_per_byte=intra, inter_s_per_byte=inter, num_available=num_available)
    assert times[best - 1] == pytest.approx(min(times))


@given(RATES, RATES, st.integers(1, 64), st.integers(1, 10**9))
@settings(max_examples=200, deadline=None)
def test_pipelined_is_the_longest_stage(intra: float, inter: float, num_proxies: int, num_bytes: int) -> None:
    routed_s, pipelined_s = (
        routed_transfer_s(
            num_bytes, intra_s_per_byte=intra, inter_s_per_byte=inter, num_proxies=num_proxies, pipelined=pipelined
        ) for pipelined in (False, True)
    )
    aside_s = num_bytes * (num_proxies - 1) / num_proxies * intra
    assert pipelined_s == pytest.approx(max(aside_s, num_bytes / num_proxies * inter))
    assert pipelined_s <= routed_s <= 3 * pipelined_s * (1 + 1e-9)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 proxy, got 0"):
        routed_transfer_s(1, intra_s_per_byte=1, inter_s_per_byte=1, num_proxies=0)
    with pytest.raises(ValueError, match="at least 1 proxy, got 0"):
        best_num_proxies(intra_s_per_byte=1, inter_s_per_byte=1, num_available=0)
    with pytest.raises(ValueError, match="num_bytes must be 0 or more"):
        routed_transfer_s(-1, intra_s_per_byte=1, inter_s_per_byte=1, num_proxies=1)
    with pytest.raises(ValueError, match="inter_s_per_byte must be 0 or more and finite"):
        best_num_proxies(intra_s_per_byte=1, inter_s_per_byte=float("inf"), num_available=1)
