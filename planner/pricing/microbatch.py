"""The price of a microbatch: seconds of each of its ranks, and the tokens and bytes they hold. It is computed only
here.

A rank in several groups of one microbatch runs their attention one after the other inside each layer. So it takes the
sum of their marginal seconds and, since layers are launched once, the largest of their fixed times. Moves shift
token-wise work from rank to rank and add the time of the exchange. Recomputation and the exposed part of copies to the
host come on top; chunks have their own prices. A microbatch lasts as long as its slowest rank.

``SequencePrices`` holds the same prices as arrays, for searches that ask what one more sequence adds to a group for
many lengths, kinds and degrees at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.cost.fits import TimeFit
from planner.cost.model import KEEP, CostModel
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, MemoryPolicy, Microbatch
from planner.schedules.layout import local_token_counts
from planner.schedules.linear_layout import linear_counts
from planner.schedules.remap import Move

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPrice:
    """The price of one microbatch. ``rank_s`` and ``rank_tokens``: seconds that each rank works and tokens that it
    holds, in the order of ``ranks``. ``seconds``: the slowest rank's. ``kind`` and ``degree``: of its group, set only
    where it runs in chunks."""

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
        """Peak bytes of this microbatch alone on a rank that holds ``num_tokens`` of its tokens."""
        return cost.held_bytes(num_tokens, self.memory, self.kind, self.degree)

    def device_bytes(self, num_tokens: int, cost: CostModel) -> int:
        """Peak bytes, everything included, of a rank that holds ``num_tokens`` of its tokens."""
        return cost.device_bytes(num_tokens, self.memory, self.kind, self.degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePrices:
    """``TimeFit`` of several groups as arrays of one entry per group. A sequence of s tokens adds
    ``square * s^2 + linear * s + each`` seconds to a group; the group itself takes ``fixed_s``."""

    square: FloatArray
    linear: FloatArray
    each: FloatArray
    fixed_s: FloatArray

    @classmethod
    def of(cls, fits: SequenceOf[TimeFit]) -> SequencePrices:
        rows = [(fit.s_per_token2, fit.s_per_token, fit.s_per_sequence, fit.fixed_s) for fit in fits]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
        return cls(square=columns[0], linear=columns[1], each=columns[2], fixed_s=columns[3])

    def marginal_s(self, lengths: FloatArray) -> FloatArray:
        """Seconds that a sequence adds, of shape [lengths, groups]; ``lengths`` in tokens."""
        tokens = lengths[:, None]
        seconds: FloatArray = self.square * tokens**2 + self.linear * tokens + self.each
        return seconds

    def sums_s(self, num_tokens: float, num_tokens2: float, num_sequences: int) -> FloatArray:
        """Seconds that sequences with these sums of lengths and of squared lengths add together, of shape [groups]."""
        seconds: FloatArray = self.square * num_tokens2 + self.linear * num_tokens + self.each * num_sequences
        return seconds

    def cheapest(self, degrees: IntArray) -> SequencePrices:
        """A lower bound of all groups, as one group: the least of each price in rank seconds (seconds times
        ``degrees``)."""
        return SequencePrices(
            square=(self.square * degrees).min(keepdims=True), linear=(self.linear * degrees).min(keepdims=True),
            each=(self.each * degrees).min(keepdims=True), fixed_s=(self.fixed_s * degrees).min(keepdims=True),
        )


def price_groups(
    ranks: tuple[int, ...], groups: SequenceOf[AttentionGroup], lengths: SequenceOf[int], cost: CostModel,
    memory: MemoryPolicy = KEEP, moves: SequenceOf[Move] = (),
) -> MicrobatchPrice:
    """Price one microbatch of these ranks and groups; ``lengths[i]``: tokens of sequence i. With ``moves``, a rank does
    the token-wise work of the tokens it has after them, and its memory is that of the larger of its two layouts.

    Raises PlanError where the cost model does not price a group's kind and degree, the policy or moves, and for chunks
    together with moves or several groups.
    """
    if memory.chunk_tokens:
        return _price_in_chunks(ranks, groups, lengths, cost, memory, moves)
    if len(groups) == 1 and groups[0].ranks == ranks and not moves:  # the usual case: all ranks work equally long
        work_s, fixed, share, counts = _group_price(groups[0], lengths, cost)
        seconds = _policy_s(work_s + fixed, share, memory, cost)
        return MicrobatchPrice(
            seconds=seconds, ranks=ranks, rank_s=(seconds,) * len(ranks), rank_tokens=counts, memory=memory
        )
    tokens, shares = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0.0)
    loads = []
    for group in groups:
        work_s, fixed, share, counts = _group_price(group, lengths, cost)
        loads.append((group.ranks, work_s, fixed))
        for rank, count in zip(group.ranks, counts, strict=True):
            tokens[rank] += count
            shares[rank] += share
    marginal_s, fixed_s = rank_loads(ranks, loads)
    if moves:
        _apply_moves(moves, cost, marginal_s, fixed_s, tokens, shares)
    rank_s = tuple(_policy_s(marginal_s[rank] + fixed_s[rank], shares[rank], memory, cost) for rank in ranks)
    return MicrobatchPrice(
        seconds=max(rank_s), ranks=ranks, rank_s=rank_s, rank_tokens=tuple(tokens.values()), memory=memory
    )


def rank_loads(
    ranks: Iterable[int], groups: Iterable[tuple[tuple[int, ...], float, float]]
) -> tuple[dict[int, float], dict[int, float]]:
    """By rank, the sum of the marginal seconds of its groups and the largest of their fixed times. ``groups``: ranks,
    marginal seconds and fixed seconds of each."""
    marginal_s = dict.fromkeys(ranks, 0.0)
    fixed_s = dict.fromkeys(marginal_s, 0.0)
    for members, work_s, fixed in groups:
        for rank in members:
            marginal_s[rank] += work_s
            fixed_s[rank] = max(fixed_s[rank], fixed)
    return marginal_s, fixed_s


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
    """Marginal seconds, fixed seconds, even share of the tokens per rank (ranks are timed alike, whatever the
    remainders) and the tokens that each rank really holds. ``fit``: replaces ``cost.time_fit``."""
    sizes = [lengths[index] for index in group.sequences]
    fit, num_tokens = fit or cost.time_fit(group.kind, group.degree), sum(sizes)
    work_s = _marginal_s(fit, sizes)
    counts = local_token_counts(group.kind, group.degree, sizes, group.inner_degree)
    return work_s, fit.fixed_s, num_tokens / group.degree, counts


def lone_group_s(
    kind: AttentionKind, degree: int, sizes: SequenceOf[int], cost: CostModel, memory: MemoryPolicy = KEEP
) -> float:
    """Seconds of a microbatch of one group over sequences of these lengths (tokens): those of ``price_groups``, without
    the tokens that each rank holds. Raises PlanError where the cost model does not price it."""
    fit = cost.policy_fit(kind, degree, memory)
    seconds = _marginal_s(fit, sizes) + fit.fixed_s
    return seconds if memory.chunk_tokens else _policy_s(seconds, sum(sizes) / degree, memory, cost)


def _marginal_s(fit: TimeFit, sizes: SequenceOf[int]) -> float:
    return fit.marginal_s(
        num_tokens=sum(sizes), num_tokens2=sum(size * size for size in sizes), num_sequences=len(sizes)
    )


def _apply_moves(
    moves: SequenceOf[Move], cost: CostModel, marginal_s: dict[int, float], fixed_s: dict[int, float],
    tokens: dict[int, int], shares: dict[int, float],
) -> None:
    """Apply moves to the sums by rank, in place. Groups charge token-wise work for even shares; it is replaced by that
    of the tokens which a rank has in the linear layout, so the total over ranks stays, and the exchange is added."""
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
