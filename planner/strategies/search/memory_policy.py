"""What may happen to saved activations: as shapes to search over, and as the policy of a microbatch once it is packed.

*Swap.* A token that is copied to the host takes device memory in two layers only. The copy takes no time as long as it
hides under the forward, which it does for a fraction of a sequence's tokens that grows with the sequence's length
(``ActivationFit.hidden_fraction``). The copies of a microbatch hide if those of each of its sequences do, and what its
sequences leave on the device adds up. So swapping needs no shapes of its own: it makes the loads on a shape smaller
(``shapes.HeldShare``), for nothing.

*Host memory.* Of the F bytes of a token, m can be swapped. Take a device whose D bytes for activations are full while
the fraction r of its tokens is swapped. Its host holds h r m D / (F - r m) bytes, h for each byte freed (1 without
pipeline stages). The host has H bytes, which is enough where r <= F H / (m (h D + H)). No sequence swaps more than
that, and then no microbatch does.

*Pipeline stages.* The first stage holds as many microbatches at once as there are stages. Each of them may take its
part of the device, so all of this holds for what is in flight together.

*Recompute.* Computing token-wise work again takes time in proportion to the tokens. Each of a few fractions makes
another shape; what is not computed again may still be swapped.

*Chunks* are shapes as well (``planner.strategies.search.chunk_shapes``). The policy of a packed microbatch is decided
last: of those that hold it, the one that costs the fewest seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from planner.cost.fits import ActivationFit
from planner.cost.limits import PlanLimits
from planner.cost.model import KEEP, CostModel
from planner.plan import MemoryAction, MemoryPolicy, Sharding
from planner.pricing.assemble import GroupChoice, MicrobatchChoice
from planner.pricing.microbatch import lone_group_s
from planner.pricing.problem import StepProblem
from planner.schedules.layout import local_token_counts
from planner.strategies.search.chunk_shapes import chunk_sizes, chunked_shape, chunked_shapes, in_chunks
from planner.strategies.search.shapes import GroupShape, HeldShare

RECOMPUTE_FRACTIONS = (0.5, 1.0)
SWAP_STEP = 1e-6  # swap fractions are multiples of it, rounded up
HOST_SLACK = 1e-4  # part of the host's share that stays free, so that rounding up never overfills it


def swaps(cost: CostModel, limits: PlanLimits) -> bool:
    """Whether anything can be swapped here at all."""
    return limits.allows(MemoryAction.SWAP) and limits.host_budget_bytes > 0 and cost.activation is not None


def recompute_fractions(cost: CostModel, limits: PlanLimits) -> tuple[float, ...]:
    """The fractions of recomputed tokens that are searched, 0 first."""
    if limits.allows(MemoryAction.RECOMPUTE) and cost.activation is not None:
        return (0.0, *RECOMPUTE_FRACTIONS)
    return (0.0,)


def with_policy(
    shapes: Iterable[GroupShape], recompute_fraction: float, cost: CostModel, limits: PlanLimits
) -> tuple[GroupShape, ...]:
    """These shapes (of kept activations) with this fraction of the tokens computed again. Of the others as many are
    swapped as hides, where swapping is allowed."""
    fit = cost.activation
    if fit is None or (recompute_fraction == 0 and not swaps(cost, limits)):
        return tuple(shapes)
    return tuple(
        replace(
            shape, recompute_fraction=recompute_fraction, held=_held(shape, fit, recompute_fraction, cost, limits),
            fit=replace(
                shape.fit,
                s_per_token=shape.fit.s_per_token + recompute_fraction * fit.recompute_s_per_token / shape.degree,
            ),
        )
        for shape in shapes
    )


def with_every_policy(
    kept: SequenceOf[GroupShape], cost: CostModel, limits: PlanLimits
) -> tuple[GroupShape, ...]:
    """These shapes (of kept activations) with each policy that is searched: all shapes of one policy, then the next."""
    fractions = recompute_fractions(cost, limits)
    whole = tuple(shape for fraction in fractions for shape in with_policy(kept, fraction, cost, limits))
    return whole + chunked_shapes(kept, cost, limits)


def _held(
    shape: GroupShape, fit: ActivationFit, recompute_fraction: float, cost: CostModel, limits: PlanLimits
) -> HeldShare:
    token_bytes = cost.memory.bytes_per_token
    kept_bytes = token_bytes - recompute_fraction * fit.recompute_bytes_per_token
    swap_bytes = fit.swap_bytes_per_token
    at_zero = least = kept_bytes / token_bytes
    per_token = 0.0
    if swaps(cost, limits) and swap_bytes > 0:
        copied = fit.host_bytes_per_byte
        device_bytes = max(limits.device_budget_bytes - cost.memory.fixed_bytes, 0)
        # On device and host one token of each microbatch in flight stays free: the fullest rank of a group may hold one
        # token more than its share.
        host_bytes = max(limits.host_budget_bytes - cost.num_stages * copied * kept_bytes, 0)
        by_host = kept_bytes / swap_bytes * host_bytes / max(copied * device_bytes + host_bytes, 1) * (1 - HOST_SLACK)
        spared = cost.num_stages * token_bytes / max(device_bytes, 1)
        by_device = 1 - recompute_fraction - kept_bytes / swap_bytes * spared
        most = max(min(by_device, by_host - SWAP_STEP), 0.0)
        hidden_at_zero, hidden_per_token = fit.hidden_fraction(shape.fit)
        freed = swap_bytes / token_bytes
        at_zero -= freed * min(most, hidden_at_zero)
        per_token = freed * hidden_per_token
        least -= freed * most
    return HeldShare(at_zero=at_zero, per_token=per_token, least=least)


def choose_policies(
    groups: Iterable[tuple[GroupShape, GroupChoice]], problem: StepProblem
) -> tuple[MicrobatchChoice, ...]:
    """Microbatches of one group each, packed under the loads of their shapes, with the mildest policy that fits: keep
    all; else swap what hides; else recompute or run in chunks, whichever takes fewer seconds."""
    if problem.keeps_all:
        return tuple(choice for _, choice in groups)
    lengths, cost, limits = problem.lengths, problem.cost, problem.limits
    return tuple(
        replace(choice, memory=_mildest(choice, shape, [lengths[index] for index in choice.sequences], cost, limits))
        for shape, choice in groups
    )


def _mildest(
    choice: GroupChoice, shape: GroupShape, sizes: list[int], cost: CostModel, limits: PlanLimits
) -> MemoryPolicy:
    """The shape's own policy always fits. In lockstep a round with chunks has no microbatch that swaps or recomputes: a
    microbatch packed for chunks stays with them there, or keeps all, which is one chunk in such a round."""
    inner_degree = cost.time_fit(choice.kind, len(choice.ranks)).inner_degree
    tokens = max(local_token_counts(choice.kind, len(choice.ranks), sizes, inner_degree))
    lockstep, runs_in_chunks = cost.sharding is Sharding.ZERO3, shape.chunk_tokens > 0
    shared_bytes = 0.0
    if lockstep and runs_in_chunks and cost.chunks is not None:
        shared_bytes = cost.chunks.shared_bytes(choice.kind, len(choice.ranks), tokens)
    if cost.device_bytes(tokens * cost.num_stages) + shared_bytes <= limits.device_budget_bytes:
        return KEEP
    whole = None if lockstep and runs_in_chunks else _mildest_whole(tokens, shape, sizes, cost, limits)
    if whole is not None and whole.recompute_fraction == 0:
        return whole  # hidden: no seconds
    chunked = _largest_chunks(tokens, shape, cost, limits) if runs_in_chunks or not lockstep else None
    if whole is None or chunked is None:
        return whole or chunked or in_chunks(shape.chunk_tokens)
    kind, degree = choice.kind, len(choice.ranks)
    whole_s = lone_group_s(kind, degree, sizes, cost, whole)
    return chunked if lone_group_s(kind, degree, sizes, cost, chunked) < whole_s else whole


def _mildest_whole(
    tokens: int, shape: GroupShape, sizes: list[int], cost: CostModel, limits: PlanLimits
) -> MemoryPolicy | None:
    """For a group whose fullest rank holds so many tokens: the least fraction to recompute, and with it the least to
    swap, that fits the budget while the copy hides. None where nothing fits, which happens only to shapes that run in
    chunks: for the others their own fraction fits."""
    fit, owns = cost.activation, shape.chunk_tokens == 0
    if fit is None:
        return None
    plain = replace(shape, fit=cost.time_fit(shape.kind, shape.degree))
    tokens *= cost.num_stages  # in flight at once
    for fraction in recompute_fractions(cost, limits):
        kept = cost.token_bytes() - fraction * fit.recompute_bytes_per_token
        over_bytes = cost.memory.fixed_bytes + tokens * kept - limits.device_budget_bytes
        if over_bytes <= 0:
            return _policy(0.0, fraction)
        if not swaps(cost, limits):
            continue
        needed = over_bytes / (tokens * fit.swap_bytes_per_token)
        held = _held(plain, fit, fraction, cost, limits)
        left = sum(size * held.of(size) for size in sizes) / sum(sizes)  # a share of all bytes, like ``held``
        hidden = (kept / cost.token_bytes() - left) * cost.token_bytes() / fit.swap_bytes_per_token
        if needed <= hidden or (owns and fraction >= shape.recompute_fraction):
            return _policy(min(math.ceil(needed / SWAP_STEP) * SWAP_STEP, 1 - fraction), fraction)
    return _policy(0.0, shape.recompute_fraction) if owns else None


def _largest_chunks(tokens: int, shape: GroupShape, cost: CostModel, limits: PlanLimits) -> MemoryPolicy | None:
    """The largest of the chunks searched whose shape holds a group with so many tokens on its fullest rank. A device
    may take larger ones, but the bound counts only those that are searched."""
    plain = replace(shape, fit=cost.time_fit(shape.kind, shape.degree))
    for size in chunk_sizes(cost, limits):
        chunked = chunked_shape(plain, size, cost, limits)
        if chunked is None:
            continue
        rank_tokens = chunked.capacity_tokens * chunked.num_teams // chunked.degree
        if size == shape.chunk_tokens or tokens * chunked.held.least <= rank_tokens:
            return in_chunks(size)
    return None


def _policy(swap_fraction: float, recompute_fraction: float) -> MemoryPolicy:
    return MemoryPolicy(
        keep_fraction=max(0.0, 1.0 - swap_fraction - recompute_fraction), swap_fraction=swap_fraction,
        recompute_fraction=recompute_fraction,
    )
