"""Chunk by chunk training as shapes to search over: a few sizes of chunks for each kind and degree.

A rank that runs a microbatch in chunks of C tokens holds the activations of one chunk and, for each of its tokens, K/V
and their gradients. So such a shape has the capacity that the chunk leaves, and a sequence's load is the share that K/V
and their gradients have in its tokens' bytes. The price is another forward, and a fixed time for each chunk: small
chunks leave more room and cost more.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import MemoryAction, MemoryPolicy
from planner.strategies.search.shapes import (
    UNLIMITED_TOKENS,
    GroupShape,
    HeldShare,
)

CHUNK_PARTS = (2, 4, 8, 32)
"""Sizes of chunks that are searched: the tokens that a device can keep, divided by each of these."""
MOST_SHARE = 0.9
"""No chunks where K/V and their gradients take more than this share of a token's bytes: they free next to nothing."""


def in_chunks(chunk_tokens: int) -> MemoryPolicy:
    """The policy."""
    return MemoryPolicy(chunk_tokens=chunk_tokens)


def chunk_sizes(cost: CostModel, limits: PlanLimits) -> tuple[int, ...]:
    """The sizes of chunks that are searched (tokens of a rank), the largest first; none where chunks are not allowed or
    not priced."""
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
    """This shape (of kept activations) in chunks; None where a chunk leaves no room, or frees next to nothing."""
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
