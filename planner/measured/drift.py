"""Compares measured steps with their plans: how far off the cost model is, and a refitted cost model.

Measurements never change the plans of the same run, because a resumed run must repeat them. So a refitted model is a
file for the next run. It is made only from recorded steps, and the same records give the same file.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from planner.cost.fits import TimeFit
from planner.cost.fitting import GroupSample, group_features, non_negative_fit
from planner.cost.model import CostModel
from planner.measured.step_times import MeasuredStep, median_ratio
from planner.plan import AttentionKind, StepPlan
from planner.pricing.pipeline_order import StageWork
from planner.pricing.timeline import Pass, play

WARM_UP_STEPS = 2
"""First steps after a start are not counted: caches are cold and some code is loaded late."""
WINDOW_STEPS = 10
MIN_STEPS = 5
MIN_SAMPLES = 8
_OUTLIER = 3.0
"""A microbatch this many times off the median ratio of all was disturbed by something outside the plan."""

Executed = tuple[StepPlan, MeasuredStep]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """``ratio``: measured over predicted seconds of the microbatches, median of ``num_steps`` steps."""

    ratio: float
    num_steps: int
    factor: float

    @property
    def is_off(self) -> bool:
        return not 1 / self.factor <= self.ratio <= self.factor

    def sentence(self) -> str:
        """One sentence for users."""
        speed = f"{self.ratio:.2f} times the predicted seconds (median of {self.num_steps} steps"
        if self.is_off:
            return f"the cost model is off: microbatches take {speed}, limit {self.factor:g})"
        return f"the cost model holds: microbatches take {speed}, limit {self.factor:g})"


class DriftWatch:
    """Follows a run step by step. The first steps after a start are not counted; with fewer than MIN_STEPS there is
    no verdict."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._num_seen = 0
        self._has_warned = False
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)

    def add(self, *, predicted_s: float, measured_s: float) -> Drift | None:
        """Add one step. Seconds are from gathered parameters to the end of the slowest rank's last microbatch."""
        self._num_seen += 1
        if self._num_seen > WARM_UP_STEPS and predicted_s > 0:
            self._window.append((predicted_s, measured_s))
        return drift_of(tuple(self._window), self._factor)

    def is_news(self, drift: Drift | None) -> bool:
        """Whether to warn: True only the first time that the cost model is off."""
        if drift is None or not drift.is_off or self._has_warned:
            return False
        self._has_warned = True
        return True


def drift_of(pairs: SequenceOf[tuple[float, float]], factor: float) -> Drift | None:
    """The verdict on (predicted, measured) seconds of steps; None if there are too few."""
    if len(pairs) < MIN_STEPS:
        return None
    return Drift(ratio=median_ratio(pairs), num_steps=len(pairs), factor=factor)


def planned_passes(plan: StepPlan) -> tuple[Pass, ...]:
    """When each microbatch runs by the plan; with pipeline stages, its forward and backward on the first stage."""
    work = [StageWork(ranks=microbatch.ranks, seconds=microbatch.predicted_s) for microbatch in plan.microbatches]
    return play(work, sharding=plan.sharding, num_stages=plan.num_stages)


def planned_times(plan: StepPlan) -> tuple[tuple[float, float], ...]:
    """(start, stop) seconds of each microbatch, from its forward's start to its backward's end."""
    passes = planned_passes(plan)
    starts_s = {each.microbatch: each.start_s for each in passes if each.holds}
    stops_s = {each.microbatch: each.stop_s for each in passes if each.frees}
    return tuple((starts_s[index], stops_s[index]) for index in range(len(plan.microbatches)))


def planned_span_s(plan: StepPlan) -> float:
    """Predicted seconds from gathered parameters to the end of the last microbatch."""
    return max((stop_s for _, stop_s in planned_times(plan)), default=0.0)


def group_samples(steps: SequenceOf[Executed]) -> list[GroupSample]:
    """Measured microbatches of a single group without recompute or chunks: their time is the cost of one (kind, degree)
    alone."""
    found = []
    for plan, measured in steps:
        for index, seconds in measured.microbatch_s().items():
            groups, memory = plan.microbatches[index].groups, plan.microbatches[index].memory
            again = memory.recompute_fraction > 0 or memory.chunk_tokens > 0
            if len(groups) == 1 and seconds > 0 and not again:
                lengths = tuple(plan.sequences[sequence].num_tokens for sequence in groups[0].sequences)
                found.append(
                    GroupSample(kind=groups[0].kind, degree=groups[0].degree, lengths=lengths, seconds=seconds)
                )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A cost model refitted to measured microbatches. ``error_before``, ``error_after``: mean of
    |predicted / measured - 1| with the old and the new model."""

    cost: CostModel
    num_samples: int
    error_before: float
    error_after: float


def refit_cost(cost: CostModel, steps: SequenceOf[Executed]) -> Refit | None:
    """``cost`` adapted to measured steps; None if they have fewer than MIN_SAMPLES usable microbatches.

    A run's plans use few shapes, so the old model serves as the prior. First each (kind, degree) is scaled by its
    median ratio of measured to predicted seconds; those without samples are scaled by the median of all. Then each of
    its four terms is fitted to the samples, where doubling a term counts as much as one sample that is 100 % off. The
    fixed part of a step is the median of the measured ones; memory does not change. The run's first WARM_UP_STEPS and
    steps planned with another cost model (a run resumed with other ranks) are left out. The result depends only on the
    arguments.
    """
    digest = cost.digest
    steps = [
        (plan, measured) for plan, measured in steps if plan.step >= WARM_UP_STEPS and plan.cost_digest == digest
    ]
    priced = [sample for sample in group_samples(steps) if sample.degree in cost.degrees(sample.kind)]
    pairs = [(cost.group_s(sample.kind, sample.degree, sample.lengths), sample) for sample in priced]
    pairs = [(predicted_s, sample) for predicted_s, sample in pairs if predicted_s > 0]
    if len(pairs) < MIN_SAMPLES:
        return None
    overall = median_ratio([(predicted_s, sample.seconds) for predicted_s, sample in pairs])
    kept = [(p, s) for p, s in pairs if overall / _OUTLIER <= s.seconds / p <= overall * _OUTLIER]
    by_shape: dict[tuple[AttentionKind, int], list[tuple[float, GroupSample]]] = {}
    for predicted_s, sample in kept:
        by_shape.setdefault((sample.kind, sample.degree), []).append((predicted_s, sample))
    times = tuple(_refit_shape(fit, by_shape.get((fit.kind, fit.degree), []), overall) for fit in cost.times)
    new = replace(cost, times=times, step_fixed_s=statistics.median(step.fixed_s for _, step in steps))
    samples = [sample for _, sample in kept]
    before, after = _errors(cost, samples), _errors(new, samples)
    numbers = [step.step for _, step in steps]
    origin = replace(
        cost.provenance, num_samples=len(samples), mean_relative_error=statistics.fmean(after),
        max_relative_error=max(after),
        notes=(
            *(note for note in cost.provenance.notes if not note.startswith("refitted ")),
            f"refitted to {len(samples)} microbatches of training steps {min(numbers)} to {max(numbers)}",
        ),
    )
    return Refit(
        cost=replace(new, provenance=origin), num_samples=len(samples), error_before=statistics.fmean(before),
        error_after=statistics.fmean(after),
    )


def _refit_shape(fit: TimeFit, samples: SequenceOf[tuple[float, GroupSample]], overall: float) -> TimeFit:
    ratio = median_ratio([(predicted_s, sample.seconds) for predicted_s, sample in samples]) if samples else overall
    scaled = [ratio * price for price in fit.prices]
    factors: tuple[float, ...] = (1.0,) * len(scaled)
    if samples:
        rows = [
            tuple(price * amount for price, amount in zip(scaled, group_features(sample.lengths), strict=True))
            for _, sample in samples
        ]
        prior = [tuple(float(row == column) for column in range(len(scaled))) for row in range(len(scaled))]
        factors = non_negative_fit(
            [*rows, *prior], [*(sample.seconds for _, sample in samples), *(1.0 for _ in prior)],
            # relative to predictions, not measurements, so that errors cancel out in the mean
            scales=[*(ratio * predicted_s for predicted_s, _ in samples), *(1.0 for _ in prior)],
        )
    return fit.with_prices([price * factor for price, factor in zip(scaled, factors, strict=True)])


def _errors(cost: CostModel, samples: SequenceOf[GroupSample]) -> list[float]:
    return [abs(cost.group_s(each.kind, each.degree, each.lengths) / each.seconds - 1) for each in samples]
