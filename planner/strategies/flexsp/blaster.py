"""FlexSP's blaster (arXiv 2412.01523, appendix A): the step's sequences cut into rounds of like lengths.

Sequences sorted by length are cut into ``num_rounds`` contiguous chunks so that the largest chunk has the fewest
tokens. The paper fills a table in O(num_rounds * K^2); the same optimum follows from bisecting the answer, since
whether a chunk size suffices is decided by filling chunks one after the other.
"""

from __future__ import annotations

import numpy as np

from planner.strategies.search.shapes import IntArray


def blast_rows(lengths: IntArray, num_rounds: int) -> tuple[IntArray, ...]:
    """Row places by round, longest sequences first. Fewer rounds come back where fewer reach the same optimum."""
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    ends = np.cumsum(lengths[order])
    low, high = max(int(lengths.max()), -(-int(ends[-1]) // num_rounds)), int(ends[-1])
    while low < high:
        middle = (low + high) // 2
        if len(_cuts(ends, middle)) <= num_rounds:
            high = middle
        else:
            low = middle + 1
    return tuple(np.split(order, _cuts(ends, low)[:-1]))


def _cuts(ends: IntArray, chunk_tokens: int) -> list[int]:
    """Where each chunk stops when every chunk takes all that fits in ``chunk_tokens``."""
    cuts, taken = [0], 0
    while cuts[-1] < len(ends):
        cuts.append(int(np.searchsorted(ends, taken + chunk_tokens, side="right")))
        taken = int(ends[cuts[-1] - 1])
    return cuts[1:]
