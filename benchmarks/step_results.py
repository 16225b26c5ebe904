"""What a step benchmark measured, and the arithmetic on it: throughput, ratios within the run, error of prediction."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.box import BoxSpec
from planner.cost import Provenance

FLEXSP = "flexsp"
BATCH_BEST = "static, best of each batch"
RING_ALL = "one ring of all ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What to run. ``capacity_tokens``: tokens of one microbatch that a rank can hold; everything else follows.

    ``strategies``: compared with the static ones. ``box``: run in a cluster in a box instead of on the bare machine.
    """

    num_ranks: int
    num_batches: int
    tokens_per_batch: int
    max_length: int
    capacity_tokens: int
    attention: str
    model: str
    seed: int
    strategies: tuple[str, ...] = (FLEXSP,)
    box: BoxSpec | None = None

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks if self.box is None else self.box.ranks_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One batch, planned by one strategy and executed once. ``winner``: which search found the plan.
    ``work``: digest of the microbatches; two steps of a batch with the same one executed the very same thing."""

    batch: int
    strategy: str
    num_tokens: int
    predicted_s: float
    measured_s: float
    plan_s: float
    gap: float
    status: str
    winner: str
    work: str
    loss: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; above 0: predicted too slow."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """A whole run. ``misfits``: strategies that cannot run every batch, with the number of batches they cannot.
    ``num_threads``: compute threads of each rank."""

    settings: StepSettings
    batches: tuple[tuple[int, ...], ...]
    budget_bytes: int
    cost_origin: Provenance
    steps: tuple[MeasuredStep, ...]
    misfits: tuple[tuple[str, int], ...]
    num_threads: int
    load_before: float
    load_after: float

    def strategies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(step.strategy for step in sorted(self.steps, key=lambda step: step.batch)))

    def of(self, strategy: str) -> tuple[MeasuredStep, ...]:
        """The steps of one strategy, by batch."""
        return tuple(sorted((s for s in self.steps if s.strategy == strategy), key=lambda step: step.batch))


def static_name(degree: int) -> str:
    return f"static {degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySummary:
    """Means over batches, except ``tokens_per_s`` (all tokens / all seconds) and ``median_tokens_per_s``."""

    strategy: str
    tokens_per_s: float
    median_tokens_per_s: float
    predicted_s: float
    measured_s: float
    absolute_error: float
    signed_error: float
    plan_s: float
    gap: float


def summarise(run: StepRun, strategy: str) -> StrategySummary:
    """One line of the result. ``absolute_error``: mean of |predicted / measured - 1|."""
    steps = run.of(strategy)
    mean = statistics.fmean
    return StrategySummary(
        strategy=strategy,
        tokens_per_s=sum(step.num_tokens for step in steps) / sum(step.measured_s for step in steps),
        median_tokens_per_s=statistics.median(step.num_tokens / step.measured_s for step in steps),
        predicted_s=mean(step.predicted_s for step in steps),
        measured_s=mean(step.measured_s for step in steps),
        absolute_error=mean(abs(step.error) for step in steps),
        signed_error=mean(step.error for step in steps),
        plan_s=mean(step.plan_s for step in steps),
        gap=mean(step.gap for step in steps),
    )


def best_static(run: StepRun) -> str:
    """The fixed layout with the most tokens per second over the whole run."""
    degrees = [name for name in run.strategies() if name not in (*run.settings.strategies, BATCH_BEST)]
    return max(degrees, key=lambda name: summarise(run, name).tokens_per_s)


def speedups(run: StepRun, strategy: str, baseline: str) -> tuple[float, ...]:
    """How many times faster than ``baseline`` each batch ran: the two shared the batch and the minute."""
    pairs = zip(run.of(strategy), run.of(baseline), strict=True)
    return tuple(other.measured_s / mine.measured_s for mine, other in pairs)


def predicted_speedups(run: StepRun, strategy: str, baseline: str) -> tuple[float, ...]:
    """The same as the cost model foresaw it."""
    pairs = zip(run.of(strategy), run.of(baseline), strict=True)
    return tuple(other.predicted_s / mine.predicted_s for mine, other in pairs)


def repeat_differences(run: StepRun) -> tuple[float, ...]:
    """Relative differences of the measured seconds of steps that executed the very same plan: nothing but noise."""
    differences = []
    for number, mine in enumerate(run.steps):
        for other in run.steps[number + 1 :]:
            if (mine.batch, mine.work) == (other.batch, other.work):
                differences.append(abs(mine.measured_s - other.measured_s) / min(mine.measured_s, other.measured_s))
    return tuple(differences)


def loss_spread(run: StepRun) -> float:
    """Largest relative difference between two strategies' losses on one batch: they must have done the same work."""
    spreads = []
    for batch in range(len(run.batches)):
        losses = [step.loss for step in run.steps if step.batch == batch]
        spreads.append((max(losses) - min(losses)) / max(losses))
    return max(spreads)
