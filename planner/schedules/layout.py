"""Which tokens each rank of a group holds. Pure integers, exact for any length; nothing is padded.

One rule covers all kinds. ``head_degree`` consecutive members form a *team*, which exchanges heads for tokens (1 for
kinds that do not). Every sequence is cut into two chunks per team, and team t holds chunk t and the t-th chunk from the
end (zigzag), so that all teams have the same work under a causal mask. A team's tokens, with its sequences packed in
order, are cut into contiguous pieces for its members, whose sizes differ by at most one token. With a single team
(ulysses) this just cuts the packed sequences into pieces; with teams of one rank (ring) it is just the zigzag.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from planner.plan import AttentionGroup, AttentionKind, Span
from planner.schedules.exchange import schedule_of

Tokens = TypeVar("Tokens", int, npt.NDArray[np.int64])


def head_degree(kind: AttentionKind, degree: int, inner_degree: int = 1) -> int:
    """Ranks per team in a group of this shape. Raises PlanError for an unknown kind."""
    return schedule_of(kind).head_degree(degree, inner_degree)


def team_spans(group: AttentionGroup, lengths: SequenceOf[int]) -> tuple[tuple[Span, ...], ...]:
    """The spans of each team in row order: what its members work on after the head exchange."""
    num_teams = group.degree // head_degree(group.kind, group.degree, group.inner_degree)
    sequences = [(index, lengths[index]) for index in group.sequences]
    return tuple(_zigzag_spans(sequences, team, num_teams) for team in range(num_teams))


def shard_spans(group: AttentionGroup, lengths: SequenceOf[int]) -> tuple[tuple[Span, ...], ...]:
    """The spans each rank of ``group`` holds, by group index, in the order of the rank's rows.

    ``lengths[i]`` is the number of tokens of the step's sequence i. Empty spans are omitted.
    """
    teams = team_spans(group, lengths)
    size = group.degree // len(teams)
    if size == 1:
        return teams
    shards: list[tuple[Span, ...]] = []
    for spans in teams:
        shards += cut_spans(spans, size)
    return tuple(shards)


def local_token_counts(
    kind: AttentionKind, degree: int, lengths: SequenceOf[int], inner_degree: int = 1
) -> tuple[int, ...]:
    """Tokens that each rank of such a group holds, by group index, for sequences of these lengths."""
    size = head_degree(kind, degree, inner_degree)
    teams = (sum(lengths),) if size == degree else _zigzag_counts(degree // size, lengths)
    if size == 1:
        return teams
    return tuple(stop - start for total in teams for start, stop in pairwise(_even_cuts(total, size)))


def peak_team_tokens(num_tokens: Tokens, num_teams: Tokens) -> Tokens:
    """The most tokens that one of so many teams holds of a sequence, for numbers or for arrays.

    A sequence has 2 * num_teams chunks, and a remainder of r tokens makes r of them one token longer. A team holds a
    chunk and its mirror image. Both are longer for some team exactly where r does not divide the number of chunks: only
    then some multiple j / r of the whole, 0 < j < r, falls strictly inside a chunk.
    """
    chunks = 2 * num_teams
    whole, rest = num_tokens // chunks, num_tokens % chunks
    peak: Tokens = 2 * whole + (rest > 0) * (1 + (chunks % (rest + (rest == 0)) > 0))
    return peak


def _even_cuts(total: int, parts: int) -> list[int]:
    return [total * index // parts for index in range(parts + 1)]


def _zigzag_counts(degree: int, lengths: SequenceOf[int]) -> tuple[int, ...]:
    """Tokens per team, computed from the chunk edges of all sequences at once. Chunks differ only by the remainders of
    the lengths, of which there are at most 2 * degree different ones, so the cost barely grows with the number of
    sequences."""
    chunks = 2 * degree
    whole = sum(size // chunks for size in lengths)
    rests = Counter(size % chunks for size in lengths)
    edges = [sum(times * (rest * edge // chunks) for rest, times in rests.items()) for edge in range(chunks + 1)]
    sizes = [whole + stop - start for start, stop in pairwise(edges)]
    return tuple(sizes[index] + sizes[chunks - 1 - index] for index in range(degree))


def cut_spans(packed: SequenceOf[Span], num_parts: int) -> tuple[tuple[Span, ...], ...]:
    """Cut these spans, packed in order, into contiguous parts whose sizes differ by at most one token."""
    cuts = _even_cuts(sum(span.num_tokens for span in packed), num_parts)
    return tuple(packed_spans(packed, start, stop) for start, stop in pairwise(cuts))


def packed_spans(packed: SequenceOf[Span], start: int, stop: int) -> tuple[Span, ...]:
    """Rows ``start .. stop`` of these spans, packed in order."""
    spans, offset = [], 0
    for span in packed:
        low, high = max(start - offset, 0), min(stop - offset, span.num_tokens)
        if low < high:
            spans.append(Span(span.sequence, span.start_token + low, span.start_token + high))
        offset += span.num_tokens
    return tuple(spans)


def _zigzag_bounds(size: int, index: int, degree: int) -> tuple[tuple[int, int], tuple[int, int]]:
    chunks = 2 * degree
    mirror = chunks - 1 - index
    return (
        (size * index // chunks, size * (index + 1) // chunks),
        (size * mirror // chunks, size * (mirror + 1) // chunks),
    )


def _zigzag_spans(sequences: list[tuple[int, int]], index: int, degree: int) -> tuple[Span, ...]:
    spans: list[Span] = []
    for sequence, size in sequences:
        for start, stop in _zigzag_bounds(size, index, degree):
            if start == stop:
                continue
            if spans and spans[-1].sequence == sequence and spans[-1].stop_token == start:
                spans[-1] = Span(sequence, spans[-1].start_token, stop)
            else:
                spans.append(Span(sequence, start, stop))
    return tuple(spans)
