"""The best plan by enumeration of all plans, for steps of about three sequences on three ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

from planner.pricing.lockstep import lockstep_rounds
from planner.schedules.layout import local_token_counts
from planner.strategies.search.shapes import GroupShape
from tests.planner.strategies.test_static_greedy import partitions


@dataclass(frozen=True)
class Group:
    """A shape on some ranks: marginal and fixed seconds, and the tokens of each of its ranks. ``fits``: whether it fits
    as a microbatch of its own. ``kept``: whether all activations are kept, so that it may share a microbatch."""

    ranks: tuple[int, ...]
    marginal_s: float
    fixed_s: float
    tokens: tuple[int, ...]
    fits: bool
    kept: bool = True


GroupsOf = Callable[[list[int]], list[Group]]


def kept_groups(shapes: Sequence[GroupShape], num_ranks: int, rank_tokens: int) -> GroupsOf:
    """A function from lengths to all groups for them: every shape on every set of ranks, activations kept."""

    def groups_of(sizes: list[int]) -> list[Group]:
        squares = sum(size * size for size in sizes)
        groups = []
        for shape in shapes:
            seconds = shape.fit.marginal_s(num_tokens=sum(sizes), num_tokens2=squares, num_sequences=len(sizes))
            tokens = local_token_counts(shape.kind, shape.degree, sizes)
            groups += [
                Group(ranks, seconds, shape.fit.fixed_s, tokens, max(tokens) <= rank_tokens)
                for ranks in combinations(range(num_ranks), shape.degree)
            ]
        return groups

    return groups_of


def best_makespan_s(
    lengths: list[int], groups_of: GroupsOf, num_ranks: int, rank_tokens: int, *, lockstep: bool = False
) -> float:
    """The smallest makespan (seconds) of all plans: every partition of the sequences into parts, every group for each
    part, every partition of the groups into microbatches, and every order. ``lockstep``: all ranks wait for each other
    after each round."""
    best_s = float("inf")
    for parts in partitions(list(range(len(lengths)))):
        options = [groups_of([lengths[index] for index in part]) for part in parts]
        for groups in product(*options):
            for bundles in partitions(list(range(len(groups)))):
                microbatches = [_bundle([groups[index] for index in bundle], rank_tokens) for bundle in bundles]
                if not all(fits for _, _, fits in microbatches):
                    continue
                for order in permutations(microbatches):
                    if lockstep:
                        rounds = lockstep_rounds(ranks for ranks, _, _ in order)
                        best_s = min(best_s, sum(max(order[place][1] for place in each) for each in rounds))
                        continue
                    free_s = [0.0] * num_ranks
                    for ranks, seconds, _ in order:
                        end_s = max(free_s[rank] for rank in ranks) + seconds
                        for rank in ranks:
                            free_s[rank] = end_s
                    best_s = min(best_s, max(free_s))
    return best_s


def _bundle(groups: list[Group], rank_tokens: int) -> tuple[tuple[int, ...], float, bool]:
    """The ranks of a microbatch of these groups, its seconds, and whether it fits in memory."""
    if len(groups) == 1:
        return groups[0].ranks, groups[0].marginal_s + groups[0].fixed_s, groups[0].fits
    marginal_s: dict[int, float] = {}
    fixed_s: dict[int, float] = {}
    held: dict[int, int] = {}
    for group in groups:
        for rank, tokens in zip(group.ranks, group.tokens, strict=True):
            marginal_s[rank] = marginal_s.get(rank, 0.0) + group.marginal_s
            fixed_s[rank] = max(fixed_s.get(rank, 0.0), group.fixed_s)
            held[rank] = held.get(rank, 0) + tokens
    fits = all(group.kept for group in groups) and max(held.values()) <= rank_tokens
    return tuple(held), max(marginal_s[rank] + fixed_s[rank] for rank in held), fits
