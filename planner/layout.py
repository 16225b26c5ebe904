"""Which tokens of a group each of its ranks holds. Pure integers, exact for any length: nothing is padded.

``local``: everything. ``ulysses``: the group's sequences packed one behind the other and cut into ``degree``
contiguous pieces that differ by at most one token. ``ring``: every sequence cut into 2 * degree chunks, rank r
holding chunks r and 2 * degree - 1 - r (zigzag: under a causal mask each rank then has the same work).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from itertools import pairwise

from planner.plan import AttentionGroup, AttentionKind, Span


def shard_spans(group: AttentionGroup, lengths: SequenceOf[int]) -> tuple[tuple[Span, ...], ...]:
    """The spans each rank of ``group`` holds, by group index, in the order of the rank's rows.

    ``lengths[i]`` is the number of tokens of the step's sequence i. Empty spans are left out.
    """
    sequences = [(index, lengths[index]) for index in group.sequences]
    if group.kind is AttentionKind.RING:
        return tuple(_zigzag_spans(sequences, index, group.degree) for index in range(group.degree))
    total = sum(size for _, size in sequences)
    cuts = [total * index // group.degree for index in range(group.degree + 1)]
    return tuple(_packed_spans(sequences, cuts[i], cuts[i + 1]) for i in range(group.degree))


def local_token_counts(kind: AttentionKind, degree: int, lengths: SequenceOf[int]) -> tuple[int, ...]:
    """Tokens each rank of such a group would hold, by group index, for sequences of these lengths."""
    if kind is AttentionKind.RING:
        return _zigzag_counts(degree, lengths)
    total = sum(lengths)
    return tuple(total * (index + 1) // degree - total * index // degree for index in range(degree))


def _zigzag_counts(degree: int, lengths: SequenceOf[int]) -> tuple[int, ...]:
    """Tokens per rank from all sequences' chunk edges at once. Only remainders make chunks differ, and there are at
    most 2 * degree of them, so the cost does not grow with the number of sequences."""
    chunks = 2 * degree
    whole = sum(size // chunks for size in lengths)
    rests = Counter(size % chunks for size in lengths)
    edges = [sum(times * (rest * edge // chunks) for rest, times in rests.items()) for edge in range(chunks + 1)]
    sizes = [whole + stop - start for start, stop in pairwise(edges)]
    return tuple(sizes[index] + sizes[chunks - 1 - index] for index in range(degree))


def _packed_spans(sequences: list[tuple[int, int]], start: int, stop: int) -> tuple[Span, ...]:
    spans, offset = [], 0
    for sequence, size in sequences:
        low, high = max(start - offset, 0), min(stop - offset, size)
        if low < high:
            spans.append(Span(sequence, low, high))
        offset += size
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
