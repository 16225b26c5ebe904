"""What the step benchmark measured, and figures from it: throughput, ratios within the run, prediction errors."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.box import BoxSpec
from planner.cost.fits import Provenance

FLEXSP = "flexsp"
BATCH_BEST = "static, best of each batch"
RING_ALL = "one ring of all ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What to run. ``capacity_tokens``: tokens of one microbatch that a rank can hold; it sets the device budget.

    ``strategies`` are compared with static layouts and with ``peers`` (names in ``benchmarks.peers.systems.PEERS``).
    ``box``: run in this cluster in a box (None: on the bare machine).
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
    peers: tuple[str, ...] = ()
    box: BoxSpec | None = None

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks if self.box is None else self.box.ranks_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One batch, planned by one strategy and executed once. ``winner``: the search that found the plan. ``work``:
    digest of the microbatches; steps of a batch with equal digests executed exactly the same work."""

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
        """Relative error of the prediction; positive where the step was faster than predicted."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPeerStep:
    """One batch, packed and run as a peer does it. ``num_microbatches``: those of the group with the most."""

    batch: int
    peer: str
    num_tokens: int
    num_padding_tokens: int
    num_microbatches: int
    pack_s: float
    measured_s: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCheck:
    """A peer's first batch compared with Longhaul's: relative errors of the loss and of the worst parameter's gradient.
    ``gradients_meant_right``: False where the peer is known to compute wrong gradients."""

    name: str
    loss_error: float
    gradient_error: float
    gradients_meant_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMisfit:
    """A degree at which a peer cannot run, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """A whole run. ``misfits``: strategies that cannot run every batch, with the number of batches that they cannot
    run. ``num_threads``: compute threads of each rank."""

    settings: StepSettings
    batches: tuple[tuple[int, ...], ...]
    budget_bytes: int
    cost_origin: Provenance
    steps: tuple[MeasuredStep, ...]
    misfits: tuple[tuple[str, int], ...]
    num_threads: int
    load_before: float
    load_after: float
    peer_steps: tuple[MeasuredPeerStep, ...] = ()
    peer_checks: tuple[PeerCheck, ...] = ()
    peer_misfits: tuple[PeerMisfit, ...] = ()

    def strategies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(step.strategy for step in sorted(self.steps, key=lambda step: step.batch)))

    def of(self, strategy: str) -> tuple[MeasuredStep, ...]:
        """The steps of one strategy, by batch."""
        return tuple(sorted((s for s in self.steps if s.strategy == strategy), key=lambda step: step.batch))

    def peers(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.peer_checks)

    def of_peer(self, peer: str) -> tuple[MeasuredPeerStep, ...]:
        """The steps of one peer at one degree, by batch."""
        return tuple(sorted((s for s in self.peer_steps if s.peer == peer), key=lambda step: step.batch))


def static_name(degree: int) -> str:
    return f"static {degree}"


def peer_name(peer: str, degree: int) -> str:
    return f"{peer} {degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySummary:
    """Means over the batches, except ``tokens_per_s`` (all tokens / all seconds) and ``median_tokens_per_s``."""

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
    """One strategy's line of the result. ``absolute_error``: mean of |predicted / measured - 1|."""
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
    """The static layout with the most tokens per second over the whole run."""
    degrees = [name for name in run.strategies() if name not in (*run.settings.strategies, BATCH_BEST)]
    return max(degrees, key=lambda name: summarise(run, name).tokens_per_s)


def speedups(run: StepRun, strategy: str, baseline: str) -> tuple[float, ...]:
    """How many times faster than ``baseline`` each batch ran; the two ran it shortly after each other."""
    pairs = zip(run.of(strategy), run.of(baseline), strict=True)
    return tuple(other.measured_s / mine.measured_s for mine, other in pairs)


def peer_tokens_per_s(run: StepRun, peer: str) -> float:
    """Tokens per second of a peer over the whole run; padding is not counted."""
    steps = run.of_peer(peer)
    return sum(step.num_tokens for step in steps) / sum(step.measured_s for step in steps)


def best_peer(run: StepRun) -> str:
    """The peer and degree with the most tokens per second over the whole run."""
    return max(run.peers(), key=lambda name: peer_tokens_per_s(run, name))


def peer_speedups(run: StepRun, strategy: str, peer: str | None = None) -> tuple[float, ...]:
    """How many times faster than ``peer`` each batch ran. ``peer`` None: than the batch's fastest peer."""
    names = run.peers() if peer is None else (peer,)
    fastest_s = [min(step.measured_s for step in batch) for batch in zip(*map(run.of_peer, names), strict=True)]
    return tuple(other_s / mine.measured_s for mine, other_s in zip(run.of(strategy), fastest_s, strict=True))


def planned_errors(run: StepRun) -> tuple[float, ...]:
    """Relative errors of the predicted times of the compared strategies' plans. A plan that several strategies chose
    for a batch counts once, with its mean measured time."""
    found: dict[tuple[int, str], list[MeasuredStep]] = {}
    for step in run.steps:
        if step.strategy in run.settings.strategies:
            found.setdefault((step.batch, step.work), []).append(step)
    return tuple(
        steps[0].predicted_s / statistics.fmean(step.measured_s for step in steps) - 1 for steps in found.values()
    )


def predicted_speedups(run: StepRun, strategy: str, baseline: str) -> tuple[float, ...]:
    """``speedups`` by predicted instead of measured times."""
    pairs = zip(run.of(strategy), run.of(baseline), strict=True)
    return tuple(other.predicted_s / mine.predicted_s for mine, other in pairs)


def repeat_differences(run: StepRun) -> tuple[float, ...]:
    """Relative differences of the measured seconds of steps that executed exactly the same work, so only noise."""
    differences = []
    for number, mine in enumerate(run.steps):
        for other in run.steps[number + 1 :]:
            if (mine.batch, mine.work) == (other.batch, other.work):
                differences.append(abs(mine.measured_s - other.measured_s) / min(mine.measured_s, other.measured_s))
    return tuple(differences)


def loss_spread(run: StepRun) -> float:
    """Largest relative difference of losses within a batch. A small one shows that all did the same work."""
    spreads = []
    for batch in range(len(run.batches)):
        losses = [step.loss for step in run.steps if step.batch == batch]
        losses += [step.loss for step in run.peer_steps if step.batch == batch]
        spreads.append((max(losses) - min(losses)) / max(losses))
    return max(spreads)
