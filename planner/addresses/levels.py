"""The bi-level address plan (MEMO, section 2.2): plan repeated sections once, then the whole trace.

Level 1 plans the blocks that are allocated and freed inside one section, such as one layer's forward or backward,
relative to the section; sections with the same requests share one plan. Level 2 plans the whole trace, with every
section as one pseudo block of its plan's size. An address is the pseudo block's address plus the offset inside it. The
disadvantage: a section's whole pseudo block is taken for as long as the section runs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.addresses.plan import (
    DEFAULT_LIMITS,
    AddressPlan,
    AllocationLimits,
    Request,
    live_bytes,
    plan_addresses,
    verify_addresses,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Events ``start`` to ``stop`` (exclusive) of a trace. Sections do not overlap. ``name``: for users."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelPlan:
    """``whole``: addresses of all requests, with the lower bound of the trace itself. ``inner``: the distinct plans of
    level 1. ``outer``: level 2, over pseudo blocks and all blocks that outlive their section."""

    whole: AddressPlan
    inner: tuple[AddressPlan, ...]
    outer: AddressPlan
    num_outer_requests: int


Shape = tuple[tuple[int, int, int], ...]
"""Bytes, start and stop of a section's own requests, with only their own events numbered."""


def section_members(requests: SequenceOf[Request], section: Section) -> tuple[int, ...]:
    """Indices of requests that are allocated and freed inside the section."""
    return tuple(i for i, r in enumerate(requests) if section.start <= r.start and r.stop < section.stop)


def section_shape(requests: SequenceOf[Request], section: Section) -> Shape:
    """Equal for sections with the same requests in the same order, whatever other events happen in between."""
    members = [requests[index] for index in section_members(requests, section)]
    ranks = {event: rank for rank, event in enumerate(sorted({e for r in members for e in (r.start, r.stop)}))}
    return tuple((r.num_bytes, ranks[r.start], ranks[r.stop]) for r in members)


def plan_levels(
    requests: SequenceOf[Request], sections: SequenceOf[Section], limits: AllocationLimits = DEFAULT_LIMITS
) -> LevelPlan:
    """Plan level by level; deterministic and verified. Raises PlanError as ``plan_addresses`` does."""
    known: dict[Shape, AddressPlan] = {}
    base_of: dict[int, tuple[int, int]] = {}  # request -> index of its pseudo block among the outer ones, offset inside
    outer: list[Request] = []
    for section in sections:
        members = section_members(requests, section)
        if not members:
            continue
        shape = section_shape(requests, section)
        if shape not in known:
            known[shape] = plan_addresses([requests[index] for index in members], limits)
        plan = known[shape]
        for index, offset in zip(members, plan.offsets, strict=True):
            base_of[index] = len(outer), offset
        outer.append(Request(
            num_bytes=plan.peak_bytes, start=min(requests[index].start for index in members),
            stop=max(requests[index].stop for index in members),
        ))
    for index, request in enumerate(requests):
        if index not in base_of:
            base_of[index] = len(outer), 0
            outer.append(request)
    level2 = plan_addresses(outer, limits)
    offsets = tuple(level2.offsets[place] + inside for place, inside in (base_of[i] for i in range(len(requests))))
    whole = AddressPlan(
        offsets=offsets, peak_bytes=level2.peak_bytes, bound_bytes=live_bytes(requests), method=level2.method
    )
    verify_addresses(requests, whole)
    return LevelPlan(whole=whole, inner=tuple(known.values()), outer=level2, num_outer_requests=len(outer))
