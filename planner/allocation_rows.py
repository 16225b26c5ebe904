"""One address plan for every number of rows: what a block takes is a line in the rows of the microbatch.

Tensors of a microbatch hold so many bytes a row, or a fixed number. Two traces of the same requests at different row
counts give both numbers of each request; a plan for the larger count then has room for every smaller one, at the same
addresses, because each block still lies inside its place.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.allocation import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLines:
    """By request: bytes = ``fixed_bytes`` + rows * ``bytes_per_row``."""

    fixed_bytes: tuple[int, ...]
    bytes_per_row: tuple[int, ...]

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Bytes of each request at this many rows."""
        lines = zip(self.fixed_bytes, self.bytes_per_row, strict=True)
        return tuple(fixed + num_rows * slope for fixed, slope in lines)


def fit_rows(
    first_rows: int, first: SequenceOf[Request], second_rows: int, second: SequenceOf[Request]
) -> RowLines | None:
    """The lines through two traces at different row counts. None where the traces are not the same sequence of
    allocations and frees, or a size does not grow in whole bytes a row."""
    if first_rows == second_rows or [(r.start, r.stop) for r in first] != [(r.start, r.stop) for r in second]:
        return None
    fixed, slopes = [], []
    for low, high in zip(first, second, strict=True):
        slope, rest = divmod(high.num_bytes - low.num_bytes, second_rows - first_rows)
        if rest or slope < 0:
            return None
        slopes.append(slope)
        fixed.append(low.num_bytes - slope * first_rows)
    return RowLines(fixed_bytes=tuple(fixed), bytes_per_row=tuple(slopes))
