"""A histogram of document lengths in plain text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def length_histogram(lengths: npt.NDArray[np.integer], *, width: int = 40) -> list[str]:
    """One line per power of two (lower end included, K = 1024): number of samples, share of all tokens, a bar.

    ``lengths``: tokens per sample, each at least 1. ``width``: characters of the longest bar.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return ["no samples"]
    bins = np.frexp(sizes.astype(np.float64))[1] - 1  # floor(log2), exact
    counts = np.bincount(bins)
    tokens = np.bincount(bins, weights=sizes.astype(np.float64))
    lowest = int(bins.min())
    labels = [f"{_power_of_two(power)} - {_power_of_two(power + 1)}" for power in range(len(counts))]
    label_width = max(len("length"), *map(len, labels))
    lines = [f"{'length':>{label_width}}  {'samples':>9}  {'tokens':>8}"]
    for power in range(lowest, len(counts)):
        bar = "#" * int(np.ceil(width * counts[power] / counts.max()))
        share = 100 * tokens[power] / tokens.sum()
        lines.append(f"{labels[power]:>{label_width}}  {counts[power]:>9,}  {share:>7.1f}%  {bar}".rstrip())
    median, p99 = (int(value) for value in np.percentile(sizes, (50, 99)))
    lines.append(f"samples {len(sizes):,}, tokens {int(sizes.sum()):,}, median {median:,}, p99 {p99:,}, "
                 f"longest {int(sizes.max()):,}")
    return lines


def _power_of_two(power: int) -> str:
    """256, 4K, 2M: token counts by powers of two, exact."""
    scale = min(power // 10, 4)
    return f"{2 ** (power - 10 * scale)}{('', 'K', 'M', 'G', 'T')[scale]}"
