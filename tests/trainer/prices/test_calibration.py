"""The pure part of the calibration: memory from peaks, and where measured groups lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.plan import AttentionKind
from trainer.prices.calibration import MeasuredShape, design_plan, fit_memory, length_design, rank_share

PEAKS = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 10**9)), max_size=6)


@given(st.integers(1, 10**9), PEAKS, st.integers(0, 10**6), st.integers(0, 10**9),
       st.sampled_from([0.0, 0.5, 1e5]))
def test_no_measured_peak_is_above_the_line(empty_bytes, peaks, state_bytes, update_bytes, least_slope):
    points = [(0, empty_bytes), *peaks]
    fit = fit_memory(points, state_bytes=state_bytes, update_bytes=update_bytes, least_slope=least_slope)
    for tokens, peak in points:
        assert fit.fixed_bytes + fit.bytes_per_token * tokens >= peak + state_bytes - 1
    assert fit.update_bytes >= update_bytes


def test_a_line_is_found_again_with_its_margin():
    peaks = [(tokens, 1_000_000 + 700 * tokens) for tokens in (0, 64, 640, 1024)]
    fit = fit_memory(peaks, state_bytes=50_000, update_bytes=0)
    assert fit.fixed_bytes == pytest.approx(1.03 * 1_050_000) and fit.bytes_per_token == pytest.approx(1.03 * 700)


def test_what_a_first_step_loads_is_no_price_of_tokens():
    peaks = [(0, 1_000_000), *((tokens, 1_200_000 + 700 * tokens) for tokens in (64, 640, 1024))]
    fit = fit_memory(peaks, state_bytes=0, update_bytes=0)
    assert fit.bytes_per_token == pytest.approx(1.03 * 700) and fit.fixed_bytes == pytest.approx(1.03 * 1_200_000)


def test_chunks_flatten_and_the_line_follows_the_larger_sets():
    peaks = [(0, 1_000), *((tokens, 1_000 + 50 * min(tokens, 256) + tokens) for tokens in (64, 192, 256, 512, 1024))]
    followed = fit_memory(peaks, state_bytes=0, update_bytes=0, least_slope=0.5)
    assert followed.bytes_per_token == pytest.approx(1.03)
    assert followed.fixed_bytes == pytest.approx(1.03 * 13_800, rel=1e-3)


def test_tokens_are_never_free():
    assert fit_memory([(0, 1_000), (100, 500)], state_bytes=0, update_bytes=0).bytes_per_token == 1.0


@pytest.mark.parametrize("num_ranks", [4, 8, 12])
@pytest.mark.parametrize("node_size", [None, 4, 5])
def test_groups_are_measured_where_planners_put_them(num_ranks, node_size):
    """A group that fits in a node and is measured across two would be priced at the links between them."""
    size = num_ranks if node_size is None else node_size
    for degree in range(1, num_ranks + 1):
        plan = design_plan(num_ranks, MeasuredShape(AttentionKind.RING, degree), (64, 8), node_size=node_size)
        ranks = [microbatch.ranks for microbatch in plan.microbatches]
        assert ranks and len({rank for group in ranks for rank in group}) == degree * len(ranks)
        for group in ranks:
            assert group == tuple(range(group[0], group[0] + degree)) and group[-1] < num_ranks
            if degree <= size:
                assert group[0] // size == group[-1] // size
            else:
                assert group[0] % size == 0
        if node_size is None:
            assert len(ranks) == num_ranks // degree


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_ranks_that_are_left_over_work_as_long_as_the_group(degree):
    for lengths in length_design(2048, degree):
        share = rank_share(lengths, degree)
        assert sum(share) >= sum(lengths) / degree
        work, wanted = sum(size**2 for size in share), sum(size**2 for size in lengths) / degree
        assert wanted * 0.999 <= work <= 1.1 * wanted
        plan = design_plan(7, MeasuredShape(AttentionKind.RING, degree), lengths, keep_busy=True)
        assert sorted(rank for each in plan.microbatches for rank in each.ranks) == list(range(7))
