"""What the ranks of one attention group compute and send in each round, as arrays: ``planner.schedule`` without the
objects, so that a ring of a thousand ranks (a million rounds) takes milliseconds. A test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.layout import local_token_counts
from planner.plan import AttentionGroup, AttentionKind

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """Kernel work of a group. Arrays ``[rank, owner]``: the queries of the rank at that group index over the keys of
    the rank at index ``owner``; a group without rounds has one column.

    ``queries`` and ``keys``: tokens summed over the spans of all tasks (a span in two tasks counts twice). ``pairs``:
    (query, key) pairs computed. ``calls``: kernel launches. ``merged``: query tokens whose partial result is merged
    into an earlier one.
    """

    calls: FloatArray
    queries: FloatArray
    keys: FloatArray
    pairs: FloatArray
    merged: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSplit:
    """Heads of each member of a ulysses group, by group index. ``width``: in a row of q, k and v together."""

    queries: FloatArray
    width: FloatArray


def group_tokens(group: AttentionGroup, lengths: SequenceOf[int]) -> tuple[int, ...]:
    """Tokens each rank of the group holds, by group index."""
    sizes = [lengths[index] for index in group.sequences]
    return local_token_counts(group.kind, group.degree, sizes, group.inner_degree)


def attention_work(group: AttentionGroup, lengths: SequenceOf[int]) -> AttentionWork:
    """The tasks of ``write_schedule``, added up for each rank and each owner of keys."""
    sizes = np.array([lengths[index] for index in group.sequences], dtype=np.int64)
    if group.kind is AttentionKind.RING:
        return _ring_work(*_zigzag_chunks(sizes, group.degree))
    total, pairs = float(sizes.sum()), float((sizes * (sizes + 1) // 2).sum())
    one = np.ones((group.degree, 1))
    return AttentionWork(calls=one, queries=total * one, keys=total * one, pairs=pairs * one, merged=0.0 * one)


def _zigzag_chunks(sizes: IntArray, degree: int) -> tuple[FloatArray, FloatArray]:
    """Early and late chunk of every sequence on every rank, ``[sequence, rank]`` tokens. Two chunks with nothing
    between them are one span, as the layout has it: it counts as early, the late one is empty."""
    edges = sizes[:, None] * np.arange(2 * degree + 1, dtype=np.int64) // (2 * degree)
    chunks = np.diff(edges, axis=1)
    early, late = chunks[:, :degree], chunks[:, :degree - 1:-1]
    touching = edges[:, 1 : degree + 1] == edges[:, 2 * degree - 1 : degree - 1 : -1]
    whole = np.where(touching, early + late, early)
    return whole.astype(np.float64), np.where(touching, 0, late).astype(np.float64)


def _ring_work(early: FloatArray, late: FloatArray) -> AttentionWork:
    """Rank r meets the keys of rank s. Behind it (s < r) only s's early chunk lies before r's chunks; ahead of it
    (s > r) both of s's chunks lie before r's late chunk."""
    degree = early.shape[1]
    has_early, has_late = (early > 0).astype(np.float64), (late > 0).astype(np.float64)
    both, has = early + late, has_early + has_late
    own_pairs = (early * (early + 1) + late * (late + 1)) / 2 + early * late

    def choose(behind: FloatArray, ahead: FloatArray, own: FloatArray) -> FloatArray:
        return np.asarray(np.tril(behind, -1) + np.triu(ahead, 1) + np.diag(own.sum(axis=0)), dtype=np.float64)

    pairs = choose(both.T @ early, late.T @ both, own_pairs)
    queries = choose(both.T @ has_early, late.T @ has, both + late * has_early)
    keys = choose(has.T @ early, has_late.T @ both, both + early * has_late)
    full = (early * late).sum(axis=0) > 0
    calls = (pairs > 0).astype(np.float64) + np.diag(full.astype(np.float64))
    merged = queries - np.diag(both.sum(axis=0))
    return AttentionWork(calls=calls, queries=queries, keys=keys, pairs=pairs, merged=merged.reshape(degree, degree))


def split_heads(num_query_heads: int, num_kv_heads: int, degree: int) -> HeadSplit:
    """As ``parallel.heads`` splits them: contiguous, uneven where the degree does not divide them, and every KV head to
    the ranks whose query heads read it."""
    edges = num_query_heads * np.arange(degree + 1, dtype=np.int64) // degree
    first, stop = edges[:-1], edges[1:]
    ratio = num_query_heads // num_kv_heads
    kv = np.maximum(0, (stop - 1) // ratio + 1 - first // ratio)
    queries = (stop - first).astype(np.float64)
    return HeadSplit(queries=queries, width=queries + 2 * np.where(queries > 0, kv, 0))
