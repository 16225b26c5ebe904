"""Samples in, coefficients out: non-negative fits with their residuals, numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from planner.cost import TimeFit
from planner.plan import AttentionKind


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

    Least squares of the relative error with non-negative coefficients: a millisecond counts the same share of a short
    microbatch as a second of a long one, and no sequence may have a negative price.
    """
    fits: dict[tuple[AttentionKind, int], TimeFit] = {}
    for kind, degree in dict.fromkeys((sample.kind, sample.degree) for sample in samples):
        chosen = [sample for sample in samples if (sample.kind, sample.degree) == (kind, degree)]
        rows = [_features(sample.lengths) for sample in chosen]
        quad, linear, count, fixed = non_negative_fit(rows, [sample.seconds for sample in chosen])
        fits[kind, degree] = TimeFit(
            kind=kind, degree=degree, s_per_token2=quad, s_per_token=linear, s_per_sequence=count, fixed_s=fixed
        )
    errors = tuple(
        fits[sample.kind, sample.degree].group_s(
            num_tokens=sum(sample.lengths),
            num_tokens2=sum(size * size for size in sample.lengths),
            num_sequences=len(sample.lengths),
        )
        / sample.seconds
        - 1
        for sample in samples
    )
    return tuple(fits.values()), errors


def _features(lengths: SequenceOf[int]) -> tuple[float, float, float, float]:
    return (float(sum(size * size for size in lengths)), float(sum(lengths)), float(len(lengths)), 1.0)


def non_negative_fit(rows: SequenceOf[SequenceOf[float]], seconds: SequenceOf[float]) -> tuple[float, ...]:
    """Coefficients c >= 0 minimising sum(((row . c) - s)^2 / s^2), exactly: every subset of the (few) columns is
    solved without the sign constraint and the best feasible one wins (the optimum lies on one of these faces)."""
    target = np.asarray(seconds, dtype=np.float64)
    scaled = np.asarray(rows, dtype=np.float64) / target[:, None]
    column_norms = np.linalg.norm(scaled, axis=0)
    scaled = scaled / np.where(column_norms > 0, column_norms, 1.0)
    ones = np.ones_like(target)
    num_columns = scaled.shape[1]
    best, best_error = np.zeros(num_columns), float(ones @ ones)
    for size in range(1, num_columns + 1):
        for columns in itertools.combinations(range(num_columns), size):
            solution, *_ = np.linalg.lstsq(scaled[:, columns], ones, rcond=None)
            error = float(np.sum((scaled[:, columns] @ solution - ones) ** 2))
            if (solution >= 0).all() and error < best_error - 1e-12:
                best = np.zeros(num_columns)
                best[list(columns)] = solution
                best_error = error
    return tuple(float(value) for value in best / np.where(column_norms > 0, column_norms, 1.0))


def best_rate(samples: SequenceOf[SizeSample], op: str) -> float:
    """The highest work per second seen for ``op`` (FLOP/s or bytes/s); 0 without samples."""
    return max((sample.work / sample.seconds for sample in samples if sample.op == op), default=0.0)
