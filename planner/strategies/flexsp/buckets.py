"""FlexSP's buckets (arXiv 2412.01523, eq. 15-16): sequences of like length count with the length of the longest.

Dynamic programming finds the way to cut the sorted lengths into ``num_buckets`` runs that adds the fewest tokens. With
no more distinct lengths than buckets nothing is added, and the program over buckets is exact.
"""

from __future__ import annotations

import numpy as np

from planner.strategies.search.shapes import IntArray


def bucket_rows(lengths: IntArray, num_buckets: int) -> tuple[IntArray, ...]:
    """The rows (places in ``lengths``) of each bucket, longest bucket first, and in it longest first, then by place.
    Takes O(num_buckets * K^2) for K distinct lengths."""
    distinct, bucket_of_row, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    starts = _best_cuts(distinct, counts, min(num_buckets, len(distinct)))
    bucket_of_length = np.searchsorted(starts, np.arange(len(distinct)), side="right") - 1
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    bucket_in_order = bucket_of_length[bucket_of_row[order]]
    return tuple(order[bucket_in_order == bucket] for bucket in range(len(starts) - 1, -1, -1))


def _best_cuts(distinct: IntArray, counts: IntArray, num_buckets: int) -> IntArray:
    """Where each bucket starts in the ascending distinct lengths.

    ``added[j, i]``: tokens added where lengths j .. i are one bucket."""
    num_lengths = len(distinct)
    members = np.concatenate(([0], np.cumsum(counts)))
    tokens = np.concatenate(([0], np.cumsum(counts * distinct)))
    added = (members[None, 1:] - members[:-1, None]) * distinct[None, :] - (tokens[None, 1:] - tokens[:-1, None])
    never = np.iinfo(np.int64).max // 4
    added[np.tril_indices(num_lengths, -1)] = never
    best, choices = added[0], []
    for _ in range(num_buckets - 1):
        totals = added + np.concatenate(([never], best[:-1]))[:, None]
        choice = np.argmin(totals, axis=0)
        best = totals[choice, np.arange(num_lengths)]
        choices.append(choice)
    starts, stop = [], num_lengths
    for choice in reversed(choices):
        starts.append(int(choice[stop - 1]))
        stop = starts[-1]
    return np.array([0, *reversed(starts)], dtype=np.int64)
