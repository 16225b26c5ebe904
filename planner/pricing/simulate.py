"""What a plan costs under a cost model: seconds per rank, idle share, peak bytes. Says nothing about legality.

Microbatches run in the plan's one global order, as ``planner.pricing.timeline`` plays them: one keeps all of its ranks
busy until it ends, and without zero3 or pipeline stages it waits for nobody but them. A rank in several groups of one
microbatch runs their attention one after the other inside each layer: it takes their marginal seconds together and,
since layers are launched once, the largest of their fixed times. Moves for the token-wise layers change who does them,
for the time of the exchange. Recomputing and what a copy to the host exposes come on top; chunks have prices of their
own. The microbatch lasts as long as its slowest rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.cost.fits import TimeFit
from planner.cost.model import KEEP, CostModel
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, MemoryPolicy, Microbatch, Sharding, StepPlan
from planner.pricing.pipeline_order import StageWork
from planner.pricing.timeline import play
from planner.schedules.layout import local_token_counts
from planner.schedules.linear_layout import linear_counts
from planner.schedules.remap import Move


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One rank at work on one microbatch (its place in the plan) from ``start_s`` to ``stop_s``. With pipeline stages:
    the rank's first stage, forward and backward apart."""

    microbatch: int
    rank: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A priced step. ``idle_fraction``: share of all rank seconds, up to the last finish, spent without work.

    ``step_s`` is the last finish plus the cost model's ``step_fixed_s``; the other times leave the fixed part out. In
    lockstep all ranks finish together. ``rank_host_bytes``: most that a rank's microbatches have on its host at once.
    With pipeline stages all but the finish is that of the first stage, which holds the most; the others are busy for as
    long.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPrice:
    """One microbatch: seconds each of its ranks works and tokens it holds, in the order of ``ranks``; ``seconds`` are
    the slowest rank's. ``kind``, ``degree``: of its group where it runs in chunks, and only there."""

    seconds: float
    ranks: tuple[int, ...]
    rank_s: tuple[float, ...]
    rank_tokens: tuple[int, ...]
    memory: MemoryPolicy = KEEP
    kind: AttentionKind = AttentionKind.LOCAL
    degree: int = 1

    def peak_bytes(self, cost: CostModel) -> int:
        """Peak bytes of the fullest rank."""
        return self.device_bytes(max(self.rank_tokens), cost)

    def held_bytes(self, num_tokens: int, cost: CostModel) -> float:
        """Most bytes of this microbatch on a rank that holds so many of its tokens."""
        return cost.held_bytes(num_tokens, self.memory, self.kind, self.degree)

    def device_bytes(self, num_tokens: int, cost: CostModel) -> int:
        """Peak bytes of a rank that holds so many of its tokens."""
        return cost.device_bytes(num_tokens, self.memory, self.kind, self.degree)


def step_lengths(plan: StepPlan) -> tuple[int, ...]:
    """Tokens of the step's sequences by index (in a legal plan a sequence's index is its place)."""
    return tuple(sequence.num_tokens for sequence in plan.sequences)


def price_groups(
    ranks: tuple[int, ...], groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], cost: CostModel,
    memory: MemoryPolicy = KEEP, moves: SequenceOf[Move] = (),
) -> MicrobatchPrice:
    """Price one microbatch of these ranks and groups; ``lengths[i]`` are the tokens of sequence i. With ``moves`` a
    rank does the token-wise work of the tokens it has after them, and holds the memory of the fuller of its layouts.

    Raises PlanError where the cost model has no coefficients for a group's kind and degree, the policy or moves, or has
    none for chunks together with moves or several groups.
    """
    if memory.chunk_tokens:
        return _price_in_chunks(ranks, groups, lengths, cost, memory, moves)
    if len(groups) == 1 and groups[0].ranks == ranks and not moves:  # nearly always: all ranks are busy equally long
        work_s, fixed, share, counts = _group_price(groups[0], lengths, cost)
        seconds = _policy_s(work_s + fixed, share, memory, cost)
        return MicrobatchPrice(
            seconds=seconds, ranks=ranks, rank_s=(seconds,) * len(ranks), rank_tokens=counts, memory=memory
        )
    marginal_s, fixed_s = dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0.0)
    tokens, shares = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0.0)
    for group in groups:
        work_s, fixed, share, counts = _group_price(group, lengths, cost)
        for rank, count in zip(group.ranks, counts, strict=True):
            marginal_s[rank] += work_s
            fixed_s[rank] = max(fixed_s[rank], fixed)
            tokens[rank] += count
            shares[rank] += share
    if moves:
        _apply_moves(moves, cost, marginal_s, fixed_s, tokens, shares)
    rank_s = tuple(_policy_s(marginal_s[rank] + fixed_s[rank], shares[rank], memory, cost) for rank in ranks)
    return MicrobatchPrice(
        seconds=max(rank_s), ranks=ranks, rank_s=rank_s, rank_tokens=tuple(tokens.values()), memory=memory
    )


def _price_in_chunks(
    ranks: tuple[int, ...], groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], cost: CostModel,
    memory: MemoryPolicy, moves: SequenceOf[Move],
) -> MicrobatchPrice:
    if len(groups) != 1 or groups[0].ranks != ranks or moves:
        what = "moved tokens" if moves else f"{len(groups)} groups"
        raise PlanError(f"chunks are priced for microbatches of one group on all its ranks, not with {what}")
    group = groups[0]
    fit = cost.policy_fit(group.kind, group.degree, memory)
    work_s, fixed_s, _, counts = _group_price(group, lengths, cost, fit)
    seconds = work_s + fixed_s
    return MicrobatchPrice(
        seconds=seconds, ranks=ranks, rank_s=(seconds,) * len(ranks), rank_tokens=counts, memory=memory,
        kind=group.kind, degree=group.degree,
    )


def _group_price(
    group: AttentionGroup, lengths: SequenceOf[int], cost: CostModel, fit: TimeFit | None = None
) -> tuple[float, float, float, tuple[int, ...]]:
    """Marginal and fixed seconds, tokens per rank (a group's ranks are timed alike, whatever the remainders), and the
    tokens that each of them really holds. ``fit``: where the group does not run whole."""
    sizes = [lengths[index] for index in group.sequences]
    fit, num_tokens = fit or cost.time_fit(group.kind, group.degree), sum(sizes)
    work_s = _marginal_s(fit, sizes)
    counts = local_token_counts(group.kind, group.degree, sizes, group.inner_degree)
    return work_s, fit.fixed_s, num_tokens / group.degree, counts


def lone_group_s(kind: AttentionKind, degree: int, sizes: SequenceOf[int], cost: CostModel) -> float:
    """Seconds of a microbatch of one group that keeps all activations, as ``price_groups`` has them, for sequences of
    these lengths: without what each rank holds. Raises PlanError where the cost model does not price the group."""
    fit = cost.time_fit(kind, degree)
    return _marginal_s(fit, sizes) + fit.fixed_s


def _marginal_s(fit: TimeFit, sizes: SequenceOf[int]) -> float:
    return fit.marginal_s(
        num_tokens=sum(sizes), num_tokens2=sum(size * size for size in sizes), num_sequences=len(sizes)
    )


def _apply_moves(
    moves: SequenceOf[Move], cost: CostModel, marginal_s: dict[int, float], fixed_s: dict[int, float],
    tokens: dict[int, int], shares: dict[int, float],
) -> None:
    """Change what was summed up by rank. Groups charge the token-wise work of even shares; it gives way to that of the
    tokens a rank has in the linear layout, so all ranks together work as long as before, and the exchange on top."""
    fit = cost.remap
    if fit is None:
        raise PlanError("cost model does not price moving tokens for the token-wise layers")
    after = linear_counts(tokens, moves)
    for rank, count in after.items():
        marginal_s[rank] += fit.linear_s_per_token * (count - shares[rank])
        shares[rank], tokens[rank] = float(count), max(count, tokens[rank])
    for source, destination, num_tokens in moves:
        for rank in (source, destination):
            marginal_s[rank] += fit.move_s(source, destination, num_tokens)
    for rank in {rank for source, destination, _ in moves for rank in (source, destination)}:
        fixed_s[rank] += fit.fixed_s


def _policy_s(busy_s: float, num_tokens: float, memory: MemoryPolicy, cost: CostModel) -> float:
    if memory.is_keep:
        return busy_s
    return busy_s + cost.recompute_s(num_tokens, memory) + cost.exposed_copy_s(num_tokens, busy_s, memory)


def price_microbatch(microbatch: Microbatch, lengths: SequenceOf[int], cost: CostModel) -> MicrobatchPrice:
    """``price_groups`` of a plan's microbatch."""
    return price_groups(microbatch.ranks, microbatch.groups, lengths, cost, microbatch.memory, microbatch.moves)


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
    """Price a legal plan (see ``planner.pricing.verify``). Raises PlanError on a group the cost model cannot price."""
    lengths = step_lengths(plan)
    prices = (price_microbatch(microbatch, lengths, cost) for microbatch in plan.microbatches)
    return run_schedule(prices, num_ranks=plan.num_ranks, cost=cost)
