"""Fits recover known coefficients, never go negative, and report their residuals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.fitting import GroupSample, SizeSample, best_rate, fit_group_times, non_negative_fit
from planner.plan import AttentionKind

DESIGN = ((64,), (512,), (2048,), (64,) * 8, (1024, 32), (16,) * 20)


def sample(kind, degree, lengths, coefficients):
    features = (sum(s * s for s in lengths), sum(lengths), len(lengths), 1)
    return GroupSample(
        kind=kind, degree=degree, lengths=lengths, seconds=float(np.dot(features, coefficients))
    )


@pytest.mark.parametrize("coefficients", [(1e-8, 2e-5, 1e-4, 3e-3), (0, 2e-5, 0, 1e-3), (1e-7, 0, 0, 0)])
def test_known_coefficients_come_back(coefficients):
    kinds = [(AttentionKind.LOCAL, 1), (AttentionKind.RING, 3)]
    samples = [sample(*kind, lengths, coefficients) for kind in kinds for lengths in DESIGN]
    fits, errors = fit_group_times(samples)
    assert [(fit.kind, fit.degree) for fit in fits] == kinds
    for fit in fits:
        got = (fit.s_per_token2, fit.s_per_token, fit.s_per_sequence, fit.fixed_s)
        assert got == pytest.approx(coefficients, rel=1e-6, abs=1e-12)
    assert max(map(abs, errors)) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 10), min_size=6, max_size=6))
def test_fit_is_the_best_of_a_fine_grid_and_not_negative(seconds):
    rows = [(sum(s * s for s in lengths) / 4e6, sum(lengths) / 2e3) for lengths in DESIGN]
    fit = non_negative_fit(rows, seconds)
    assert min(fit) >= 0

    def error(coefficients):
        return sum((np.dot(row, coefficients) / s - 1) ** 2 for row, s in zip(rows, seconds, strict=True))

    grid = np.linspace(0, 10, 41)
    assert error(fit) <= min(error(pair) for pair in itertools.product(grid, grid)) + 1e-9


def test_best_rate():
    samples = [SizeSample(op="linear", degree=1, size=n, work=n * 10.0, seconds=1.0) for n in (1, 5, 3)]
    assert best_rate(samples, "linear") == 50.0
    assert best_rate(samples, "p2p") == 0.0
