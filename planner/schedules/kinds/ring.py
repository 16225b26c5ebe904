"""Zigzag ring over any number of ranks: K/V blocks go around so that every rank sees each of them once (Liu et al.,
arXiv 2310.01889; the zigzag balances a causal mask).

Forward, round i: the block of the rank i places behind arrives from the rank directly behind. Backward: round 0 uses
the rank's own block, so it hides the first message; then blocks arrive from the rank directly ahead, each with its
dK/dV, which reach their owner in the last round. This takes degree - 1 hops in each direction; a ring that does not
reverse needs degree hops for the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from planner.plan import AttentionGroup, Span
from planner.schedules.exchange import AttentionSchedule, ExchangeSchedule, GroupLimits, Round, message, span_tasks
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice, WireSetting

Rounds = tuple[Round, ...]


def ring_rounds(
    ranks: SequenceOf[int], blocks: SequenceOf[tuple[Span, ...]], index: int
) -> tuple[Rounds, Rounds]:
    """Forward and backward of the rank at position ``index`` in a ring of ``ranks``; ``blocks[i]``: spans of rank i."""
    degree = len(ranks)
    mine = blocks[index]
    behind, ahead = ranks[index - 1], ranks[(index + 1) % degree]

    def block(offset: int) -> tuple[Span, ...]:
        return blocks[(index + offset) % degree]

    own = Round(tasks=span_tasks(mine, mine))
    forward, backward = [own], [own]
    for step in range(1, degree):
        forward.append(
            Round(
                receives=message(behind, block(-step)),
                sends=message(ahead, block(1 - step)),
                tasks=span_tasks(mine, block(-step)),
            )
        )
        backward.append(
            Round(
                receives=message(ahead, block(step)),
                sends=message(behind, block(step - 1)),
                tasks=span_tasks(mine, block(step)),
                grad_receives=message(ahead, block(step)) if step > 1 else (),
                grad_sends=message(behind, block(step)),
            )
        )
    if degree > 1:
        backward.append(Round(grad_receives=message(ahead, mine)))
    return tuple(forward), tuple(backward)


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    forward, backward = ring_rounds(group.ranks, team_spans(group, lengths), group_index)
    return ExchangeSchedule(head_exchange=None, forward=forward, backward=backward)


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    return 1 if degree >= 2 else None


def _head_degree(degree: int, inner_degree: int) -> int:
    return 1


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    return setting.ring(degree, 1)


SCHEDULE = AttentionSchedule(write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price)
