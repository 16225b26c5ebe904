"""Group-cast: each K/V chunk goes only to the ranks whose queries need it, directly from its owner, and its gradient
returns directly.

Under a causal mask all ranks of a zigzag need the early chunks, but late chunks are needed only by queries of later
ranks; a ring, which shows every chunk to every rank, wastes a quarter of its traffic. In round i rank r sends to the
rank i places ahead and receives from the rank i places behind, so every rank sends at most one message and receives at
most one at any time. Nothing is passed on, so no rank waits for a slow third one.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from planner.plan import AttentionGroup, Span
from planner.schedules.exchange import (
    AttentionSchedule,
    ExchangeSchedule,
    GroupLimits,
    Round,
    message,
    needed_spans,
    span_tasks,
)
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice, WireSetting


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    degree, ranks = group.degree, group.ranks
    blocks = team_spans(group, lengths)
    mine = blocks[group_index]

    def needed(by: int, of: int) -> tuple[Span, ...]:
        return needed_spans(blocks[by], blocks[of])

    forward = [Round(tasks=span_tasks(mine, mine))]
    backward = [forward[0]]
    for step in range(1, degree):
        ahead, behind = (group_index + step) % degree, (group_index - step) % degree
        keys = needed(group_index, behind)
        walk = Round(
            receives=message(ranks[behind], keys),
            sends=message(ranks[ahead], needed(ahead, group_index)),
            tasks=span_tasks(mine, keys),
        )
        forward.append(walk)
        last = (group_index + step - 1) % degree  # the rank that held this rank's spans in the previous round
        backward.append(
            Round(
                receives=walk.receives, sends=walk.sends, tasks=walk.tasks, grad_sends=walk.receives,
                grad_receives=message(ranks[last], needed(last, group_index)) if step > 1 else (),
            )
        )
    if degree > 1:
        last = (group_index - 1) % degree
        backward.append(Round(grad_receives=message(ranks[last], needed(last, group_index))))
    return ExchangeSchedule(head_exchange=None, forward=tuple(forward), backward=tuple(backward))


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    return 1 if degree >= 2 else None


def _head_degree(degree: int, inner_degree: int) -> int:
    return 1


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    """Priced by the busiest rank: the one with the last chunk needs all keys, as in a ring. The savings are less load
    on shared links, which is not priced, and that no single rank must send everything across the node boundary."""
    return WirePrice(
        s_per_token=setting.beside_kernels(degree, 1, setting.direct_s_per_token(degree, degree * setting.kv_bytes)),
        fixed_s=setting.latency_s(degree, 2 * (degree - 1)),
    )


SCHEDULE = AttentionSchedule(write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price)
