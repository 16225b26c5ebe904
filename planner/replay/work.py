"""What the members of an attention group compute and hold, and how they split heads, as arrays. The same as
``planner.schedules.exchange`` without objects, so that a ring of a thousand ranks (a million rounds) takes
milliseconds. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.plan import AttentionGroup
from planner.schedules.layout import local_token_counts

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """Kernel work as arrays of the same shape, mostly ``[round, member]``.

    ``queries`` and ``keys``: tokens summed over the spans of all tasks (a span in two tasks counts twice). ``pairs``:
    (query, key) pairs computed. ``calls``: kernel launches: one for the triangles, one for the rest of the own keys,
    one for the keys of each message. ``merged``: query tokens whose partial result is merged into an earlier one.
    """

    calls: FloatArray
    queries: FloatArray
    keys: FloatArray
    pairs: FloatArray
    merged: FloatArray

    def each(self, change: Callable[[FloatArray], FloatArray]) -> AttentionWork:
        """Apply the same change to all arrays."""
        return AttentionWork(
            calls=change(self.calls), queries=change(self.queries), keys=change(self.keys), pairs=change(self.pairs),
            merged=change(self.merged),
        )


def side_by_side(works: SequenceOf[AttentionWork]) -> AttentionWork:
    """Members of several groups in one array, group after group."""
    return AttentionWork(
        calls=np.concatenate([work.calls for work in works], axis=1),
        queries=np.concatenate([work.queries for work in works], axis=1),
        keys=np.concatenate([work.keys for work in works], axis=1),
        pairs=np.concatenate([work.pairs for work in works], axis=1),
        merged=np.concatenate([work.merged for work in works], axis=1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSplit:
    """Heads of each member of a team, by its place. ``width``: heads per row of q, k and v together."""

    queries: FloatArray
    width: FloatArray

    @property
    def kv(self) -> FloatArray:
        """KV heads that the query heads of each member read."""
        return (self.width - self.queries) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A group's tokens by team. ``tokens[t]``: tokens of team t. ``work[t, s]``: its queries over the keys of team s.
    ``needed[t, s]``: tokens of team s that at least one query of team t reads."""

    tokens: FloatArray
    work: AttentionWork
    needed: FloatArray


def group_tokens(group: AttentionGroup, lengths: SequenceOf[int]) -> tuple[int, ...]:
    """Tokens of each rank of the group, by group index."""
    sizes = [lengths[index] for index in group.sequences]
    return local_token_counts(group.kind, group.degree, sizes, group.inner_degree)


def whole_work(sizes: IntArray) -> AttentionWork:
    """Work of sequences of these lengths, each in one piece, in one call: ``[1, 1]``."""
    one, total, pairs = np.ones((1, 1)), float(sizes.sum()), float((sizes * (sizes + 1) // 2).sum())
    return AttentionWork(calls=one, queries=total * one, keys=total * one, pairs=pairs * one, merged=0.0 * one)


def zigzag_blocks(sizes: IntArray, num_teams: int) -> Blocks:
    """Sequences of these lengths, distributed over the teams as in ``planner.schedules.layout``."""
    if num_teams == 1:
        total = np.array([float(sizes.sum())])
        return Blocks(tokens=total, work=whole_work(sizes), needed=total[:, None])
    early, late = _zigzag_chunks(sizes, num_teams)
    both = early + late
    has, has_late = (both > 0).astype(np.float64), (late > 0).astype(np.float64)
    needed = np.tril(has.T @ early, -1) + np.triu(has_late.T @ both, 1) + np.diag(both.sum(axis=0))
    return Blocks(tokens=both.sum(axis=0), work=_zigzag_work(early, late), needed=needed)


def _zigzag_chunks(sizes: IntArray, degree: int) -> tuple[FloatArray, FloatArray]:
    """Early and late chunk of every sequence on every rank, ``[sequence, rank]`` tokens. Two adjacent chunks are one
    span in the layout: it counts as the early chunk, and the late one is empty."""
    edges = sizes[:, None] * np.arange(2 * degree + 1, dtype=np.int64) // (2 * degree)
    chunks = np.diff(edges, axis=1)
    early, late = chunks[:, :degree], chunks[:, :degree - 1:-1]
    touching = edges[:, 1 : degree + 1] == edges[:, 2 * degree - 1 : degree - 1 : -1]
    whole = np.where(touching, early + late, early)
    return whole.astype(np.float64), np.where(touching, 0, late).astype(np.float64)


def _zigzag_work(early: FloatArray, late: FloatArray) -> AttentionWork:
    """Work of team r on the keys of team s, ``[r, s]``. If s < r, only s's early chunk comes before r's chunks; if s >
    r, both of s's chunks come before r's late chunk."""
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
    """Heads as ``parallel.heads`` splits them: contiguous, uneven if the degree does not divide them, and every KV head
    on the ranks whose query heads read it."""
    edges = num_query_heads * np.arange(degree + 1, dtype=np.int64) // degree
    first, stop = edges[:-1], edges[1:]
    ratio = num_query_heads // num_kv_heads
    kv = np.maximum(0, (stop - 1) // ratio + 1 - first // ratio)
    queries = (stop - first).astype(np.float64)
    return HeadSplit(queries=queries, width=queries + 2 * np.where(queries > 0, kv, 0))
