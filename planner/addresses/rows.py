"""One address plan for every number of rows: what a block takes is a line in the rows of the microbatch.

Tensors of a microbatch hold so many bytes a row, or a fixed number. Two traces of the same requests at different row
counts give both numbers of each request; a plan for the larger count then has room for every smaller one, at the same
addresses, because each block still lies inside its place. A few small blocks follow something else, such as the number
of documents: their size stays unknown, and they get no place.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.addresses.plan import Request

UNKNOWN = -1
_MOST_UNKNOWN_SHARE = 0.02
"""Of the bytes of all requests; with more, the two traces are of different kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLines:
    """By request: bytes = ``fixed_bytes`` + rows * ``bytes_per_row``; the slope is UNKNOWN where there is no line.
    ``fixed_bytes`` may be negative: the last chunk of the loss has the rows that the others leave."""

    fixed_bytes: tuple[int, ...]
    bytes_per_row: tuple[int, ...]

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Bytes of each request at this many rows, or UNKNOWN."""
        lines = zip(self.fixed_bytes, self.bytes_per_row, strict=True)
        return tuple(UNKNOWN if slope == UNKNOWN else max(UNKNOWN, fixed + num_rows * slope) for fixed, slope in lines)


def fit_rows(
    first_rows: int, first: SequenceOf[Request], second_rows: int, second: SequenceOf[Request]
) -> RowLines | None:
    """The lines through two traces at different row counts. None where the traces are not the same sequence of
    allocations and frees, or much of them does not grow in whole bytes a row."""
    if first_rows == second_rows or [(r.start, r.stop) for r in first] != [(r.start, r.stop) for r in second]:
        return None
    fixed, slopes, unknown_bytes = [], [], 0
    for low, high in zip(first, second, strict=True):
        slope, rest = divmod(high.num_bytes - low.num_bytes, second_rows - first_rows)
        if rest or slope < 0:
            slope = UNKNOWN
            unknown_bytes += max(low.num_bytes, high.num_bytes)
        slopes.append(slope)
        fixed.append(low.num_bytes - slope * first_rows)
    total_bytes = max(sum(r.num_bytes for r in first), sum(r.num_bytes for r in second))
    if unknown_bytes > _MOST_UNKNOWN_SHARE * total_bytes:
        return None
    return RowLines(fixed_bytes=tuple(fixed), bytes_per_row=tuple(slopes))
