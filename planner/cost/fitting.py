"""Fit the coefficients of a cost model to measured samples: non-negative, with their residuals."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.cost.fits import TimeFit
from planner.plan import AttentionKind

_NUM_OWN = 3
"""Prices beside s_per_token2: per token, per sequence, fixed."""
_NUM_REWEIGHTINGS = 4
_HUBER = 2.0
"""Errors above this multiple of the median error count as outliers (1.35 standard deviations of a normal)."""
_MIN_ERROR = 0.01
"""Relative error below which no sample is an outlier, however small the median error is."""
_MIN_FITTED_SHARE = 0.1
"""Lower bound of fitted over measured seconds when weights are computed: a fit of 0 would get an infinite weight."""
_MAX_FREED = 3
"""How often, per coefficient, the active-set method may free one before it stops: rounding can make it cycle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSample:
    """Measured seconds of one microbatch (forward plus backward) of one group over sequences of these lengths."""

    kind: AttentionKind
    degree: int
    lengths: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeSample:
    """Measured seconds of one operation at one size. ``op``: linear, attention, all_to_all or p2p.

    ``size``: tokens for linear and attention, bytes sent per rank for the others. ``work``: FLOPs or bytes.
    """

    op: str
    degree: int
    size: int
    work: float
    seconds: float


def fit_group_times(samples: SequenceOf[GroupSample]) -> tuple[tuple[TimeFit, ...], tuple[float, ...]]:
    """One TimeFit per (kind, degree) in the samples, and the relative error of every sample, in their order.

    Coefficients are non-negative, so that no sequence has a negative price, and relative errors are minimised, so that
    short microbatches count as much as long ones (see ``_robust_fit``). Work that shapes have in common gets one
    coefficient, fitted jointly; what a shape costs beyond that is its own coefficient of at least 0:

    - ``s_per_token2``: a group's ranks share its attention evenly, so it is a common number over the degree. Local and
      ulysses share the number (same kernel on whole sequences, fewer heads); every other kind, which cuts sequences,
      has its own.
    - ``s_per_token``: the token-wise layers, one number of all shapes over the degree, plus the shape's messages.
    - ``s_per_sequence`` and ``fixed_s``: what a rank alone pays, plus the shape's messages and kernel calls.

    If every shape were fitted by itself, a few noisy samples would make some shape look cheaper than its work, and the
    planner would choose just that shape again and again.
    """
    shapes = tuple(dict.fromkeys((sample.kind, sample.degree) for sample in samples))
    kernels = tuple(dict.fromkeys(_kernel(kind) for kind, _ in shapes))
    num_common = len(kernels) + _NUM_OWN
    rows = []
    for sample in samples:
        place, share = shapes.index((sample.kind, sample.degree)), 1 / sample.degree
        token2, token, count, fixed = group_features(sample.lengths)
        row = [0.0] * (num_common + _NUM_OWN * len(shapes))
        row[kernels.index(_kernel(sample.kind))] = token2 * share
        row[len(kernels) : num_common] = token * share, count, fixed
        if sample.degree > 1:
            first = num_common + _NUM_OWN * place
            row[first : first + _NUM_OWN] = token, count, fixed
        rows.append(row)
    seconds = [sample.seconds for sample in samples]
    prices = _robust_fit(rows, seconds)
    fits = []
    for place, (kind, degree) in enumerate(shapes):
        first = num_common + _NUM_OWN * place
        common, own = prices[len(kernels) : num_common], prices[first : first + _NUM_OWN]
        fits.append(TimeFit(
            kind=kind, degree=degree, s_per_token2=prices[kernels.index(_kernel(kind))] / degree,
            s_per_token=common[0] / degree + own[0], s_per_sequence=common[1] + own[1], fixed_s=common[2] + own[2],
        ))
    predicted = [sum(price * amount for price, amount in zip(prices, row, strict=True)) for row in rows]
    return tuple(fits), tuple(ours / true - 1 for ours, true in zip(predicted, seconds, strict=True))


def _kernel(kind: AttentionKind) -> AttentionKind:
    """The kind whose attention price this kind shares: both run the kernel on the same shapes."""
    return AttentionKind.LOCAL if kind is AttentionKind.ULYSSES else kind


def _robust_fit(rows: SequenceOf[SequenceOf[float]], seconds: SequenceOf[float]) -> tuple[float, ...]:
    """Coefficients c >= 0 with small relative errors, by iteratively reweighted least squares.

    An error is taken relative to the geometric mean of fitted and measured seconds. Relative to the measured ones
    alone, a sample that was too quick by chance would weigh more than one that was too slow by the same factor, and all
    prices would come out too low. Outliers count linearly, not squared (Huber, Annals of Mathematical Statistics 35,
    1964): something disturbed those samples that is no property of their microbatch.
    """
    matrix, target = np.asarray(rows, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    prices = non_negative_fit(rows, seconds)
    for _ in range(_NUM_REWEIGHTINGS):
        fitted = np.maximum(matrix @ np.asarray(prices), _MIN_FITTED_SHARE * target)
        errors = np.abs(np.log(fitted / target))
        usual = max(_HUBER * float(np.median(errors)), _MIN_ERROR)
        scales = np.sqrt(fitted * target * np.maximum(1.0, errors / usual))
        prices = non_negative_fit(rows, seconds, scales=scales.tolist())
    return prices


def group_features(lengths: SequenceOf[int]) -> tuple[float, float, float, float]:
    """What the four prices of a TimeFit are multiplied with: sum of squared lengths, sum of lengths, count and 1."""
    return (float(sum(size * size for size in lengths)), float(sum(lengths)), float(len(lengths)), 1.0)


def non_negative_fit(
    rows: SequenceOf[SequenceOf[float]], seconds: SequenceOf[float], *, scales: SequenceOf[float] | None = None
) -> tuple[float, ...]:
    """Coefficients c >= 0 minimising sum(((row . c) - s)^2 / scale^2); ``scales`` default to ``seconds``.

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23). It is exact and
    deterministic, also where there are several optima.
    """
    scale = np.asarray(seconds if scales is None else scales, dtype=np.float64)
    target = np.asarray(seconds, dtype=np.float64) / scale
    scaled = np.asarray(rows, dtype=np.float64) / scale[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    scaled = scaled / norms
    num_columns = scaled.shape[1]
    tolerance = 1e-12 * max(1.0, float(np.linalg.norm(target)))
    best, free = np.zeros(num_columns), np.zeros(num_columns, dtype=bool)
    for _ in range(_MAX_FREED * num_columns):
        slope = scaled.T @ (target - scaled @ best)
        slope[free] = 0.0
        if slope.max(initial=0.0) <= tolerance:
            break
        free[int(slope.argmax())] = True
        while free.any():
            wanted = np.zeros(num_columns)
            wanted[free], *_ = np.linalg.lstsq(scaled[:, free], target, rcond=None)
            below = free & (wanted <= 0)
            if not below.any():
                best = wanted
                break
            # Go towards the wanted point until the first coefficient reaches zero, which then leaves the free set.
            steps = best[below] / np.maximum(best[below] - wanted[below], np.finfo(np.float64).tiny)
            best = best + float(steps.min()) * (wanted - best)
            free &= best > tolerance
            best[~free] = 0.0
    return tuple(float(value) for value in best / norms)


def best_rate(samples: SequenceOf[SizeSample], op: str) -> float:
    """The highest work per second measured for ``op`` (FLOP/s or bytes/s); 0 without samples."""
    return max((sample.work / sample.seconds for sample in samples if sample.op == op), default=0.0)
