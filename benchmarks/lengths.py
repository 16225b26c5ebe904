"""Random sequence lengths with the long tail of real documents: most are short, a few are as long as allowed."""

from __future__ import annotations

import numpy as np

_MEDIAN_SHARE = 32
_SIGMA = 1.5


def skewed_batches(
    *, num_batches: int, tokens_per_batch: int, max_length: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Batches of lengths (tokens) drawn from one log-normal of median ``max_length / 32`` and sigma 1.5. About one in a
    hundred reaches ``max_length``, where it is cut off. A batch ends before it would exceed ``tokens_per_batch``.

    The same arguments give the same lengths. ``tokens_per_batch`` must be at least ``max_length``.
    """
    rng = np.random.default_rng(seed)
    return tuple(_batch(rng, tokens_per_batch, max_length) for _ in range(num_batches))


def _batch(rng: np.random.Generator, tokens_per_batch: int, max_length: int) -> tuple[int, ...]:
    lengths: list[int] = []
    left = tokens_per_batch
    while True:
        drawn = int(rng.lognormal(np.log(max_length / _MEDIAN_SHARE), _SIGMA))
        length = min(max(drawn, 1), max_length)
        if length > left:
            return tuple(lengths)
        lengths.append(length)
        left -= length
