"""What a plan costs under a cost model: seconds per rank, idle share, peak bytes. Says nothing about legality.

Microbatches run in the plan's one global order. A microbatch starts when all of its ranks are free, keeps every one of
them busy until it ends, and waits for nobody else: there is no barrier between microbatches. A rank in several groups
of one microbatch runs them one after the other; the microbatch lasts as long as its slowest rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.cost import CostModel
from planner.layout import local_token_counts
from planner.plan import AttentionGroup, Microbatch, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One rank at work on one microbatch (its place in the plan) from ``start_s`` to ``stop_s``."""

    microbatch: int
    rank: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A priced step. ``idle_fraction``: share of all rank seconds, up to the last finish, spent without work.

    ``step_s`` is the last finish plus the cost model's ``step_fixed_s``; the other times leave the fixed part out.
    """

    step_s: float
    rank_busy_s: tuple[float, ...]
    rank_finish_s: tuple[float, ...]
    idle_fraction: float
    rank_peak_bytes: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.rank_peak_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPrice:
    """Seconds of one microbatch and the tokens each of its ranks holds, in the order of ``ranks``."""

    seconds: float
    ranks: tuple[int, ...]
    rank_tokens: tuple[int, ...]

    def peak_bytes(self, cost: CostModel) -> int:
        """Peak bytes of the fullest rank."""
        return cost.device_bytes(max(self.rank_tokens))


def step_lengths(plan: StepPlan) -> tuple[int, ...]:
    """Tokens of the step's sequences by index (in a legal plan a sequence's index is its place)."""
    return tuple(sequence.num_tokens for sequence in plan.sequences)


def price_groups(
    ranks: tuple[int, ...], groups: Iterable[AttentionGroup], lengths: SequenceOf[int], cost: CostModel
) -> MicrobatchPrice:
    """Price one microbatch of these ranks and groups; ``lengths[i]`` are the tokens of sequence i.

    Raises PlanError where the cost model has no coefficients for a group's kind and degree.
    """
    seconds, tokens = dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0)
    for group in groups:
        sizes = [lengths[index] for index in group.sequences]
        group_s = cost.group_s(group.kind, group.degree, sizes)
        counts = local_token_counts(group.kind, group.degree, sizes, group.inner_degree)
        for rank, count in zip(group.ranks, counts, strict=True):
            seconds[rank] += group_s
            tokens[rank] += count
    return MicrobatchPrice(
        seconds=max(seconds.values()), ranks=tuple(tokens), rank_tokens=tuple(tokens.values())
    )


def price_microbatch(microbatch: Microbatch, lengths: SequenceOf[int], cost: CostModel) -> MicrobatchPrice:
    """``price_groups`` of a plan's microbatch."""
    return price_groups(microbatch.ranks, microbatch.groups, lengths, cost)


def run_schedule(prices: Iterable[MicrobatchPrice], *, num_ranks: int, cost: CostModel) -> Simulation:
    """Play priced microbatches in this order on ``num_ranks`` ranks."""
    busy_s, finish_s = [0.0] * num_ranks, [0.0] * num_ranks
    peak_tokens = [0] * num_ranks
    events: list[Event] = []
    for index, price in enumerate(prices):
        start_s = max(finish_s[rank] for rank in price.ranks)
        stop_s = start_s + price.seconds
        for rank, tokens in zip(price.ranks, price.rank_tokens, strict=True):
            busy_s[rank] += price.seconds
            finish_s[rank] = stop_s
            peak_tokens[rank] = max(peak_tokens[rank], tokens)
            events.append(Event(microbatch=index, rank=rank, start_s=start_s, stop_s=stop_s))
    last_s = max(finish_s)
    return Simulation(
        step_s=last_s + cost.step_fixed_s,
        rank_busy_s=tuple(busy_s),
        rank_finish_s=tuple(finish_s),
        idle_fraction=max(0.0, 1.0 - sum(busy_s) / (num_ranks * last_s)) if last_s > 0 else 0.0,
        rank_peak_bytes=tuple(cost.device_bytes(tokens) for tokens in peak_tokens),
        events=tuple(events),
    )


def simulate(plan: StepPlan, cost: CostModel) -> Simulation:
    """Price a legal plan (see ``planner.verify``). Raises PlanError on a group the cost model cannot price."""
    lengths = step_lengths(plan)
    prices = (price_microbatch(microbatch, lengths, cost) for microbatch in plan.microbatches)
    return run_schedule(prices, num_ranks=plan.num_ranks, cost=cost)
