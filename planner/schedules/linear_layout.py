"""Which tokens each rank of a microbatch holds outside attention: the *linear layout*.

The attention layout may give ranks unequal numbers of tokens; embedding, norms, MLP and loss may use another layout. A
microbatch's ``moves`` describe it as (source, destination, tokens). Each move takes that many tokens from the end of
the source's remaining attention rows, in the listed order, and appends them to the destination's rows. No rank both
sends and receives, so a rank's first rows are the same in both layouts. Without moves the layouts are equal.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.errors import PlanError
from planner.plan import Microbatch, Span
from planner.schedules.layout import packed_spans, shard_spans
from planner.schedules.remap import Move


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMoves:
    """One rank's part. Its first ``num_kept`` rows are in both layouts. ``lent``: (rank, first row, last row + 1) of
    attention rows that are on other ranks in the linear layout. ``guests``: the same for linear rows that belong to
    other ranks in attention. One of the two is empty."""

    num_kept: int
    lent: tuple[tuple[int, int, int], ...]
    guests: tuple[tuple[int, int, int], ...]

    @property
    def num_attention_rows(self) -> int:
        return self.num_kept + sum(stop - start for _, start, stop in self.lent)

    @property
    def num_linear_rows(self) -> int:
        return self.num_kept + sum(stop - start for _, start, stop in self.guests)


def rank_moves(moves: SequenceOf[Move], rank: int, num_attention_rows: int) -> RankMoves:
    """The moves of a rank with this many attention rows. Raises PlanError if they take more rows than it has."""
    lent, guests = [], []
    num_kept = num_linear = num_attention_rows
    for source, destination, tokens in moves:
        if source == rank:
            lent.append((destination, num_kept - tokens, num_kept))
            num_kept -= tokens
        elif destination == rank:
            guests.append((source, num_linear, num_linear + tokens))
            num_linear += tokens
    if num_kept < 0:
        raise PlanError(f"rank {rank} holds {num_attention_rows} tokens and moves {num_attention_rows - num_kept}")
    return RankMoves(num_kept=num_kept, lent=tuple(lent), guests=tuple(guests))


def linear_counts(counts: dict[int, int], moves: SequenceOf[Move]) -> dict[int, int]:
    """Tokens of each rank in the linear layout, given those in the attention layout."""
    after = dict(counts)
    for source, destination, tokens in moves:
        after[source] -= tokens
        after[destination] += tokens
    return after


def attention_spans(microbatch: Microbatch, lengths: SequenceOf[int], rank: int) -> tuple[Span, ...]:
    """The rank's attention rows: those of its groups, in order. ``lengths[i]``: tokens of sequence i."""
    return tuple(
        span for group in microbatch.groups if rank in group.ranks
        for span in shard_spans(group, lengths)[group.ranks.index(rank)]
    )


def linear_spans(microbatch: Microbatch, lengths: SequenceOf[int], rank: int) -> tuple[Span, ...]:
    """The rank's rows in the linear layout."""
    own = attention_spans(microbatch, lengths, rank)
    part = rank_moves(microbatch.moves, rank, _num_tokens(own))
    spans = list(packed_spans(own, 0, part.num_kept))
    for source in dict.fromkeys(source for source, _, _ in part.guests):
        theirs = attention_spans(microbatch, lengths, source)
        for destination, start, stop in rank_moves(microbatch.moves, source, _num_tokens(theirs)).lent:
            if destination == rank:
                spans += packed_spans(theirs, start, stop)
    return tuple(spans)


def _num_tokens(spans: SequenceOf[Span]) -> int:
    return sum(span.num_tokens for span in spans)
