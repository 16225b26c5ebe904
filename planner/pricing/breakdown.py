"""What the seconds of a step and the bytes of its fullest rank are spent on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.cost.model import KEEP, CostModel
from planner.inputs.cluster import ClusterSpec, LinkSpec
from planner.plan import Microbatch, StepPlan
from planner.pricing.microbatch import price_microbatch
from planner.pricing.simulate import Simulation, step_lengths

_FREE_LINK = LinkSpec(bytes_per_s=1e30, latency_s=0.0, source="free")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Seconds of one step, averaged over the ranks. The six fields add up to the step.

    - ``communication_s``: exposed exchanges of the microbatches. None where the cost model was measured as a whole and
      cannot tell them from ``work_s``.
    - ``recompute_s``: recomputation of activations.
    - ``swap_s``: exposed copies to and from the host.
    - ``waiting_s``: waiting for slower ranks, inside microbatches and at the end.
    - ``fixed_s``: gather, reduction and optimizer, once a step.
    """

    work_s: float
    communication_s: float | None
    recompute_s: float
    swap_s: float
    waiting_s: float
    fixed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySplit:
    """Bytes of the fullest rank. ``headroom_bytes``: what is left of the budget."""

    rank: int
    fixed_bytes: int
    activation_bytes: int
    budget_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.fixed_bytes + self.activation_bytes

    @property
    def headroom_bytes(self) -> int:
        return self.budget_bytes - self.peak_bytes


def free_links(cluster: ClusterSpec) -> ClusterSpec:
    """The same cluster with links that take no time. A step's price there is its price without communication."""
    return replace(cluster, intra_node=_FREE_LINK, inter_node=_FREE_LINK)


def time_split(plan: StepPlan, simulation: Simulation, cost: CostModel, free_cost: CostModel | None) -> TimeSplit:
    """Split the seconds of a simulated plan. ``free_cost``: the cost model derived for ``free_links``, None where there
    is none."""
    lengths = step_lengths(plan)

    kept = [replace(microbatch, memory=KEEP) for microbatch in plan.microbatches]

    def mean_rank_s(model: CostModel, microbatches: Iterable[Microbatch]) -> float:
        prices = (price_microbatch(microbatch, lengths, model) for microbatch in microbatches)
        return sum(sum(price.rank_s) for price in prices) / plan.num_ranks

    busy_s, kept_s = mean_rank_s(cost, plan.microbatches), mean_rank_s(cost, kept)
    copied_s = busy_s
    if cost.activation is not None:
        quick = replace(cost.activation, copy_bytes_per_s=_FREE_LINK.bytes_per_s)
        copied_s = mean_rank_s(replace(cost, activation=quick), plan.microbatches)
    work_s = kept_s if free_cost is None else mean_rank_s(free_cost, kept)
    return TimeSplit(
        work_s=work_s,
        communication_s=None if free_cost is None else kept_s - work_s,
        recompute_s=max(0.0, copied_s - kept_s),
        swap_s=max(0.0, busy_s - copied_s),
        waiting_s=max(simulation.rank_finish_s) - busy_s,
        fixed_s=cost.step_fixed_s,
    )


def memory_split(simulation: Simulation, cost: CostModel, budget_bytes: int) -> MemorySplit:
    """The bytes of the fullest rank, the first among equals."""
    peak_bytes = max(simulation.rank_peak_bytes)
    return MemorySplit(
        rank=simulation.rank_peak_bytes.index(peak_bytes),
        fixed_bytes=cost.memory.fixed_bytes,
        activation_bytes=peak_bytes - cost.memory.fixed_bytes,
        budget_bytes=budget_bytes,
    )
