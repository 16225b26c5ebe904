"""Addresses for memory blocks with known lifetimes: offline dynamic storage allocation (MEMO, section 2).

The input is a trace of requests; the output is one offset per request and the peak. Greedy orders come first (large
blocks first, each at the lowest free address). If the peak equals the lower bound, the most bytes that are live at
once, the plan is optimal. Otherwise a local search with limited work follows, then a solver: rectangle packing by
CP-SAT if OR-tools is installed, else the big-M program by HiGHS for small instances. The problem is NP-hard; the result
names the best plan found, the method that found it, and the best proven bound.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import StrEnum

from planner.errors import PlanError
from planner.solver import LinearModel, Packing, PackingLimits, SolverFailure, WorkLimits, pack_rectangles

ALIGNMENT_BYTES = 512
"""Offsets and sizes are multiples of this, to which torch's own allocator rounds too."""
_SEARCH_SEED = 20240229


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A block of ``num_bytes``, allocated at event ``start`` and freed at event ``stop`` (exclusive). Event numbers
    count allocations and frees; only their order matters."""

    num_bytes: int
    start: int
    stop: int


class Method(StrEnum):
    """The method that found the plan."""

    BY_SIZE = "by_size"
    BY_AREA = "by_area"
    BY_ARRIVAL = "by_arrival"
    LOCAL_SEARCH = "local_search"
    MIP = "mip"
    PACKING = "packing"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationLimits:
    """Limits of work, not of time. ``max_moves``, ``max_visits``: moves of the local search, and neighbours that it
    visits. ``max_mip_pairs``: the big-M program is tried up to this many overlapping pairs. ``uses_packing``: use
    CP-SAT if OR-tools is installed."""

    max_moves: int = 2_000
    max_visits: int = 1_500_000
    max_mip_pairs: int = 150
    mip: WorkLimits = WorkLimits(max_nodes=2_000, max_work=4_000_000, time_limit_s=20.0, relative_gap=0.0)
    uses_packing: bool = True
    packing: PackingLimits = PackingLimits(deterministic_s=3.0, time_limit_s=300.0)


DEFAULT_LIMITS = AllocationLimits()
GREEDY_ONLY = AllocationLimits(max_moves=0, max_mip_pairs=0, uses_packing=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressPlan:
    """``offsets``: by request. ``peak_bytes``: size of the memory they need. ``bound_bytes``: lower bound for all
    plans."""

    offsets: tuple[int, ...]
    peak_bytes: int
    bound_bytes: int
    method: Method

    @property
    def is_optimal(self) -> bool:
        return self.peak_bytes == self.bound_bytes

    @property
    def relative_gap(self) -> float:
        """By how much, at most, the best plan could be smaller."""
        return 1 - self.bound_bytes / self.peak_bytes if self.peak_bytes else 0.0


def rounded_bytes(num_bytes: int) -> int:
    """Bytes of a request including its padding."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def live_bytes(requests: SequenceOf[Request]) -> int:
    """Most bytes that are live at once, including padding: the lower bound of every plan."""
    changes = [(request.start, 1, rounded_bytes(request.num_bytes)) for request in requests]
    changes += [(request.stop, 0, -rounded_bytes(request.num_bytes)) for request in requests]
    most = live = 0
    for _, _, change in sorted(changes):  # at equal times frees come first
        live += change
        most = max(most, live)
    return most


def requests_from_events(events: Iterable[tuple[int, int]]) -> tuple[Request, ...]:
    """``events``: ``(block, bytes)`` in order; ``bytes >= 0`` allocates the block, below 0 frees it. The name of a
    block, for example its address, may be reused after its free. Blocks that are not freed live to the end. Frees of
    unknown blocks, which are older than the trace, only count as events."""
    opened: dict[int, tuple[int, int, int]] = {}
    closed: list[tuple[int, Request]] = []
    number = order = 0
    for number, (block, num_bytes) in enumerate(events, start=1):
        if num_bytes >= 0:
            opened[block] = order, num_bytes, number - 1
            order += 1
        elif block in opened:
            place, size, start = opened.pop(block)
            closed.append((place, Request(num_bytes=size, start=start, stop=number - 1)))
    for place, size, start in opened.values():
        closed.append((place, Request(num_bytes=size, start=start, stop=number)))
    return tuple(request for _, request in sorted(closed, key=lambda item: item[0]))


def plan_addresses(requests: SequenceOf[Request], limits: AllocationLimits = DEFAULT_LIMITS) -> AddressPlan:
    """The best plan within the limits: deterministic, verified, and never worse than ``Method.BY_ARRIVAL``, which is
    what a first-fit allocator does online. Raises PlanError for a request that is not freed after it is allocated."""
    for index, request in enumerate(requests):
        if request.num_bytes < 0 or request.stop <= request.start:
            raise PlanError(f"request {index}: {request.num_bytes} bytes from event {request.start} to {request.stop}")
    bound_bytes = live_bytes(requests)
    neighbours = _neighbours(requests)
    best: AddressPlan | None = None
    best_order: list[int] = []
    for method, order in _greedy_orders(requests):
        plan = _plan(requests, _place(requests, order, neighbours), bound_bytes, method)
        if best is None or plan.peak_bytes < best.peak_bytes:
            best, best_order = plan, order
        if best.is_optimal:
            break
    assert best is not None
    if not best.is_optimal:
        best = _search(requests, neighbours, best, best_order, limits)
    if not best.is_optimal:
        best = _solve(requests, neighbours, best, limits)
    verify_addresses(requests, best)
    return best


def verify_addresses(requests: SequenceOf[Request], plan: AddressPlan) -> None:
    """Raise PlanError if two live blocks overlap, or one is outside ``[0, peak_bytes)`` or not aligned."""
    if len(plan.offsets) != len(requests):
        raise PlanError(f"{len(plan.offsets)} offsets for {len(requests)} requests")
    for index, (request, offset) in enumerate(zip(requests, plan.offsets, strict=True)):
        if offset < 0 or offset % ALIGNMENT_BYTES or offset + rounded_bytes(request.num_bytes) > plan.peak_bytes:
            raise PlanError(f"request {index}: offset {offset} of {plan.peak_bytes} bytes")
    for first, second in _pairs(requests):
        low, high = sorted((first, second), key=lambda index: plan.offsets[index])
        if plan.offsets[low] + rounded_bytes(requests[low].num_bytes) > plan.offsets[high]:
            raise PlanError(f"requests {first} and {second} are live at once and overlap at {plan.offsets[high]}")


def _plan(requests: SequenceOf[Request], offsets: list[int], bound_bytes: int, method: Method) -> AddressPlan:
    tops = (offset + rounded_bytes(r.num_bytes) for r, offset in zip(requests, offsets, strict=True))
    return AddressPlan(
        offsets=tuple(offsets), peak_bytes=max(tops, default=0), bound_bytes=bound_bytes, method=method
    )


def _greedy_orders(requests: SequenceOf[Request]) -> Iterator[tuple[Method, list[int]]]:
    everyone = range(len(requests))
    yield Method.BY_SIZE, sorted(everyone, key=lambda i: (-requests[i].num_bytes, requests[i].start, i))
    yield Method.BY_AREA, sorted(
        everyone, key=lambda i: (-requests[i].num_bytes * (requests[i].stop - requests[i].start), requests[i].start, i)
    )
    yield Method.BY_ARRIVAL, sorted(everyone, key=lambda i: (requests[i].start, i))


def _pairs(requests: SequenceOf[Request]) -> Iterator[tuple[int, int]]:
    """Pairs of requests that are live at the same time. Empty blocks are in no pair."""
    live: list[int] = []
    for index in sorted(range(len(requests)), key=lambda i: requests[i].start):
        request = requests[index]
        if not request.num_bytes:
            continue
        live = [other for other in live if requests[other].stop > request.start]
        yield from ((other, index) for other in live)
        live.append(index)


def _neighbours(requests: SequenceOf[Request]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in requests]
    for first, second in _pairs(requests):
        found[first].append(second)
        found[second].append(first)
    return found


def _place(requests: SequenceOf[Request], order: Iterable[int], neighbours: list[list[int]]) -> list[int]:
    """Put each block at the lowest address that is free during its whole lifetime.

    Some order gives an optimal plan: ordered by an optimal plan's addresses, no block ends up above its address there.
    """
    tops = [-1] * len(requests)
    offsets = [0] * len(requests)
    for index in order:
        size, at = rounded_bytes(requests[index].num_bytes), 0
        for low, high in sorted([(offsets[j], tops[j]) for j in neighbours[index] if tops[j] >= 0]):
            if low - at >= size:
                break
            at = max(at, high)
        offsets[index], tops[index] = at, at + size
    return offsets


def _search(
    requests: SequenceOf[Request], neighbours: list[list[int]], best: AddressPlan, order: list[int],
    limits: AllocationLimits,
) -> AddressPlan:
    """Local search over orders: place a block at the top, or a neighbour of it, earlier; equally good orders count."""
    rng = random.Random(_SEARCH_SEED)
    visits_each = max(1, sum(len(found) for found in neighbours) + len(requests))
    sizes = [rounded_bytes(request.num_bytes) for request in requests]
    current, current_order, current_peak = best.offsets, order, best.peak_bytes
    for _ in range(min(limits.max_moves, limits.max_visits // visits_each)):
        top = [i for i in current_order if current[i] + sizes[i] == current_peak]
        moved = rng.choice(top)
        if neighbours[moved] and rng.random() < 0.5:
            moved = rng.choice(neighbours[moved])
        place = current_order.index(moved)
        target = rng.randrange(place) if place else 0
        trial_order = [*current_order[:target], moved, *current_order[target:place], *current_order[place + 1 :]]
        plan = _plan(requests, _place(requests, trial_order, neighbours), best.bound_bytes, Method.LOCAL_SEARCH)
        if plan.peak_bytes <= current_peak:
            current, current_order, current_peak = plan.offsets, trial_order, plan.peak_bytes
        if plan.peak_bytes < best.peak_bytes:
            best = plan
            if best.is_optimal:
                break
    return best


def _solve(
    requests: SequenceOf[Request], neighbours: list[list[int]], best: AddressPlan, limits: AllocationLimits
) -> AddressPlan:
    """CP-SAT or HiGHS, starting from the best plan. Addresses are in units of the alignment."""
    pairs = list(_pairs(requests))
    found: Packing | None = None
    method = Method.PACKING
    if limits.uses_packing:
        found = _pack(requests, best, limits.packing)
    if found is None and len(pairs) <= limits.max_mip_pairs:
        method, found = Method.MIP, _big_m(requests, pairs, best, limits.mip)
    if found is None:
        return best
    bound_bytes = min(best.peak_bytes, max(best.bound_bytes, found.bound * ALIGNMENT_BYTES))
    chosen = best
    if found.places:
        order = sorted(range(len(requests)), key=lambda index: found.places[index])
        plan = _plan(requests, _place(requests, order, neighbours), bound_bytes, method)
        chosen = plan if plan.peak_bytes < best.peak_bytes else best
    return AddressPlan(
        offsets=chosen.offsets, peak_bytes=chosen.peak_bytes, bound_bytes=min(bound_bytes, chosen.peak_bytes),
        method=chosen.method,
    )


def _pack(requests: SequenceOf[Request], best: AddressPlan, limits: PackingLimits) -> Packing | None:
    return pack_rectangles(
        spans=tuple((request.start, request.stop) for request in requests),
        heights=tuple(rounded_bytes(request.num_bytes) // ALIGNMENT_BYTES for request in requests),
        low=best.bound_bytes // ALIGNMENT_BYTES,
        start=tuple(offset // ALIGNMENT_BYTES for offset in best.offsets),
        limits=limits,
    )


def _big_m(
    requests: SequenceOf[Request], pairs: list[tuple[int, int]], best: AddressPlan, limits: WorkLimits
) -> Packing | None:
    """MEMO's program (section 2.1): ``A_i + S_i <= M``; z says which of two blocks live at once is below."""
    most = best.peak_bytes // ALIGNMENT_BYTES
    sizes = [rounded_bytes(request.num_bytes) // ALIGNMENT_BYTES for request in requests]
    model = LinearModel()
    peak = model.variable(low=best.bound_bytes // ALIGNMENT_BYTES, high=most)
    places = [model.variable(high=most - size) for size in sizes]
    for place, size in zip(places, sizes, strict=True):
        model.row({peak: 1.0, place: -1.0}, low=size)
    start = [most, *(offset // ALIGNMENT_BYTES for offset in best.offsets)]
    for first, second in pairs:
        is_above = model.variable(high=1, integer=True)  # 1: ``second`` is below ``first``
        model.row({places[second]: 1.0, places[first]: -1.0, is_above: most}, low=sizes[first])
        model.row({places[first]: 1.0, places[second]: -1.0, is_above: -most}, low=sizes[second] - most)
        start.append(int(best.offsets[first] > best.offsets[second]))
    model.minimize({peak: 1.0})
    try:
        solution = model.solve(limits, start)
    except SolverFailure:
        return None
    bound = max(0, math.ceil(solution.bound - 1e-6)) if math.isfinite(solution.bound) else 0
    return Packing(places=tuple(solution.values[place] for place in places) if solution.values else (), bound=bound)
