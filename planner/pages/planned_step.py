"""Plans with their prices and replays, as input for pages and tables."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.plan import StepPlan
from planner.pricing.simulate import Simulation

if TYPE_CHECKING:
    from planner.replay.step import Replay  # imports numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A plan and its price. ``replay``: the step simulated operation by operation; None if it was not replayed."""

    plan: StepPlan
    simulation: Simulation
    replay: Replay | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One strategy's plans for all batches, or the reason why it cannot plan one of them (then there are no plans)."""

    strategy: str
    steps: tuple[PlannedStep, ...] = ()
    refusal: str = ""

    @property
    def mean_step_s(self) -> float:
        return sum(step.plan.predicted_s for step in self.steps) / len(self.steps)

    @property
    def replayed_s(self) -> float | None:
        """Replayed seconds of the first step; None if it was not replayed."""
        replay = self.steps[0].replay if self.steps else None
        return replay.step_s if replay is not None else None


def best_candidate(candidates: SequenceOf[Candidate]) -> Candidate | None:
    """The fastest candidate that planned every batch, the first of equals; None if all refuse."""
    return min((found for found in candidates if found.steps), key=lambda found: found.mean_step_s, default=None)


def fastest_replayed(candidates: SequenceOf[Candidate]) -> Candidate | None:
    """The candidate with the shortest replayed first step; None if any candidate with plans was not replayed."""
    times = [(found.replayed_s, place) for place, found in enumerate(candidates) if found.steps]
    known = [(seconds, place) for seconds, place in times if seconds is not None]
    return candidates[min(known)[1]] if known and len(known) == len(times) else None
