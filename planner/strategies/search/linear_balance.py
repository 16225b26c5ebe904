"""Whether a microbatch's tokens should be evened out for the token-wise layers, and what bounds hold if they may be."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from planner.cost.model import CostModel
from planner.pricing.assemble import MicrobatchChoice, price_choice
from planner.pricing.microbatch import MicrobatchPrice
from planner.pricing.problem import StepProblem
from planner.schedules.remap import Move, balanced_counts, token_moves
from planner.strategies.search.bounds import step_bound_s
from planner.strategies.search.shapes import GroupShape, price_table


def balanced_moves(price: MicrobatchPrice, num_ranks: int, node_size: int) -> tuple[Move, ...]:
    """The moves after which all ranks of this microbatch, priced without any, hold the same tokens, at most one
    apart, with as few of them between nodes as possible."""
    current, target = [0] * num_ranks, [0] * num_ranks
    ranks = sorted(price.ranks)
    for rank, count in zip(price.ranks, price.rank_tokens, strict=True):
        current[rank] = count
    for rank, count in zip(ranks, balanced_counts(sum(current), len(ranks)), strict=True):
        target[rank] = count
    return token_moves(current, target, node_size)


def price_with_moves(choice: MicrobatchChoice, problem: StepProblem) -> tuple[MicrobatchPrice, tuple[Move, ...]]:
    """The microbatch with balanced moves where they lower its price, else without. Raises PlanError where the cost
    model cannot price it."""
    lengths, cost = problem.lengths, problem.cost
    plain = price_choice(choice, lengths, cost)
    if cost.remap is None or cost.remap.linear_s_per_token == 0:
        return plain, ()
    moves = balanced_moves(plain, problem.num_ranks, cost.remap.node_size)
    if not moves:
        return plain, ()
    moved = price_choice(choice, lengths, cost, moves)
    return (moved, moves) if moved.seconds < plain.seconds else (plain, ())


def attention_shapes(shapes: SequenceOf[GroupShape], cost: CostModel) -> tuple[GroupShape, ...]:
    """The shapes without token-wise work, which moves may take off any rank; none where moves are not priced."""
    if cost.remap is None or cost.remap.linear_s_per_token == 0:
        return ()
    linear_s = cost.remap.linear_s_per_token
    return tuple(
        replace(shape, fit=replace(shape.fit, s_per_token=max(0.0, shape.fit.s_per_token - linear_s / shape.degree)))
        for shape in shapes
    )


def remap_bound_s(problem: StepProblem, shapes: SequenceOf[GroupShape]) -> float:
    """``bounds.step_bound_s`` for plans that may move tokens for the token-wise layers, where the cost model prices it.

    Then a rank may be rid of its token-wise work, so that no sequence's time on a group bounds the step. But its
    attention stays, and moves only add to what all ranks do together. So both of these hold: the bound of attention
    alone, and all work, at the shapes that take the fewest rank seconds, over all ranks. In the latter a sequence's
    share of the fixed times is that by memory: moves change no group's tokens.
    """
    lengths, num_ranks = problem.lengths, problem.num_ranks
    attention = attention_shapes(shapes, problem.cost)
    if not attention:
        return step_bound_s(lengths, shapes, num_ranks)
    table = price_table(lengths, shapes)
    charges = table.degrees * (table.marginal_s + table.fixed_s * table.memory_shares)
    work_s = float(np.where(table.fits, charges, np.inf).min(axis=1).sum()) / num_ranks
    return max(step_bound_s(lengths, attention, num_ranks), work_s)
