"""What a plan costs, a second time: slow, one token and one rank at a time, from the formulas as the docs state them.

Nothing is imported from the rooms that price or search: only values (plans, cost models). So where this agrees with
``planner.pricing``, two people would have had to misread the same sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from planner.cost.fits import TimeFit
from planner.cost.model import CostModel
from planner.plan import AttentionGroup, AttentionKind, Microbatch, Sharding, StepPlan

FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class RankLoad:
    """One rank in one microbatch. ``held_bytes``: of activations, while the microbatch is between forward and backward;
    ``host_bytes``: of what it has swapped."""

    seconds: float
    tokens: int
    held_bytes: float
    host_bytes: int


@dataclass(frozen=True)
class Priced:
    """A whole step."""

    step_s: float
    peak_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]


def price_plan(plan: StepPlan, cost: CostModel) -> Priced:
    lengths = [sequence.num_tokens for sequence in plan.sequences]
    loads = [price_microbatch(microbatch, lengths, cost) for microbatch in plan.microbatches]
    seconds = [max(load.seconds for load in each.values()) for each in loads]
    if cost.num_stages > 1:
        passes = _staged(plan, seconds, cost.num_stages)
    elif cost.sharding is Sharding.ZERO3:
        passes = _lockstep(plan, seconds)
    else:
        passes = _free(plan, seconds)
    held, host = [0.0] * plan.num_ranks, [0] * plan.num_ranks
    peaks, host_peaks = list(held), list(host)
    for _, index, opens, closes in sorted(passes, key=lambda item: item[0]):
        for rank, load in loads[index].items():
            if opens:
                held[rank] += load.held_bytes
                host[rank] += load.host_bytes
            peaks[rank], host_peaks[rank] = max(peaks[rank], held[rank]), max(host_peaks[rank], host[rank])
            if closes:
                held[rank] -= load.held_bytes
                host[rank] -= load.host_bytes
    last_s = max(place[1] for place, _, _, _ in passes)
    return Priced(
        step_s=last_s + cost.step_fixed_s,
        peak_bytes=tuple(max(int(cost.memory.fixed_bytes + peak), cost.memory.update_bytes) for peak in peaks),
        host_bytes=tuple(host_peaks),
    )


def price_microbatch(microbatch: Microbatch, lengths: list[int], cost: CostModel) -> dict[int, RankLoad]:
    """Every rank of the microbatch: marginal seconds of its groups added up, the largest of their fixed times, what
    moves change, then recomputing and what of the copy the microbatch does not hide."""
    memory = microbatch.memory
    marginal_s = dict.fromkeys(microbatch.ranks, 0.0)
    fixed_s = dict.fromkeys(microbatch.ranks, 0.0)
    tokens = dict.fromkeys(microbatch.ranks, 0)
    shares = dict.fromkeys(microbatch.ranks, Fraction(0))
    for group in microbatch.groups:
        fit = _fit(cost, group)
        sizes = [lengths[index] for index in group.sequences]
        square, linear, fixed = fit.s_per_token2, fit.s_per_token, fit.fixed_s
        if memory.chunk_tokens:
            chunks = cost.chunks
            assert chunks is not None
            square *= 1 + chunks.again_attention
            linear = linear * (1 + chunks.again_linear) + chunks.s_per_chunk / memory.chunk_tokens / group.degree
            fixed += chunks.s_per_chunk
        work_s = sum(square * size * size + linear * size + fit.s_per_sequence for size in sizes)
        counts = rank_tokens(group, sizes)
        for rank, count in zip(group.ranks, counts, strict=True):
            marginal_s[rank] += work_s
            fixed_s[rank] = max(fixed_s[rank], fixed)
            tokens[rank] += count
            shares[rank] += Fraction(sum(sizes), group.degree)
    if microbatch.moves:
        _move(microbatch, cost, marginal_s, fixed_s, tokens, shares)
    found = {}
    for rank in microbatch.ranks:
        busy_s = marginal_s[rank] + fixed_s[rank]
        found[rank] = _loaded(microbatch, cost, busy_s, tokens[rank], float(shares[rank]))
    return found


def rank_tokens(group: AttentionGroup, sizes: list[int]) -> list[int]:
    """Tokens by member. Members form teams; each sequence is cut into two chunks a team, of which team t has chunk t
    and its mirror image; a team's tokens in a row are cut evenly among its members."""
    team = team_size(group)
    num_teams = group.degree // team
    found = []
    for place in range(num_teams):
        total = 0
        for size in sizes:
            for chunk in (place, 2 * num_teams - 1 - place) if num_teams > 1 else (0, 1):
                total += size * (chunk + 1) // (2 * num_teams) - size * chunk // (2 * num_teams)
        found += [total * (member + 1) // team - total * member // team for member in range(team)]
    return found


def team_size(group: AttentionGroup) -> int:
    """Members that trade heads for tokens with each other: all of them, the inner group, or nobody."""
    if group.kind is AttentionKind.ULYSSES:
        return group.degree
    return group.inner_degree if group.kind is AttentionKind.USP else 1


def _fit(cost: CostModel, group: AttentionGroup) -> TimeFit:
    (fit,) = [fit for fit in cost.times if (fit.kind, fit.degree) == (group.kind, group.degree)]
    return fit


def _move(
    microbatch: Microbatch, cost: CostModel, marginal_s: dict[int, float], fixed_s: dict[int, float],
    tokens: dict[int, int], shares: dict[int, Fraction],
) -> None:
    """Token-wise work follows the tokens; both ends of a move pay for it by the token, and once for taking part."""
    remap = cost.remap
    assert remap is not None
    after = dict(tokens)
    for source, destination, count in microbatch.moves:
        after[source] -= count
        after[destination] += count
        same_node = source // remap.node_size == destination // remap.node_size
        for rank in (source, destination):
            marginal_s[rank] += count * (remap.intra_s_per_token if same_node else remap.inter_s_per_token)
    for rank in tokens:
        marginal_s[rank] += remap.linear_s_per_token * float(after[rank] - shares[rank])
        shares[rank] = Fraction(after[rank])
        tokens[rank] = max(tokens[rank], after[rank])
    for rank in {rank for source, destination, _ in microbatch.moves for rank in (source, destination)}:
        fixed_s[rank] += remap.fixed_s


def _loaded(microbatch: Microbatch, cost: CostModel, busy_s: float, tokens: int, share: float) -> RankLoad:
    memory, fit = microbatch.memory, cost.activation
    if memory.chunk_tokens:
        (group,) = microbatch.groups
        return RankLoad(busy_s, tokens, _chunk_bytes(cost, group, tokens, memory.chunk_tokens), 0)
    token_bytes, host_bytes, extra_s = cost.memory.bytes_per_token, 0, 0.0
    if memory.swap_fraction or memory.recompute_fraction:
        assert fit is not None
        token_bytes -= memory.swap_fraction * fit.swap_bytes_per_token
        token_bytes -= memory.recompute_fraction * fit.recompute_bytes_per_token
        copied = fit.swap_bytes_per_token * fit.host_bytes_per_byte
        host_bytes = int(memory.swap_fraction * copied * tokens)
        copy_s = memory.swap_fraction * copied * share / fit.copy_bytes_per_s
        extra_s = memory.recompute_fraction * fit.recompute_s_per_token * share
        extra_s += max(0.0, copy_s - fit.hidden_share * busy_s)
    return RankLoad(busy_s + extra_s, tokens, token_bytes * tokens, host_bytes)


def _chunk_bytes(cost: CostModel, group: AttentionGroup, tokens: int, chunk_tokens: int) -> float:
    """K/V and their gradients of all tokens, and the activations of one chunk."""
    chunks = cost.chunks
    assert chunks is not None
    at_work = min(chunk_tokens, tokens)
    held = chunks.fixed_bytes + at_work * chunks.bytes_per_token
    resident = chunks.resident_bytes_per_token
    if group.kind is AttentionKind.ULYSSES:
        heads = max(len(read) for read in _kv_heads(chunks.num_kv_heads, group.degree))
        resident *= heads * group.degree / chunks.num_kv_heads
    elif group.degree > 1:
        held += at_work * group.degree * chunks.shared_bytes_per_token
    return held + resident * tokens


def _kv_heads(num_heads: int, degree: int) -> list[set[int]]:
    """The KV heads that each member of an exchange of heads may read: its even share of a line of heads."""
    members = []
    for member in range(degree):
        first, last = Fraction(member * num_heads, degree), Fraction((member + 1) * num_heads, degree)
        members.append({head for head in range(num_heads) if head < last and head + 1 > first})
    return members


Passes = list[tuple[tuple[float, float, int], int, bool, bool]]
"""((start, stop, place in the order), microbatch, opens, closes)."""


def _free(plan: StepPlan, seconds: list[float]) -> Passes:
    """A microbatch starts when the last of its ranks is free."""
    free_s = [0.0] * plan.num_ranks
    passes: Passes = []
    for index, microbatch in enumerate(plan.microbatches):
        start_s = max(free_s[rank] for rank in microbatch.ranks)
        for rank in microbatch.ranks:
            free_s[rank] = start_s + seconds[index]
        passes.append(((start_s, start_s + seconds[index], index), index, True, True))
    return _in_start_order(passes)


def _lockstep(plan: StepPlan, seconds: list[float]) -> Passes:
    """Round after round: in each, every microbatch that no unfinished earlier one of its ranks precedes."""
    waiting = list(range(len(plan.microbatches)))
    passes: Passes = []
    now_s = 0.0
    while waiting:
        taken: set[int] = set()
        members = []
        for index in waiting:
            ranks = set(plan.microbatches[index].ranks)
            if not ranks & taken:
                members.append(index)
            taken |= ranks
        for index in members:
            passes.append(((now_s, now_s + seconds[index], index), index, True, True))
        now_s += max(seconds[index] for index in members)
        waiting = [index for index in waiting if index not in members]
    return _in_start_order(passes)


def _staged(plan: StepPlan, seconds: list[float], num_stages: int) -> Passes:
    """List scheduling over (microbatch, stage, direction), the first that can start, a forward before a backward; at
    most as many microbatches in flight on a stage as there are stages from it to the last. Only stage 0 is returned:
    it holds the most, and a step ends with its last backward."""
    ranks_of = [microbatch.ranks for microbatch in plan.microbatches]
    free_s = {(rank, stage): 0.0 for rank in range(plan.num_ranks) for stage in range(num_stages)}
    done_s: dict[tuple[int, int, bool], float] = {}
    passes: Passes = []
    while len(done_s) < 2 * num_stages * len(ranks_of):
        best: tuple[float, bool, int, int] | None = None
        for index, ranks in enumerate(ranks_of):
            for stage in range(num_stages):
                for backward in (True, False):
                    if (index, stage, backward) in done_s:
                        continue
                    ready_s = _ready_s(index, stage, backward, ranks_of, done_s, num_stages)
                    if ready_s is None:
                        continue
                    start_s = max(ready_s, *(free_s[rank, stage] for rank in ranks))
                    key = (start_s, backward, index, stage)
                    best = key if best is None else min(best, key)
        assert best is not None, "the pipelines wait for each other"
        start_s, is_backward, index, stage = best
        part = 1 - FORWARD_SHARE if is_backward else FORWARD_SHARE
        stop_s = start_s + seconds[index] * part
        done_s[index, stage, is_backward] = stop_s
        for rank in ranks_of[index]:
            free_s[rank, stage] = stop_s
        if stage == 0:
            passes.append(((start_s, stop_s, len(passes)), index, not is_backward, is_backward))
    return passes


def _ready_s(
    index: int, stage: int, backward: bool, ranks_of: list[tuple[int, ...]], done_s: dict[tuple[int, int, bool], float],
    num_stages: int,
) -> float | None:
    """When everything that the action waits for is done; None while something is not."""
    if backward:
        before = (index, stage, False) if stage == num_stages - 1 else (index, stage + 1, True)
    else:
        before = (index, stage - 1, False)
    if (backward or stage > 0) and before not in done_s:
        return None
    for rank in ranks_of[index]:
        mine = [other for other, ranks in enumerate(ranks_of) if rank in ranks]
        earlier = mine[: mine.index(index)]
        if any((other, stage, backward) not in done_s for other in earlier):
            return None
        in_flight = [o for o in mine if (o, stage, False) in done_s and (o, stage, True) not in done_s]
        if not backward and len(in_flight) >= num_stages - stage:
            return None
    return done_s.get(before, 0.0)


def _in_start_order(passes: Passes) -> Passes:
    return sorted(passes)
