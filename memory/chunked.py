"""Chunked training: which tokens make a chunk, which chunks run when, and where their K/V and dK/dV are stored.

A group's documents, packed one behind the other, are cut into chunks of consecutive tokens; documents may cross chunk
borders. Chunks run forward in order; attention of a chunk reads the stored K/V of the document it continues. The
backward takes the chunks in reverse: everything that reads a chunk's K/V lies behind it, so its dK/dV are complete
when its turn comes (SeCO, arXiv 2505.16710). What the first pass leaves out, beyond the paper:

- Only the last document of a chunk can go on in the next one, so only its rows run (the "tail") and leave their K/V.
- A chunk that no later selected chunk reads is not run at all.
- The trailing chunks that fit a budget run forward once, with their graph.

Pure integers here, the same on every rank of a group.
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
    """Consecutive tokens of a group. ``members[i]``: the consecutive part of them that the group's member i works on,
    as spans. ``continues``: the last document goes on in the next chunk."""

    index: int
    members: tuple[tuple[Span, ...], ...]
    continues: bool

    @property
    def spans(self) -> tuple[Span, ...]:
        """All the chunk's tokens, one span for each document."""
        return merge_spans(span for member in self.members for span in member)

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for member in self.members for span in member)

    @property
    def most_rows(self) -> int:
        """Rows of the member that has the most."""
        return max(sum(span.num_tokens for span in member) for member in self.members)

    def tail(self) -> Chunk:
        """The chunk with its last document only. Every token stays with its member."""
        last = self.spans[-1].sequence
        members = tuple(tuple(span for span in member if span.sequence == last) for member in self.members)
        return replace(self, members=members)


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Neighbouring spans of one sequence that touch become one."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].sequence == span.sequence and merged[-1].stop_token == span.start_token:
            merged[-1] = Span(span.sequence, merged[-1].start_token, span.stop_token)
        else:
            merged.append(span)
    return tuple(merged)


def cut_chunks(documents: SequenceOf[Span], *, degree: int, chunk_tokens: int) -> tuple[Chunk, ...]:
    """Chunks in which every one of ``degree`` members has at most ``chunk_tokens`` rows, members differing by at most
    one; the last chunk is what is left. ``documents``: the group's whole sequences in packing order."""
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
    """``forward``: in order, the chunks that run before the backward begins. ``backward``: in order, the selected
    chunks from last to first. A chunk in ``kept`` runs forward once and its graph waits for the backward; of the
    others in ``forward`` only the tail runs, without a graph. ``needed[i]``: a later chunk reads chunk i's K/V."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    kept: frozenset[int]
    needed: tuple[bool, ...]


def schedule_chunks(chunks: SequenceOf[Chunk], selected: SequenceOf[bool], *, keep_rows: int = 0) -> ChunkSchedule:
    """When each chunk runs if the loss of the ``selected`` ones counts.

    ``keep_rows``: rows of a member whose activations may stay; the last selected chunk stays whatever its size, for
    its backward comes at once.
    """
    needed = [False] * len(chunks)
    for index in range(len(chunks) - 2, -1, -1):
        if chunks[index].continues:
            # past the end of the document nobody reads it; a chunk inside is a single span that goes on as well
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
    """A chunk's places in this rank's stores. ``parts``: K/V of its first document's tokens in earlier chunks, run by
    run without gaps, each with the rows where its dK/dV gather (None: nowhere, for they are not wanted). ``tail``:
    where the K/V of its own last document goes; ``carried``: where the dK/dV of it gather.
    """

    parts: tuple[tuple[Rows, Rows | None], ...]
    tail: Rows
    carried: Rows | None


def place_rows(
    chunks: SequenceOf[Chunk], schedule: ChunkSchedule, *, member: int | None
) -> tuple[tuple[StoredRows, ...], int, int]:
    """Places for every chunk, and the rows of the K/V store and of the dK/dV store.

    ``member``: the group member whose own tokens are stored; None where a rank holds all tokens (of some heads).
    dK/dV have places only for chunks that are selected: of the others they are not wanted.
    """
    selected = set(schedule.backward)
    placed: list[StoredRows] = []
    num_rows = num_carried = 0
    parts: list[tuple[Rows, Rows | None]] = []  # of the document that runs on, in the chunks so far
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
    """``parts`` and one more run, which is joined to the last one where both its places follow on."""
    if tail[0] == tail[1]:
        return list(parts)
    if parts:
        (start, stop), grads = parts[-1]
        if grads is None and carried is None and stop == tail[0]:
            return [*parts[:-1], ((start, tail[1]), None)]
        if grads is not None and carried is not None and stop == tail[0] and grads[1] == carried[0]:
            return [*parts[:-1], ((start, tail[1]), (grads[0], carried[1]))]
    return [*parts, (tail, carried)]
