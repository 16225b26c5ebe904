"""Plans with their prices and replays, as pages and tables read them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.plan import StepPlan
from planner.pricing.simulate import Simulation

if TYPE_CHECKING:
    from planner.replay.step import Replay  # brings numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A plan and its price. ``replay``: the same step by the other model, None where it was not replayed."""

    plan: StepPlan
    simulation: Simulation
    replay: Replay | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What one strategy makes of the batches: a plan for each of them, or why it refuses one (then no plans)."""

    strategy: str
    steps: tuple[PlannedStep, ...] = ()
    refusal: str = ""

    @property
    def mean_step_s(self) -> float:
        return sum(step.plan.predicted_s for step in self.steps) / len(self.steps)

    @property
    def replayed_s(self) -> float | None:
        """The first step by replay, None where it was not replayed."""
        replay = self.steps[0].replay if self.steps else None
        return replay.step_s if replay is not None else None


def best_candidate(candidates: SequenceOf[Candidate]) -> Candidate | None:
    """The fastest of those that planned every batch, the first one of equals; None where all refuse."""
    return min((found for found in candidates if found.steps), key=lambda found: found.mean_step_s, default=None)


def fastest_replayed(candidates: SequenceOf[Candidate]) -> Candidate | None:
    """The one whose first step is the shortest by replay; None where not all that planned were replayed."""
    times = [(found.replayed_s, place) for place, found in enumerate(candidates) if found.steps]
    known = [(seconds, place) for seconds, place in times if seconds is not None]
    return candidates[min(known)[1]] if known and len(known) == len(times) else None
