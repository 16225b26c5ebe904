"""All-gather: every rank receives all K/V in one round; partial gradients return directly to their owners.

It has the fewest messages in sequence, so it is fastest for short sequences. But kernels hide almost none of the
transfer, and a rank holds K/V of the whole group (one layer at a time). Planners only count the tokens that a rank
owns, so this kind is used only if it is requested by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from planner.plan import AttentionGroup, Span
from planner.schedules.exchange import (
    AttentionSchedule,
    ExchangeSchedule,
    GroupLimits,
    Round,
    Transfer,
    message,
    needed_spans,
    span_tasks,
)
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice, WireSetting


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    blocks = team_spans(group, lengths)
    mine = blocks[group_index]
    others = [index for index in range(group.degree) if index != group_index]
    gathered = tuple(span for index in others for span in blocks[index])
    own = Round(tasks=span_tasks(mine, mine))
    all_at_once = Round(
        receives=_messages((group.ranks[index], blocks[index]) for index in others),
        sends=_messages((group.ranks[index], mine) for index in others),
        tasks=span_tasks(mine, gathered),
        grad_sends=_messages((group.ranks[index], needed_spans(mine, blocks[index])) for index in others),
    )
    home = Round(
        grad_receives=_messages((group.ranks[index], needed_spans(blocks[index], mine)) for index in others)
    )
    forward = (own, Round(receives=all_at_once.receives, sends=all_at_once.sends, tasks=all_at_once.tasks))
    return ExchangeSchedule(head_exchange=None, forward=forward, backward=(own, all_at_once, home))


def _messages(parts: Iterable[tuple[int, tuple[Span, ...]]]) -> tuple[Transfer, ...]:
    return tuple(transfer for rank, spans in parts for transfer in message(rank, spans))


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    return 1 if degree >= 2 else None


def _head_degree(degree: int, inner_degree: int) -> int:
    return 1


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    """Only attention over the rank's own block can overlap, so all of the transfer is charged, plus the extra kernel
    time of working in pieces."""
    return WirePrice(
        s_per_token=setting.kv_passes * setting.direct_s_per_token(degree, degree * setting.kv_bytes)
        + setting.rounds_s(degree, 1),
        fixed_s=setting.latency_s(degree, 3),
    )


SCHEDULE = AttentionSchedule(
    write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price, in_auto=False
)
