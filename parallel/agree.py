"""One plan, the same on every rank, before the step's first collective.

A time-limited solver is not a function of its input, so only rank 0 solves. Everyone else receives the bytes,
verifies the plan against its own idea of the step, and then all compare digests.
"""

from __future__ import annotations

from collections.abc import Callable

from parallel import comm
from planner.errors import LonghaulError, PlanError, PlanMismatchError
from planner.plan import StepPlan, plan_digest, plan_from_json, plan_to_json

_REJECTED = "rejected".ljust(64, "-")
"""Stands where a digest would (64 hex digits) when a rank found the plan illegal."""


def agree_on_plan(
    plan: StepPlan | None, *, source: int, group: comm.Group, verify: Callable[[StepPlan], None]
) -> StepPlan:
    """Broadcast rank ``source``'s plan over a CPU-capable group, verify it everywhere, compare digests.

    ``plan`` is None on every other rank. Communicates three times (size, bytes, digests). Raises PlanMismatchError on
    *all* ranks when any two digests differ or any rank rejects the plan, so that nobody waits for a rank that stopped.
    """
    payload = comm.broadcast_bytes(plan_to_json(plan).encode() if plan else None, source=source, group=group)
    received: StepPlan | None = None
    reason: LonghaulError | None = None
    try:
        received = plan_from_json(payload.decode())
        verify(received)
        digest = plan_digest(received)
    except PlanError as error:
        reason, digest = error, _REJECTED
    compare_digests(digest, group, reason=reason)
    if received is None:  # unreachable: a rejected plan raised above on every rank
        raise PlanMismatchError("no plan was received")
    return received


def compare_digests(digest: str, group: comm.Group, *, reason: LonghaulError | None = None) -> None:
    """Raises PlanMismatchError on every rank, listing digests by rank, unless all are equal and none is rejected."""
    digests = [part.decode() for part in comm.all_gather_bytes(digest.encode(), group)]
    if len(set(digests)) == 1 and digests[0] != _REJECTED:
        return
    listing = ", ".join(f"rank {rank}: {value[:12]}" for rank, value in enumerate(digests))
    why = f"; this rank: {reason}" if reason else ""
    raise PlanMismatchError(f"the ranks do not agree on one legal plan ({listing}){why}")
