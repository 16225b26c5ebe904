"""Fits recover known coefficients, never go negative, and report their residuals."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.fitting import GroupSample, SizeSample, best_rate, fit_group_times, non_negative_fit
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


def test_fit_is_the_best_of_all_faces():
    """Every subset of coefficients solved alone: the optimum is the best of those without a negative one."""
    draw = np.random.default_rng(2)
    for trial in range(200):
        num_columns = draw.integers(1, 6)
        rows = draw.uniform(-1 if trial % 3 == 0 else 0, 1, (draw.integers(1, 9), num_columns))
        if trial % 4 == 0:
            rows[:, -1] = 2 * rows[:, 0]
        rows *= 10.0 ** draw.uniform(-6, 6, num_columns)
        seconds = draw.uniform(0.1, 5, len(rows))
        fit = non_negative_fit(rows.tolist(), seconds.tolist())
        scaled = rows / seconds[:, None]
        scaled = scaled / np.linalg.norm(scaled, axis=0)
        best = float(len(rows))
        for size in range(1, num_columns + 1):
            for columns in itertools.combinations(range(num_columns), size):
                solution, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(len(rows)), rcond=None)
                if (solution >= 0).all():
                    best = min(best, float(np.sum((scaled[:, columns] @ solution - 1) ** 2)))
        assert min(fit) >= 0
        assert np.sum((rows @ fit / seconds - 1) ** 2) == pytest.approx(best, abs=1e-9)


def true_prices(kind, degree):
    """Prices of evenly shared work, plus communication and launches."""
    shared = (1.7e-7 if kind is not AttentionKind.RING else 1.9e-7) / degree
    return (shared, 2.2e-4 / degree + (1.5e-5 if degree > 1 else 0.0), 1.5e-3, 0.02 + 0.015 * degree)


SHAPES = (
    (AttentionKind.LOCAL, 1), (AttentionKind.ULYSSES, 2), (AttentionKind.ULYSSES, 4), (AttentionKind.RING, 2),
    (AttentionKind.RING, 4),
)


def noisy_samples(draw, noise):
    return [
        GroupSample(
            kind=kind, degree=degree, lengths=lengths,
            seconds=sample(kind, degree, lengths, true_prices(kind, degree)).seconds * np.exp(draw.normal(0, noise)),
        )
        for kind, degree in SHAPES
        for lengths in ((64,) * degree, (256,) * degree, (1024,), (64,) * (6 * degree), (16,) * (12 * degree))
    ]


def test_attention_costs_the_same_whatever_the_degree():
    fits, _ = fit_group_times(noisy_samples(np.random.default_rng(5), 0.1))
    whole = {(fit.kind, fit.degree): fit.s_per_token2 * fit.degree for fit in fits}
    local = whole[AttentionKind.LOCAL, 1]
    assert whole[AttentionKind.ULYSSES, 2] == pytest.approx(local) == whole[AttentionKind.ULYSSES, 4]
    assert whole[AttentionKind.RING, 2] == pytest.approx(whole[AttentionKind.RING, 4]) != pytest.approx(local)


def test_no_shape_is_cheaper_than_its_share_of_the_work():
    """Whatever the noise: ranks share attention and token-wise layers, and what they do together comes on top."""
    for seed in range(20):
        fits, _ = fit_group_times(noisy_samples(np.random.default_rng(seed), 0.3))
        local = fits[0]
        for fit in fits[1:]:
            assert fit.s_per_token * fit.degree >= local.s_per_token * (1 - 1e-12)
            assert fit.s_per_sequence >= local.s_per_sequence and fit.fixed_s >= local.fixed_s


def errors_of_fits(seed, noise, num_hit):
    """Fit 40 sets of noisy samples, in each of which ``num_hit`` samples are 2.5 times too slow. Returns the fits'
    errors at two length sets of each shape, relative to the expected time of a noisy step."""
    draw, errors = np.random.default_rng(seed), []
    for _ in range(40):
        samples = noisy_samples(draw, noise)
        for place in draw.choice(len(samples), num_hit, replace=False):
            samples[place] = dataclasses.replace(samples[place], seconds=2.5 * samples[place].seconds)
        for fit in fit_group_times(samples)[0]:
            for lengths in ((1024,) * fit.degree, (100,) * (8 * fit.degree)):
                true = sample(fit.kind, fit.degree, lengths, true_prices(fit.kind, fit.degree)).seconds
                tokens, tokens2 = sum(lengths), sum(size * size for size in lengths)
                ours = fit.group_s(num_tokens=tokens, num_tokens2=tokens2, num_sequences=len(lengths))
                errors.append(ours / (true * np.exp(noise**2 / 2)) - 1)
    return errors


def test_noise_does_not_make_everything_look_cheap():
    """Least squares relative to the samples are 5 % too low here."""
    assert abs(np.mean(errors_of_fits(4, 0.25, 0))) < 0.04


def test_samples_that_met_something_else_weigh_little():
    """Two of 25; least squares are 9 % off in the mean then."""
    assert np.mean(np.abs(errors_of_fits(4, 0.03, 2))) < 0.07


def test_noise_makes_fewer_shapes_look_cheap_than_fits_one_by_one():
    """What hurts is the shape a planner would pick: the one that noise made cheapest for the longest sequences."""
    draw = np.random.default_rng(1)
    errors = {"joint": [], "apart": []}
    for _ in range(60):
        samples = noisy_samples(draw, 0.1)
        apart = [
            fit_group_times([each for each in samples if (each.kind, each.degree) == shape])[0][0] for shape in SHAPES
        ]
        for name, fits in (("joint", fit_group_times(samples)[0]), ("apart", apart)):
            prices = {
                (fit.kind, fit.degree): fit.group_s(
                    num_tokens=2048 * fit.degree, num_tokens2=2048**2 * fit.degree, num_sequences=fit.degree
                )
                for fit in fits
            }
            picked = min(prices, key=prices.get)
            true_s = sample(*picked, (2048,) * picked[1], true_prices(*picked)).seconds
            errors[name].append(prices[picked] / true_s - 1)
    assert abs(np.mean(errors["joint"])) < 0.7 * abs(np.mean(errors["apart"]))
    assert np.mean(np.abs(errors["joint"])) < 0.8 * np.mean(np.abs(errors["apart"]))


def test_best_rate():
    samples = [SizeSample(op="linear", degree=1, size=n, work=n * 10.0, seconds=1.0) for n in (1, 5, 3)]
    assert best_rate(samples, "linear") == 50.0
    assert best_rate(samples, "p2p") == 0.0
