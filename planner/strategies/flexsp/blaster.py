"""FlexSP's blaster (arXiv 2412.01523, appendix A): cuts a step's sequences into rounds of like lengths.

Sequences sorted by length are cut into ``num_rounds`` contiguous parts so that the largest part has as few tokens as
possible. The paper uses dynamic programming in O(num_rounds * K^2). The same optimum is found here by bisecting the
size of the largest part: filling parts one after the other decides whether a size suffices.
"""

from __future__ import annotations

import numpy as np

from planner.strategies.search.shapes import IntArray


def blast_rows(lengths: IntArray, num_rounds: int) -> tuple[IntArray, ...]:
    """The rows (places in ``lengths``) of each round, longest sequences first. Returns fewer than ``num_rounds`` rounds
    where fewer reach the same optimum."""
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


def _cuts(ends: IntArray, part_tokens: int) -> list[int]:
    """Where each part ends when every part takes all that fits in ``part_tokens``. ``ends``: cumulative tokens."""
    cuts, taken = [0], 0
    while cuts[-1] < len(ends):
        cuts.append(int(np.searchsorted(ends, taken + part_tokens, side="right")))
        taken = int(ends[cuts[-1] - 1])
    return cuts[1:]
