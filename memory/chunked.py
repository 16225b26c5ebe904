"""Chunked training: which tokens form a chunk, in what order chunks run, and where their K/V and dK/dV are stored.

A group's packed documents are cut into chunks of consecutive tokens; a document may cross chunk borders. Chunks run
forward in order, and a chunk's attention reads the stored K/V of the document it continues. The backward takes chunks
in reverse order: every chunk that reads a chunk's K/V comes after it, so its dK/dV are complete when its turn comes
(SeCO, arXiv 2505.16710). Beyond the paper, the first forward pass leaves out work:

- Only the last document of a chunk can continue in the next one, so only its rows (the "tail") run and store their K/V.
- A chunk that no later selected chunk reads is not run at all.
- The last chunks that fit a budget run forward once and keep their graph.

Everything here is pure integers, the same on every rank of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.plan import Span

Rows = tuple[int, int]
"""Half-open row range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of a group. ``members[i]``: the spans that the group's member i works on, consecutive as well.
    ``continues``: the chunk's last document continues in the next chunk."""

    index: int
    members: tuple[tuple[Span, ...], ...]
    continues: bool

    @property
    def spans(self) -> tuple[Span, ...]:
        """All of the chunk's tokens, one span per document."""
        return merge_spans(span for member in self.members for span in member)

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for member in self.members for span in member)

    @property
    def most_rows(self) -> int:
        """Rows of the member with the most rows."""
        return max(sum(span.num_tokens for span in member) for member in self.members)

    def tail(self) -> Chunk:
        """This chunk reduced to its last document. Every token stays with its member."""
        last = self.spans[-1].sequence
        members = tuple(tuple(span for span in member if span.sequence == last) for member in self.members)
        return replace(self, members=members)


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Merge adjacent spans of the same sequence."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].sequence == span.sequence and merged[-1].stop_token == span.start_token:
            merged[-1] = Span(span.sequence, merged[-1].start_token, span.stop_token)
        else:
            merged.append(span)
    return tuple(merged)


def cut_chunks(documents: SequenceOf[Span], *, degree: int, chunk_tokens: int) -> tuple[Chunk, ...]:
    """Cut into chunks that give each of ``degree`` members at most ``chunk_tokens`` rows; row counts of members differ
    by at most one. The last chunk may be smaller. ``documents``: the group's whole sequences in packing order."""
    total, step = sum(span.num_tokens for span in documents), chunk_tokens * degree
    edges = [*range(0, total, step), total] if total else []
    chunks = []
    for index, (start, stop) in enumerate(pairwise(edges)):
        cuts = [start + (stop - start) * place // degree for place in range(degree + 1)]
        members = tuple(_slice(documents, low, high) for low, high in pairwise(cuts))
        last = _slice(documents, stop - 1, stop)[0]
        whole = next(span for span in documents if span.sequence == last.sequence)
        chunks.append(Chunk(index=index, members=members, continues=last.stop_token < whole.stop_token))
    return tuple(chunks)


def _slice(documents: SequenceOf[Span], start: int, stop: int) -> tuple[Span, ...]:
    spans, offset = [], 0
    for document in documents:
        low, high = max(start - offset, 0), min(stop - offset, document.num_tokens)
        if low < high:
            spans.append(Span(document.sequence, document.start_token + low, document.start_token + high))
        offset += document.num_tokens
    return tuple(spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSchedule:
    """``forward``: the chunks that run before the backward begins, in order. ``backward``: the selected chunks, last
    first. A chunk in ``kept`` runs forward once and keeps its graph for the backward; of the other chunks in
    ``forward`` only the tail runs, without a graph. ``needed[i]``: a later chunk reads chunk i's K/V."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    kept: frozenset[int]
    needed: tuple[bool, ...]


def schedule_chunks(chunks: SequenceOf[Chunk], selected: SequenceOf[bool], *, keep_rows: int = 0) -> ChunkSchedule:
    """In what order chunks run if only the loss of the ``selected`` ones counts.

    ``keep_rows``: how many rows of a member may keep their activations. The last selected chunk is kept whatever its
    size, because its backward follows at once.
    """
    needed = [False] * len(chunks)
    for index in range(len(chunks) - 2, -1, -1):
        if chunks[index].continues:
            # nothing after the end of the document reads it; a chunk within the document passes the need on
            inside = chunks[index + 1].continues and len(chunks[index + 1].spans) == 1
            needed[index] = selected[index + 1] or (inside and needed[index + 1])
    backward = tuple(index for index in range(len(chunks) - 1, -1, -1) if selected[index])
    kept, rows = set(backward[:1]), 0
    for index in backward:
        rows += chunks[index].most_rows
        if rows > keep_rows:
            break
        kept.add(index)
    forward = tuple(index for index in range(len(chunks)) if index in kept or needed[index])
    return ChunkSchedule(forward=forward, backward=backward, kept=frozenset(kept), needed=tuple(needed))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """A chunk's row ranges in this rank's stores. ``parts``: K/V of its first document in earlier chunks, contiguous
    range by range, each with the range that accumulates its dK/dV (None: these are not wanted). ``tail``: where the K/V
    of its own last document is stored; ``carried``: where the dK/dV of that tail accumulate.
    """

    parts: tuple[tuple[Rows, Rows | None], ...]
    tail: Rows
    carried: Rows | None


def place_rows(
    chunks: SequenceOf[Chunk], schedule: ChunkSchedule, *, member: int | None
) -> tuple[tuple[StoredRows, ...], int, int]:
    """Row ranges for every chunk, and the number of rows of the K/V store and of the dK/dV store.

    ``member``: the group member whose tokens this rank stores; None if the rank stores all tokens (of some heads).
    Only selected chunks have rows for dK/dV: those of other chunks are not wanted.
    """
    selected = set(schedule.backward)
    placed: list[StoredRows] = []
    num_rows = num_carried = 0
    parts: list[tuple[Rows, Rows | None]] = []  # of the document that continues, in the chunks so far
    for chunk, needed in zip(chunks, schedule.needed, strict=True):
        spans = chunk.spans
        prefix = parts if spans[0].start_token > 0 else []
        size = _tail_rows(chunk, member) if needed else 0
        tail: Rows = (num_rows, num_rows + size)
        carried: Rows | None = None
        if size and chunk.index in selected:
            carried = (num_carried, num_carried + size)
            num_carried += size
        num_rows += size
        placed.append(StoredRows(parts=tuple(prefix), tail=tail, carried=carried))
        parts = _joined(prefix if len(spans) == 1 else [], tail, carried)
    return tuple(placed), num_rows, num_carried


def _tail_rows(chunk: Chunk, member: int | None) -> int:
    held = chunk.tail().members
    return sum(span.num_tokens for part in (held if member is None else held[member:member + 1]) for span in part)


def _joined(
    parts: SequenceOf[tuple[Rows, Rows | None]], tail: Rows, carried: Rows | None
) -> list[tuple[Rows, Rows | None]]:
    """``parts`` and one more range, merged into the last one if it continues that one in both stores."""
    if tail[0] == tail[1]:
        return list(parts)
    if parts:
        (start, stop), grads = parts[-1]
        if grads is None and carried is None and stop == tail[0]:
            return [*parts[:-1], ((start, tail[1]), None)]
        if grads is not None and carried is not None and stop == tail[0] and grads[1] == carried[0]:
            return [*parts[:-1], ((start, tail[1]), (grads[0], carried[1]))]
    return [*parts, (tail, carried)]
