"""One plan, the same on every rank, before the step's first collective.

A time-limited solver may return different plans for the same input, so only rank 0 solves. Every other rank receives
the bytes and verifies the plan against its own view of the step; then all ranks compare digests.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from parallel import comm
from planner.errors import InfeasibleError, LonghaulError, PlanError, PlanMismatchError
from planner.plan import StepPlan, plan_digest, plan_from_json, plan_to_json

_INFEASIBLE = b"infeasible:"
_REJECTED = "rejected".ljust(64, "-")
"""Sent in place of the digest (64 hex digits) by a rank that found the plan illegal."""


def agree_on_plan(
    plan: StepPlan | InfeasibleError | None, *, source: int, group: comm.Group, verify: Callable[[StepPlan], None]
) -> StepPlan:
    """Broadcast rank ``source``'s plan over a CPU-capable group, verify it everywhere, compare digests.

    ``plan`` is None on every rank but the source. If the source found that no plan exists, it passes the error and
    every rank raises it. Communicates three times (size, bytes, digests). Raises PlanMismatchError on *all* ranks when
    any two digests differ or any rank rejects the plan, so that no rank waits for one that stopped.
    """
    payload = comm.broadcast_bytes(_encode(plan), source=source, group=group)
    if payload.startswith(_INFEASIBLE):
        raise _decode_infeasible(payload.removeprefix(_INFEASIBLE))
    received: StepPlan | None = None
    reason: LonghaulError | None = None
    try:
        received = plan_from_json(payload.decode())
        verify(received)
        digest = plan_digest(received)
    except PlanError as error:
        reason, digest = error, _REJECTED
    compare_digests(digest, group, reason=reason)
    if received is None:  # unreachable: compare_digests raises on every rank when one rejects the plan
        raise PlanMismatchError("no plan was received")
    return received


def _encode(plan: StepPlan | InfeasibleError | None) -> bytes | None:
    if isinstance(plan, InfeasibleError):
        facts = {"message": str(plan), "binding": plan.binding, "needed_bytes": plan.needed_bytes,
                 "available_bytes": plan.available_bytes}
        return _INFEASIBLE + json.dumps(facts).encode()
    return None if plan is None else plan_to_json(plan).encode()


def _decode_infeasible(payload: bytes) -> InfeasibleError:
    facts = json.loads(payload)
    return InfeasibleError(
        facts["message"], binding=facts["binding"], needed_bytes=facts["needed_bytes"],
        available_bytes=facts["available_bytes"],
    )


def compare_digests(digest: str, group: comm.Group, *, reason: LonghaulError | None = None) -> None:
    """Raise PlanMismatchError on every rank, listing digests by rank, unless all are equal and none is rejected."""
    digests = [part.decode() for part in comm.all_gather_bytes(digest.encode(), group)]
    if len(set(digests)) == 1 and digests[0] != _REJECTED:
        return
    listing = ", ".join(f"rank {rank}: {value[:12]}" for rank, value in enumerate(digests))
    why = f"; this rank: {reason}" if reason else ""
    raise PlanMismatchError(f"the ranks do not agree on one legal plan ({listing}){why}")
