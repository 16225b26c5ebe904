"""One address plan for every number of rows: the size of a block is a linear function of the microbatch's rows.

A microbatch's tensors have a number of bytes per row, or a fixed size. Two traces of the same requests at different
numbers of rows give both values for each request. A plan for the larger number then has room for every smaller one at
the same addresses, because each block still fits its place. A few small blocks depend on something else, such as the
number of documents; their size stays unknown, and they get no address.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.addresses.plan import Request

UNKNOWN = -1
_MAX_UNKNOWN_SHARE = 0.02
"""Share of the bytes of all requests; if more of them are unknown, the two traces are of different kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLines:
    """By request: bytes = ``fixed_bytes`` + rows * ``bytes_per_row``; the slope is UNKNOWN if size and rows have no
    such relation. ``fixed_bytes`` may be negative, for example because the loss's last chunk has only the remaining
    rows."""

    fixed_bytes: tuple[int, ...]
    bytes_per_row: tuple[int, ...]

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Bytes of each request at this number of rows, or UNKNOWN."""
        lines = zip(self.fixed_bytes, self.bytes_per_row, strict=True)
        return tuple(UNKNOWN if slope == UNKNOWN else max(UNKNOWN, fixed + num_rows * slope) for fixed, slope in lines)


def fit_rows(
    first_rows: int, first: SequenceOf[Request], second_rows: int, second: SequenceOf[Request]
) -> RowLines | None:
    """The lines through two traces at different numbers of rows. None if they are not the same sequence of allocations
    and frees, or if too many bytes do not grow by whole bytes per row."""
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
    if unknown_bytes > _MAX_UNKNOWN_SHARE * total_bytes:
        return None
    return RowLines(fixed_bytes=tuple(fixed), bytes_per_row=tuple(slopes))
