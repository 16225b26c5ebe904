"""Chunk by chunk training as shapes to search over: a few sizes of chunks for each kind and degree.

A rank that runs a microbatch in chunks of C tokens holds one chunk's activations and, for each of its tokens, K/V and
their gradients. So such a shape has the room that the chunk leaves, and of its sequences' loads only the share of K/V
counts: the longer a sequence is, the more that frees. It takes another forward and something for each chunk; so small
chunks, which leave more room, are dearer. No size is searched that another shape of its kind and degree beats in all.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import MemoryAction, MemoryPolicy
from planner.strategies.search.shapes import (
    UNLIMITED_TOKENS,
    BoolArray,
    GroupShape,
    HeldShare,
    IntArray,
    group_tokens,
    price_table,
)

CHUNK_PARTS = (2, 4, 8, 32)
"""A chunk is the whole of what a device can keep over one of these."""
MOST_SHARE = 0.9
"""Of a token's bytes: where K/V and their gradients take more, chunks free next to nothing."""


def in_chunks(chunk_tokens: int) -> MemoryPolicy:
    """The policy."""
    return MemoryPolicy(chunk_tokens=chunk_tokens)


def chunk_sizes(cost: CostModel, limits: PlanLimits) -> tuple[int, ...]:
    """Tokens of a rank in a chunk that are searched, the largest first; none where chunks are not allowed or priced."""
    fit = cost.chunks
    if fit is None or not limits.allows(MemoryAction.CHUNK) or min(fit.bytes_per_token, cost.token_bytes()) <= 0:
        return ()
    if limits.device_budget_bytes < cost.memory.update_bytes:
        return ()
    spare_bytes = limits.device_budget_bytes - cost.memory.fixed_bytes - fit.fixed_bytes
    most = int(spare_bytes / fit.bytes_per_token)
    return tuple(dict.fromkeys(most // part for part in CHUNK_PARTS if most // part > 0))


def chunked_shape(
    shape: GroupShape, chunk_tokens: int, cost: CostModel, limits: PlanLimits
) -> GroupShape | None:
    """This shape (of kept activations) in chunks; None where a chunk leaves no room, or K/V take as much as all."""
    fit, token_bytes = cost.chunks, cost.token_bytes()
    assert fit is not None
    share = fit.kept_bytes_per_token(shape.kind, shape.degree) / token_bytes
    chunk_bytes = fit.chunk_bytes(shape.kind, shape.degree, chunk_tokens)
    spare_bytes = limits.device_budget_bytes - cost.memory.fixed_bytes - chunk_bytes
    rank_tokens = int(spare_bytes / token_bytes) - 1  # the fullest rank of a group may hold one more than its share
    if share > MOST_SHARE or rank_tokens < 1:
        return None
    team = shape.degree // shape.num_teams
    return GroupShape(
        fit=fit.time_fit(shape.fit, chunk_tokens), capacity_tokens=min(rank_tokens * team, UNLIMITED_TOKENS),
        num_teams=shape.num_teams, held=HeldShare(at_zero=share, per_token=0.0, least=share),
        chunk_tokens=chunk_tokens,
    )


def chunked_shapes(
    kept: SequenceOf[GroupShape], cost: CostModel, limits: PlanLimits
) -> tuple[GroupShape, ...]:
    """These shapes (of kept activations) in chunks of every size that is searched."""
    found = (chunked_shape(shape, size, cost, limits) for size in chunk_sizes(cost, limits) for shape in kept)
    return tuple(shape for shape in found if shape is not None)


def chunks_worth_it(
    lengths: SequenceOf[int], kept: SequenceOf[GroupShape], rivals: SequenceOf[GroupShape], cost: CostModel,
    limits: PlanLimits,
) -> tuple[GroupShape, ...]:
    """``chunked_shapes`` without those that no plan gains by, so a bound over all shapes stays the same.

    ``rivals``: the shapes that run whole, the first of which holds in full whatever fits its capacity. One of the same
    kind and degree, or larger chunks, that takes every sequence that fits here is charged no more for any, however
    fixed times are shared out, where it is no dearer per token, both without memory's share of its fixed time and with
    the most of that against the least here (``planner.strategies.search.bounds``).
    """
    sizes = chunk_sizes(cost, limits)
    if not sizes:
        return ()
    longer = np.unique(np.array([size for size in lengths if size > rivals[0].capacity_tokens], dtype=np.int64))
    short = max((size for size in lengths if size <= rivals[0].capacity_tokens), default=0)
    by_place: dict[tuple[str, int], list[_Rival]] = {}
    for shape, fits in zip(rivals, _fits(longer, rivals), strict=True):
        by_place.setdefault((shape.kind, shape.degree), []).append(_Rival(shape, fits, short))
    assert cost.chunks is not None
    found: list[GroupShape] = []
    for shape in kept:
        known = by_place.get((shape.kind, shape.degree), [])
        least_s = cost.chunks.least_s_per_token(shape.fit)
        if any(rival.takes_all and rival.most_s_per_token <= least_s for rival in known):
            continue  # nearly always: no chunk of any size could be cheaper
        shapes = [chunk for size in sizes if (chunk := chunked_shape(shape, size, cost, limits)) is not None]
        for chunk, fits in zip(shapes, _fits(longer, shapes), strict=True):
            new = _Rival(chunk, fits, short)
            if not any(rival.beats(new) for rival in known):
                found.append(chunk)
                known.append(new)
    return tuple(found)


class _Rival:
    """A shape, which of the long sequences fit it, whether all others surely do, and what it charges for a token."""

    def __init__(self, shape: GroupShape, fits: BoolArray, short_tokens: int) -> None:
        most = (short_tokens / shape.num_teams + 2) * shape.held.at_zero + 1  # a zigzag's remainder, rounding
        self.takes_short = shape.chunk_tokens == 0 or most <= shape.capacity_tokens
        self.shape, self.fits, self.takes_all = shape, fits, bool(fits.all())
        memory_s = shape.fit.fixed_s / max(group_tokens(shape), 1)
        self.most_s_per_token = shape.fit.s_per_token + memory_s * shape.held.at_zero
        self.least_s_per_token = shape.fit.s_per_token + memory_s * shape.held.least

    def beats(self, other: _Rival) -> bool:
        here, there = self.shape.fit, other.shape.fit
        return (
            self.takes_short
            and self.most_s_per_token <= other.least_s_per_token
            and here.adds_at_most(there)
            and here.fixed_s <= there.fixed_s
            and bool((self.fits | ~other.fits).all())
        )


def _fits(lengths: IntArray, shapes: SequenceOf[GroupShape]) -> list[BoolArray]:
    """Of each shape, which of these lengths fit it alone."""
    if not len(lengths) or not shapes:
        return [np.ones(len(lengths), dtype=np.bool_) for _ in shapes]
    table = price_table(lengths, shapes)
    return [table.fits[:, column] for column in range(len(shapes))]
