"""Reads sequence lengths from a text file with one number of tokens per line, and cuts them into batches."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from planner.errors import SpecError


def read_lengths(path: str) -> tuple[int, ...]:
    """All lengths (tokens) in file order; blank lines are skipped.

    Raises SpecError naming file and line if a line is not a whole number of at least 1, or if there are no lengths.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise SpecError(f"lengths file {path}: cannot be read ({reason})") from None
    lengths = tuple(
        _length(line, path, number) for number, line in enumerate(text.split("\n"), start=1) if line and line.strip()
    )
    if not lengths:
        raise SpecError(f"lengths file {path} holds no lengths; it needs one number of tokens per line")
    return lengths


def _length(line: str, path: str, number: int) -> int:
    word = line.strip()
    if not (word.isascii() and word.isdigit() and len(word) < 16):
        raise SpecError(f"lengths file {path}, line {number}: {word[:40]!r} is not a number of tokens (1, 2, 3, ...)")
    value = int(word)
    if value < 1:
        raise SpecError(f"lengths file {path}, line {number}: a sequence has at least 1 token, got {value}")
    return value


def drop_longer(lengths: SequenceOf[int], max_tokens: int) -> tuple[tuple[int, ...], int]:
    """The lengths of at most ``max_tokens``, in order, and how many were dropped. Raises SpecError if none are left."""
    kept = tuple(length for length in lengths if length <= max_tokens)
    if not kept:
        shortest = min(lengths)
        raise SpecError(f"every sequence is longer than --max-length {max_tokens}; the shortest has {shortest} tokens")
    return kept, len(lengths) - len(kept)


def batches_of_sequences(lengths: SequenceOf[int], num_sequences: int) -> Iterator[tuple[int, ...]]:
    """Batches of this many consecutive lengths; the last one may hold fewer."""
    for start in range(0, len(lengths), num_sequences):
        yield tuple(lengths[start : start + num_sequences])


def batches_of_tokens(lengths: SequenceOf[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
    """Batches of consecutive lengths that sum to at most ``num_tokens``; a longer sequence is a batch of its own."""
    batch: list[int] = []
    total = 0
    for length in lengths:
        if batch and total + length > num_tokens:
            yield tuple(batch)
            batch, total = [], 0
        batch.append(length)
        total += length
    if batch:
        yield tuple(batch)
