"""Which setting to change next: plans a step several times, each time with one change.

Both sides of a comparison use the same planner: the plan's own for small steps, else the greedy one, with other gains.
Gains are in tokens per second, because some changes alter the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, SpecError
from planner.inputs.cluster import ClusterSpec
from planner.plan import AttentionKind, MemoryAction, StepPlan
from planner.pricing.problem import StepProblem
from planner.step_planner import greedy_step, plan_step
from planner.units import format_bytes

SMALLEST_GAIN = 0.01
GREEDY = "greedy"
MAX_PLANNED_WORK, MAX_WORK = 50_000, 20_000_000
"""Limits for ranks times sequences: above the first, changes are tried with the greedy planner only; above the second,
not at all. Either way trying them takes a few seconds."""
MAX_NODES = 20
"""Branch-and-bound nodes on both sides of a comparison, because a solver's last percent takes most of its time."""

Pricing = Callable[[ClusterSpec, int, int], CostModel]
"""The cost model for a cluster, a budget (bytes per device) and a longest sequence (tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The inputs of one plan, and what was changed in them, in words. ``rank_devices``: devices of one data rank.
    ``strategy``: one of ``STRATEGIES`` or ``GREEDY``. ``degree``: for strategy static."""

    change: str
    cluster: ClusterSpec
    limits: PlanLimits
    lengths: tuple[int, ...]
    rank_devices: int = 1
    strategy: str = GREEDY
    degree: int | None = None

    @property
    def num_ranks(self) -> int:
        """Number of data ranks."""
        return self.cluster.num_ranks // self.rank_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A change and its gain: tokens per second after over before, minus 1; and the same per device."""

    change: str
    gain: float
    gain_per_device: float


def best_knobs(start: Scenario, pricing: Pricing, *, num_knobs: int = 3) -> tuple[Knob, ...] | None:
    """The changes with the largest gains, best first. None if trying them would take too long, or if the strategy has
    no plan to start from."""
    if start.num_ranks * len(start.lengths) > MAX_WORK:
        return None
    try:
        before = _tokens_per_s(start, pricing)
    except (InfeasibleError, SpecError):
        return None
    found = []
    for scenario in _changes(start):
        try:
            gain = _tokens_per_s(scenario, pricing) / before
        except (InfeasibleError, SpecError):
            continue  # impossible here (no room, no such group), so not recommended
        per_device = gain * start.cluster.num_ranks / scenario.cluster.num_ranks
        found.append(Knob(change=scenario.change, gain=gain - 1, gain_per_device=per_device - 1))
    found.sort(key=lambda knob: -knob.gain)
    return tuple(knob for knob in found[:num_knobs] if knob.gain >= SMALLEST_GAIN)


def usual_planner(strategy: str, num_ranks: int, num_sequences: int) -> str:
    """The strategy itself, or ``GREEDY`` if planning several times with it would take too long."""
    return strategy if num_ranks * num_sequences <= MAX_PLANNED_WORK else GREEDY


def _tokens_per_s(scenario: Scenario, pricing: Pricing) -> float:
    cost = pricing(scenario.cluster, scenario.limits.device_budget_bytes, max(scenario.lengths))
    if not cost.prices_policies and set(scenario.limits.policies) - {MemoryAction.KEEP}:
        raise SpecError("nothing but keeping activations is priced")
    plan = _plan(scenario, cost)
    return plan.num_tokens / plan.predicted_s


def _plan(scenario: Scenario, cost: CostModel) -> StepPlan:
    limits = replace(scenario.limits, max_nodes=min(scenario.limits.max_nodes, MAX_NODES))
    problem = StepProblem(lengths=scenario.lengths, num_ranks=scenario.num_ranks, cost=cost, limits=limits)
    if scenario.strategy == GREEDY:
        return greedy_step(problem, step=0)
    return plan_step(problem, step=0, strategy=scenario.strategy, degree=scenario.degree)


def _changes(start: Scenario) -> Iterator[Scenario]:
    cluster, limits, lengths = start.cluster, start.limits, start.lengths
    budget = limits.device_budget_bytes * 5 // 4
    yield replace(
        start, limits=replace(limits, device_budget_bytes=budget),
        change=f"25 % more memory per device ({format_bytes(limits.device_budget_bytes)} -> {format_bytes(budget)})",
    )
    if set(limits.policies) <= {MemoryAction.KEEP}:
        free = replace(limits, policies=tuple(MemoryAction))
        yield replace(start, limits=free, change="--memory auto (swap, recompute, chunks)")
    nodes = 2 * cluster.num_nodes
    yield replace(start, cluster=replace(cluster, num_nodes=nodes), change=f"twice the nodes ({nodes})")
    yield replace(start, lengths=lengths * 2, change=f"twice the sequences per step ({2 * len(lengths)})")
    half = max(lengths) // 2
    kept = tuple(length for length in lengths if length <= half)
    if kept:
        yield replace(
            start, lengths=kept, change=f"--max-length {half} ({len(lengths) - len(kept)} of {len(lengths)} dropped)"
        )
    yield from _link_changes(start)
    for kind in (AttentionKind.ULYSSES, AttentionKind.RING):
        if kind not in limits.kinds:
            yield replace(
                start, limits=replace(limits, kinds=(*limits.kinds, kind)), change=f"{kind} attention allowed as well"
            )


def _link_changes(start: Scenario) -> Iterator[Scenario]:
    cluster = start.cluster
    intra, inter = cluster.intra_node, cluster.inter_node
    if cluster.num_nodes > 1:
        faster = replace(cluster, inter_node=replace(inter, bytes_per_s=2 * inter.bytes_per_s))
        yield replace(start, cluster=faster, change="network between nodes twice as fast")
    else:
        faster = replace(cluster, intra_node=replace(intra, bytes_per_s=2 * intra.bytes_per_s))
        yield replace(start, cluster=faster, change="links inside the node twice as fast")
