"""Samples in, coefficients out: non-negative fits with their residuals, numpy only."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.cost.fits import TimeFit
from planner.plan import AttentionKind

_NUM_OWN = 3
"""Prices beside s_per_token2: for a token, for a sequence, fixed."""
_NUM_WEIGHINGS = 4
_HUBER = 2.0
"""Times the median error: what is above it counts as out of the ordinary (1.35 standard deviations of a normal)."""
_LEAST_ERROR = 0.01
_LEAST_SHARE = 0.1
"""Of a sample that its fit may be taken for, where it divides: a price of 0 must not weigh without end."""
_MOST_TURNS = 3
"""Times each coefficient may be freed before the fit is taken as it is: rounding alone can make it go round."""


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
    """One TimeFit per (kind, degree) in the samples, and the relative error of every sample, in order.

    Non-negative coefficients, so that no sequence has a negative price, with the least relative errors: a millisecond
    counts the same share of a short microbatch as a second of a long one. See ``_robust_fit``.

    What is the same work is one number, fitted jointly, and what a shape pays on top is its own and at least 0:

    - ``s_per_token2``: the attention of a group is shared evenly by its ranks: one number over the degree. Local and
      ulysses have it in common (the same kernel on whole sequences, fewer heads), every other kind has its own (it cuts
      sequences).
    - ``s_per_token``: the token-wise layers, shared evenly: one number of all shapes over the degree; and the messages.
    - ``s_per_sequence`` and ``fixed_s``: what a rank alone pays; and messages and kernel calls beyond that.

    Fitted one by one, a handful of noisy samples makes some shape look cheaper than its work, and a planner picks just
    that one, again and again.
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
    """Kinds that run attention on the same shapes share its price."""
    return AttentionKind.LOCAL if kind is AttentionKind.ULYSSES else kind


def _robust_fit(rows: SequenceOf[SequenceOf[float]], seconds: SequenceOf[float]) -> tuple[float, ...]:
    """Coefficients c >= 0 with small relative errors: least squares weighed anew a few times.

    An error counts relative to the geometric mean of fit and sample. Relative to the samples alone, one that came out
    too quick by chance would weigh more than one as much too slow, and all prices would be too low. Errors far above
    the usual one count in proportion, not squared (Huber, Annals of Mathematical Statistics 35, 1964): those samples
    met something that is no property of their microbatch.
    """
    matrix, target = np.asarray(rows, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    prices = non_negative_fit(rows, seconds)
    for _ in range(_NUM_WEIGHINGS):
        fitted = np.maximum(matrix @ np.asarray(prices), _LEAST_SHARE * target)
        errors = np.abs(np.log(fitted / target))
        usual = max(_HUBER * float(np.median(errors)), _LEAST_ERROR)
        scales = np.sqrt(fitted * target * np.maximum(1.0, errors / usual))
        prices = non_negative_fit(rows, seconds, scales=scales.tolist())
    return prices


def group_features(lengths: SequenceOf[int]) -> tuple[float, float, float, float]:
    """What the four prices of a TimeFit multiply: sum of squared lengths, sum, count and one."""
    return (float(sum(size * size for size in lengths)), float(sum(lengths)), float(len(lengths)), 1.0)


def non_negative_fit(
    rows: SequenceOf[SequenceOf[float]], seconds: SequenceOf[float], *, scales: SequenceOf[float] | None = None
) -> tuple[float, ...]:
    """Coefficients c >= 0 minimising sum(((row . c) - s)^2 / scale^2); ``scales`` default to ``seconds``.

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23): exact, and where the
    rows leave several optima, always the same one.
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
    for _ in range(_MOST_TURNS * num_columns):
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
            # as far towards the wanted point as every coefficient allows; the first to reach zero stays there
            steps = best[below] / np.maximum(best[below] - wanted[below], np.finfo(np.float64).tiny)
            best = best + float(steps.min()) * (wanted - best)
            free &= best > tolerance
            best[~free] = 0.0
    return tuple(float(value) for value in best / norms)


def best_rate(samples: SequenceOf[SizeSample], op: str) -> float:
    """The highest work per second seen for ``op`` (FLOP/s or bytes/s); 0 without samples."""
    return max((sample.work / sample.seconds for sample in samples if sample.op == op), default=0.0)
