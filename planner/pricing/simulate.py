"""What a plan costs under a cost model: seconds per rank, idle share and peak bytes. Legality is not checked.

``planner.pricing.microbatch`` prices each microbatch and ``planner.pricing.timeline`` says when each runs, in the
plan's one global order. A microbatch keeps all of its ranks busy until it ends; without zero3 or pipeline stages it
waits for its own ranks only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.cost.model import CostModel
from planner.plan import Sharding, StepPlan
from planner.pricing.microbatch import (
    MicrobatchPrice,
    price_microbatch,
)
from planner.pricing.pipeline_order import StageWork
from planner.pricing.timeline import play


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One rank works on one microbatch (its place in the plan) from ``start_s`` to ``stop_s``. With pipeline stages the
    events are those of the rank's first stage, with forward and backward as two events."""

    microbatch: int
    rank: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A priced step.

    - ``step_s``: the last finish plus the cost model's ``step_fixed_s``, which the other times leave out. In lockstep
      all ranks finish together.
    - ``idle_fraction``: share of all rank seconds, up to the last finish, that is spent without work.
    - ``rank_peak_bytes``, ``rank_host_bytes``: peak bytes on each rank's device and on its host.

    With pipeline stages everything but the finish is that of the first stage, which holds the most; the other stages
    are busy for as long.
    """

    step_s: float
    rank_busy_s: tuple[float, ...]
    rank_finish_s: tuple[float, ...]
    idle_fraction: float
    rank_peak_bytes: tuple[int, ...]
    rank_host_bytes: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.rank_peak_bytes)


def step_lengths(plan: StepPlan) -> tuple[int, ...]:
    """Tokens of the step's sequences by index (in a legal plan a sequence's index is its place)."""
    return tuple(sequence.num_tokens for sequence in plan.sequences)


def run_schedule(prices: Iterable[MicrobatchPrice], *, num_ranks: int, cost: CostModel) -> Simulation:
    """Play priced microbatches in this order on ``num_ranks`` ranks."""
    busy_s, finish_s = [0.0] * num_ranks, [0.0] * num_ranks
    held_bytes, peak_bytes = [0.0] * num_ranks, [0.0] * num_ranks
    swapped_bytes, host_bytes = [0] * num_ranks, [0] * num_ranks
    events: list[Event] = []
    played = list(prices)
    work = [StageWork(ranks=price.ranks, seconds=price.seconds) for price in played]
    for each in play(work, sharding=cost.sharding, num_stages=cost.num_stages):
        price, start_s, stop_s = played[each.microbatch], each.start_s, each.stop_s
        in_chunks = price.memory.chunk_tokens > 0
        token_bytes = 0.0 if in_chunks else cost.token_bytes(price.memory)
        for rank, tokens in zip(price.ranks, price.rank_tokens, strict=True):
            own_bytes = price.held_bytes(tokens, cost) if in_chunks else token_bytes * tokens
            busy_s[rank] += stop_s - start_s if cost.num_stages > 1 else price.seconds
            finish_s[rank] = stop_s
            held = held_bytes[rank] + (own_bytes if each.holds else 0.0)
            peak_bytes[rank] = max(peak_bytes[rank], held)
            held_bytes[rank] = held - (own_bytes if each.frees else 0.0)
            if price.memory.swap_fraction:
                own_host_bytes = cost.host_bytes(tokens, price.memory)
                swapped = swapped_bytes[rank] + (own_host_bytes if each.holds else 0)
                host_bytes[rank] = max(host_bytes[rank], swapped)
                swapped_bytes[rank] = swapped - (own_host_bytes if each.frees else 0)
            events.append(Event(microbatch=each.microbatch, rank=rank, start_s=start_s, stop_s=stop_s))
    last_s = max(finish_s)
    if cost.sharding is Sharding.ZERO3:
        finish_s = [last_s] * num_ranks
    return Simulation(
        step_s=last_s + cost.step_fixed_s,
        rank_busy_s=tuple(busy_s),
        rank_finish_s=tuple(finish_s),
        idle_fraction=max(0.0, 1.0 - sum(busy_s) / (num_ranks * last_s)) if last_s > 0 else 0.0,
        rank_peak_bytes=tuple(
            max(int(cost.memory.fixed_bytes + held), cost.memory.update_bytes) for held in peak_bytes
        ),
        rank_host_bytes=tuple(host_bytes),
        events=tuple(events),
    )


def simulate(plan: StepPlan, cost: CostModel) -> Simulation:
    """Simulate a legal plan (see ``planner.pricing.verify``). Raises PlanError on a group that the cost model does not
    price."""
    lengths = step_lengths(plan)
    prices = (price_microbatch(microbatch, lengths, cost) for microbatch in plan.microbatches)
    return run_schedule(prices, num_ranks=plan.num_ranks, cost=cost)
