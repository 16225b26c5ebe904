"""The pure part of the calibration: memory from peaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.calibration import fit_memory

PEAKS = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 10**9)), max_size=6)


@given(st.integers(1, 10**9), PEAKS, st.integers(0, 10**6), st.integers(0, 10**9),
       st.sampled_from([0.0, 0.5, 1e5]))
def test_no_measured_peak_is_above_the_line(empty_bytes, peaks, state_bytes, update_bytes, least_slope):
    points = [(0, empty_bytes), *peaks]
    fit = fit_memory(points, state_bytes=state_bytes, update_bytes=update_bytes, least_slope=least_slope)
    for tokens, peak in points:
        assert fit.fixed_bytes + fit.bytes_per_token * tokens >= peak + state_bytes - 1
    assert fit.update_bytes >= update_bytes


def test_a_line_is_found_again_with_a_hundredth_more():
    peaks = [(tokens, 1_000_000 + 700 * tokens) for tokens in (0, 64, 640, 1024)]
    fit = fit_memory(peaks, state_bytes=50_000, update_bytes=0)
    assert fit.fixed_bytes == pytest.approx(1.01 * 1_050_000) and fit.bytes_per_token == pytest.approx(1.01 * 700)


def test_what_a_first_step_loads_is_no_price_of_tokens():
    peaks = [(0, 1_000_000), *((tokens, 1_200_000 + 700 * tokens) for tokens in (64, 640, 1024))]
    fit = fit_memory(peaks, state_bytes=0, update_bytes=0)
    assert fit.bytes_per_token == pytest.approx(1.01 * 700) and fit.fixed_bytes == pytest.approx(1.01 * 1_200_000)


def test_chunks_flatten_and_the_line_follows_the_larger_sets():
    peaks = [(0, 1_000), *((tokens, 1_000 + 50 * min(tokens, 256) + tokens) for tokens in (64, 192, 256, 512, 1024))]
    followed = fit_memory(peaks, state_bytes=0, update_bytes=0, least_slope=0.5)
    assert followed.bytes_per_token == pytest.approx(1.01)
    assert followed.fixed_bytes == pytest.approx(1.01 * 13_800, rel=1e-3)


def test_tokens_are_never_free():
    assert fit_memory([(0, 1_000), (100, 500)], state_bytes=0, update_bytes=0).bytes_per_token == 1.0
