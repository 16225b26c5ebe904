"""Moving tokens between ranks for the token-wise layers: whether it pays for a microbatch, and the bound of plans that
may do it."""

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
    """The moves after which all ranks of this microbatch hold the same number of tokens, give or take one. As few as
    possible cross nodes. ``price``: of the microbatch without moves."""
    current, target = [0] * num_ranks, [0] * num_ranks
    ranks = sorted(price.ranks)
    for rank, count in zip(price.ranks, price.rank_tokens, strict=True):
        current[rank] = count
    for rank, count in zip(ranks, balanced_counts(sum(current), len(ranks)), strict=True):
        target[rank] = count
    return token_moves(current, target, node_size)


def price_with_moves(choice: MicrobatchChoice, problem: StepProblem) -> tuple[MicrobatchPrice, tuple[Move, ...]]:
    """The microbatch's price with balanced moves, and these, where they make it cheaper; else without any. Raises
    PlanError where the cost model cannot price it."""
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
    """The shapes without their token-wise work, which moves may take off a rank; none where moves are not priced."""
    if cost.remap is None or cost.remap.linear_s_per_token == 0:
        return ()
    linear_s = cost.remap.linear_s_per_token
    return tuple(
        replace(shape, fit=replace(shape.fit, s_per_token=max(0.0, shape.fit.s_per_token - linear_s / shape.degree)))
        for shape in shapes
    )


def remap_bound_s(problem: StepProblem, shapes: SequenceOf[GroupShape]) -> float:
    """``bounds.step_bound_s`` for plans that may move tokens for the token-wise layers, where the cost model prices it.

    Moves may take all token-wise work off a rank, so a sequence's whole time on a group does not bound the step. But
    its attention stays, and moves only add to what all ranks do together. So there are two bounds, and the larger one
    is returned: that of attention alone; and all work over all ranks, each sequence on the shape that takes the fewest
    rank seconds. In the second one fixed times are shared out by memory, because moves change no group's tokens.
    """
    lengths, num_ranks = problem.lengths, problem.num_ranks
    attention = attention_shapes(shapes, problem.cost)
    if not attention:
        return step_bound_s(lengths, shapes, num_ranks)
    table = price_table(lengths, shapes)
    charges = table.degrees * (table.marginal_s + table.fixed_s * table.memory_shares)
    work_s = float(np.where(table.fits, charges, np.inf).min(axis=1).sum()) / num_ranks
    return max(step_bound_s(lengths, attention, num_ranks), work_s)
