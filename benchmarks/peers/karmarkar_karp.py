"""Karmarkar-Karp number partitioning into any number of parts (the largest differencing method, 1982).

Every number starts as a partial solution of its own: one part holds it and the others are empty. The two partial
solutions with the widest spread (largest part minus smallest) are joined, the largest parts of one with the smallest of
the other, until one solution is left. A joined solution's spread is at most the wider of the two, so the result's
spread is at most the largest number.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Part:
    """``items``: an index, or the items of two joined parts. Nested pairs make joining cheap; they are flattened at the
    end."""

    total: int
    items: object


def karmarkar_karp(weights: Sequence[int], num_parts: int) -> list[list[int]]:
    """Partition ``weights`` (each at least 1). Returns the indices of each part, ascending; parts may be empty. The
    result is deterministic.

    Raises ValueError where there is no part.
    """
    if num_parts < 1:
        raise ValueError(f"a partition needs at least 1 part, got {num_parts}")
    heap = [(-weight, place, [_Part(weight, place)]) for place, weight in enumerate(weights)]
    if num_parts == 1 or not heap:
        return [list(range(len(heap))), *([] for _ in range(num_parts - 1))]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        joined = _join(first, second, num_parts)
        smallest = joined[-1].total if len(joined) == num_parts else 0
        heapq.heappush(heap, (smallest - joined[0].total, number, joined))
        number += 1
    parts = [_flatten(part.items) for part in heap[0][2]]
    return parts + [[] for _ in range(num_parts - len(parts))]


def _join(first: list[_Part], second: list[_Part], num_parts: int) -> list[_Part]:
    """Join two partial solutions. They and the result list only the parts that are not empty, largest first."""
    alone_first, alone_second = num_parts - len(second), num_parts - len(first)
    joined = first[:alone_first] + second[:alone_second]
    for place in range(alone_first, len(first)):
        other = second[num_parts - 1 - place]
        joined.append(_Part(first[place].total + other.total, (first[place].items, other.items)))
    joined.sort(key=lambda part: part.total, reverse=True)
    return joined


def _flatten(items: object) -> list[int]:
    waiting, found = [items], []
    while waiting:
        item = waiting.pop()
        if isinstance(item, tuple):
            waiting += item
        elif isinstance(item, int):
            found.append(item)
    return sorted(found)
