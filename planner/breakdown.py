"""Where the seconds of a step and the bytes of its fullest rank go."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.cluster import ClusterSpec, LinkSpec
from planner.cost import CostModel
from planner.plan import StepPlan
from planner.simulate import Simulation, price_microbatch, step_lengths

_FREE_LINK = LinkSpec(bytes_per_s=1e30, latency_s=0.0, source="free")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Seconds of one step, averaged over the ranks; the four add up to the step.

    ``communication_s``: exposed exchanges and copies of the microbatches, None where the cost model was measured as a
    whole and cannot tell them from ``work_s``. ``waiting_s``: for slower ranks, inside microbatches and at the end.
    ``fixed_s``: gather, reduction and optimizer, once a step.
    """

    work_s: float
    communication_s: float | None
    waiting_s: float
    fixed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySplit:
    """Bytes of the fullest rank. ``headroom_bytes``: what the budget leaves."""

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
    """The same cluster with links, the hosts' included, that take no time: what a step costs there, it costs without
    communication."""
    host = replace(cluster.host, copy_bytes_per_s=_FREE_LINK.bytes_per_s)
    return replace(cluster, host=host, intra_node=_FREE_LINK, inter_node=_FREE_LINK)


def time_split(plan: StepPlan, simulation: Simulation, cost: CostModel, free_cost: CostModel | None) -> TimeSplit:
    """``free_cost``: the same cost model over ``free_links``, None where there is none."""
    lengths = step_lengths(plan)

    def mean_rank_s(model: CostModel) -> float:
        prices = (price_microbatch(microbatch, lengths, model) for microbatch in plan.microbatches)
        return sum(sum(price.rank_s) for price in prices) / plan.num_ranks

    busy_s = mean_rank_s(cost)
    work_s = busy_s if free_cost is None else mean_rank_s(free_cost)
    return TimeSplit(
        work_s=work_s,
        communication_s=None if free_cost is None else busy_s - work_s,
        waiting_s=max(simulation.rank_finish_s) - busy_s,
        fixed_s=cost.step_fixed_s,
    )


def memory_split(simulation: Simulation, cost: CostModel, budget_bytes: int) -> MemorySplit:
    """Of the first of the fullest ranks."""
    peak_bytes = max(simulation.rank_peak_bytes)
    return MemorySplit(
        rank=simulation.rank_peak_bytes.index(peak_bytes),
        fixed_bytes=cost.memory.fixed_bytes,
        activation_bytes=peak_bytes - cost.memory.fixed_bytes,
        budget_bytes=budget_bytes,
    )
