"""Local: one rank computes everything, without messages."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from planner.plan import AttentionGroup
from planner.schedules.exchange import AttentionSchedule, ExchangeSchedule, GroupLimits, Round, span_tasks
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice, WireSetting


def _write(group: AttentionGroup, lengths: SequenceOf[int], group_index: int) -> ExchangeSchedule:
    (whole,) = team_spans(group, lengths)
    rounds = (Round(tasks=span_tasks(whole, whole)),)
    return ExchangeSchedule(head_exchange=None, forward=rounds, backward=rounds)


def _inner_degree(degree: int, limits: GroupLimits) -> int | None:
    return 1 if degree == 1 else None


def _head_degree(degree: int, inner_degree: int) -> int:
    return 1


def _price(setting: WireSetting, degree: int, inner_degree: int) -> WirePrice:
    return WirePrice()


SCHEDULE = AttentionSchedule(write=_write, inner_degree=_inner_degree, head_degree=_head_degree, price=_price)
