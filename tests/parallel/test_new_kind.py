"""A kind of attention is one file: one that only this file knows is planned, verified, proven and run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from types import ModuleType

import pytest

from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.errors import PlanError
from planner.inputs.files import load_cluster, load_model
from planner.plan import AttentionGroup, AttentionKind, Span
from planner.pricing.verify import verify_plan
from planner.schedules.check import check_schedules
from planner.schedules.exchange import (
    AttentionSchedule,
    ExchangeSchedule,
    Round,
    message,
    schedule_of,
    span_tasks,
    write_schedule,
)
from planner.schedules.layout import team_spans
from planner.schedules.wire_price import WirePrice
from planner.step_planner import plan_step
from tests.parallel.test_attention import TOLERANCE, run_case
from tests.plans import step_problem

NAME = "through_first"


class NewKind(StrEnum):
    THROUGH_FIRST = NAME


def write(group: AttentionGroup, lengths: list[int], group_index: int) -> ExchangeSchedule:
    """All K/V go to the first rank, which deals them out again, everything to everyone; gradients go straight home."""
    blocks = team_spans(group, lengths)
    others = [index for index in range(group.degree) if index != group_index]
    own = Round(tasks=span_tasks(blocks[group_index], blocks[group_index]))

    def held(index: int) -> tuple[Span, ...]:
        return tuple(span for place, block in enumerate(blocks) if place not in (0, index) for span in block)

    def to_all(spans_of) -> tuple:
        return tuple(transfer for index in others for transfer in message(group.ranks[index], spans_of(index)))

    mine = blocks[group_index]
    if group_index == 0:
        collect = Round(receives=to_all(lambda index: blocks[index]), tasks=span_tasks(mine, held(0)))
        deal = Round(sends=to_all(held))
        collect_back = replace(collect, grad_sends=to_all(lambda index: blocks[index]))
        forward = (own, collect, deal, Round(sends=to_all(lambda index: mine)))
        backward = (
            own, collect_back, deal, replace(forward[3], grad_receives=()),
            Round(grad_receives=to_all(lambda index: mine)),
        )
        return ExchangeSchedule(head_exchange=None, forward=forward, backward=backward)
    first = group.ranks[0]
    send = Round(sends=message(first, mine))
    deal = Round(receives=message(first, held(group_index)), tasks=span_tasks(mine, held(group_index)))
    last = Round(receives=message(first, blocks[0]), tasks=span_tasks(mine, blocks[0]))
    siblings = [index for index in others if index != 0]
    home = tuple(t for index in siblings for t in message(group.ranks[index], blocks[index]))
    mine_home = tuple(t for index in siblings for t in message(group.ranks[index], mine))
    backward = (
        own, send,
        replace(deal, grad_receives=message(first, mine), grad_sends=home),
        replace(last, grad_receives=mine_home, grad_sends=message(first, blocks[0])),
        Round(),
    )
    return ExchangeSchedule(head_exchange=None, forward=(own, send, deal, last), backward=backward)


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[NewKind]:
    """The one file, as if it were ``planner/schedules/kinds/through_first.py``."""
    file = ModuleType(f"planner.schedules.kinds.{NAME}")
    file.SCHEDULE = AttentionSchedule(  # type: ignore[attr-defined]
        write=write,
        inner_degree=lambda degree, limits: 1 if degree > 1 else None,
        head_degree=lambda degree, inner_degree: 1,
        price=lambda setting, degree, inner_degree: WirePrice(fixed_s=1e-9),
    )
    monkeypatch.setitem(sys.modules, file.__name__, file)
    yield NewKind.THROUGH_FIRST


def test_unknown_without_its_file() -> None:
    with pytest.raises(PlanError, match="unknown attention kind"):
        schedule_of(NewKind.THROUGH_FIRST)


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_a_new_kind_is_proven_and_equals_dense_attention(kind: NewKind, degree: int) -> None:
    lengths = [40, 3, 17]
    group = AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=(0, 1, 2))
    check_schedules(group, lengths, [write_schedule(group, lengths, index) for index in range(degree)])
    assert max(run_case([group], lengths, degree, 4, 2)) < TOLERANCE


def test_a_new_kind_is_priced_and_chosen_by_cost(kind: NewKind, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, model = load_cluster("h200-8"), load_model("llama-3-8b")
    monkeypatch.setattr("planner.cost.data_sheet.AttentionKind", [*AttentionKind, kind])
    cost = derive_cost(cluster, model, num_ranks=8)
    assert cost.degrees(kind) == tuple(range(2, 9))
    limits = PlanLimits(
        device_budget_bytes=cluster.device.memory_bytes, max_ulysses_degree=32,
        kinds=(AttentionKind.ULYSSES, AttentionKind.RING, kind),
    )
    lengths = [60_000, 2000, 500]
    plan = plan_step(step_problem(lengths, 8, cost, limits), step=0, strategy="static", degree=8)
    verify_plan(plan, step_problem(lengths, 8, cost, limits))
    assert {group.kind for microbatch in plan.microbatches for group in microbatch.groups} == {kind}
