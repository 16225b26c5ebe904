"""The planner as a child process: JSON lines in, JSON lines out. Start with ``python -m planner.service``.

The first line on stdin is a header ``{"num_ranks", "cost", "limits", "strategy", "degree"}``. Each further line is a
request ``{"step": n, "lengths": [...]}``, answered in order on stdout by ``{"step": n, "plan": <plan JSON as text>}``
or ``{"step": n, "error": {"type", "message", ...}}``. The process ends at the end of its input, so it outlives its
parent by at most one plan. Everything else that is printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any, TextIO

from planner.codec import from_plain
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, LonghaulError, SpecError
from planner.plan import plan_to_json
from planner.pricing.problem import StepProblem
from planner.step_planner import plan_step


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceHeader:
    """What stays the same for all requests."""

    num_ranks: int
    cost: CostModel
    limits: PlanLimits
    strategy: str
    degree: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """Requests the plan of one step. ``lengths``: tokens of its sequences by index."""

    step: int
    lengths: tuple[int, ...]


def error_to_plain(error: LonghaulError) -> dict[str, Any]:
    """An error as plain values; ``error_from_plain`` is the inverse."""
    plain: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, InfeasibleError):
        plain |= {
            "binding": error.binding, "needed_bytes": error.needed_bytes, "available_bytes": error.available_bytes
        }
    return plain


def error_from_plain(plain: dict[str, Any]) -> LonghaulError:
    """InfeasibleError and SpecError as they were; any other as LonghaulError, with the type's name in the message."""
    if plain["type"] == InfeasibleError.__name__:
        return InfeasibleError(
            plain["message"], binding=plain["binding"], needed_bytes=plain["needed_bytes"],
            available_bytes=plain["available_bytes"],
        )
    if plain["type"] == SpecError.__name__:
        return SpecError(plain["message"])
    return LonghaulError(f"{plain['type']}: {plain['message']}")


def answer(header: ServiceHeader, request: StepRequest) -> dict[str, Any]:
    """The answer to one request, as plain values."""
    try:
        problem = StepProblem(
            lengths=request.lengths, num_ranks=header.num_ranks, cost=header.cost, limits=header.limits
        )
        plan = plan_step(problem, step=request.step, strategy=header.strategy, degree=header.degree)
    except LonghaulError as error:
        return {"step": request.step, "error": error_to_plain(error)}
    return {"step": request.step, "plan": plan_to_json(plan)}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until the input ends. Raises SpecError for a line that does not follow the protocol."""
    first = requests.readline()
    if not first:
        return
    header = from_plain(ServiceHeader, json.loads(first), where="header")
    for line in requests:
        request = from_plain(StepRequest, json.loads(line), where="request")
        answers.write(json.dumps(answer(header, request)) + "\n")
        answers.flush()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which then closes our stdin
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other prints must not break the protocol
    try:
        serve(sys.stdin, answers)
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
