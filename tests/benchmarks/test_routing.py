"""The routing benchmark: what it counts as leaving a node, its table, and (nightly, as root) the box itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.box import box_problem
from benchmarks.routing import (
    KV_BYTES,
    ONE_CARD,
    ExchangeSetup,
    Rate,
    RemapRow,
    exchange_plan,
    markdown,
    measure,
    node_bytes,
    remap_rows,
)
from planner.plan import AttentionKind

SETUP = ExchangeSetup(num_nodes=2, ranks_per_node=4, num_tokens=8 * 80, num_repeats=2)


def test_bytes_that_leave_a_node_are_those_of_the_plan() -> None:
    block_bytes = 80 * KV_BYTES
    leaving = {}
    for kind in (AttentionKind.RING, AttentionKind.DOUBLE_RING, AttentionKind.ROUTED_RING):
        (group,) = exchange_plan(kind, SETUP).microbatches[0].groups
        leaving[kind] = [node_bytes(group, SETUP, walk) for walk in ("forward", "backward")]
    assert leaving[AttentionKind.RING] == [7 * block_bytes, 14 * block_bytes]
    assert leaving[AttentionKind.DOUBLE_RING][0] == 4 * block_bytes  # each block enters the other node once
    # blocks cross as in a ring, but for the piece that a block's owner has: three blocks come back by their owner
    assert leaving[AttentionKind.ROUTED_RING][0] == 7 * block_bytes - 3 * block_bytes // 4


def test_the_table_compares_with_one_card_and_with_the_ring() -> None:
    rates = [
        Rate(kind=ONE_CARD, nics_per_node=4, walk="send", num_bytes=1_000_000, seconds=0.125),
        Rate(kind="ring", nics_per_node=4, walk="forward", num_bytes=10_000_000, seconds=1.0),
        Rate(kind="routed_ring", nics_per_node=4, walk="forward", num_bytes=9_000_000, seconds=0.25),
    ]
    remaps = [RemapRow(name="a step", without_s=2.0, with_s=1.5, num_moved=7, num_tokens=100)]
    text = markdown(rates, remaps, SETUP, 12.5e6)
    assert "| 4 | routed_ring | forward | 9.00 | 0.250 | 36.00 | 3.60 | 4.00 |" in text
    assert "| 4 | one card, plain send | send | 1.00 | 0.125 | 8.00 | 0.80 | - |" in text
    assert "forward and backward: met (3.60)." in text
    slow = [*rates[:2], replace(rates[2], seconds=0.4)]
    assert "forward and backward: NOT met (2.25)." in markdown(slow, remaps, SETUP, 12.5e6)
    assert "| a step | 2.0000 | 1.5000 | 7 of 100 |" in text


def test_remapping_pays_in_one_step_and_not_in_the_other() -> None:
    pays, not_worth_it = remap_rows()
    assert pays.with_s < pays.without_s and pays.num_moved > 0
    assert not_worth_it.with_s == not_worth_it.without_s and not_worth_it.num_moved == 0


@pytest.mark.nightly
def test_a_routed_ring_uses_all_cards() -> None:
    problem = box_problem()
    if problem is not None:
        pytest.skip(f"no cluster in a box here: {problem}")
    setup = ExchangeSetup(num_nodes=2, ranks_per_node=4, num_tokens=4096, num_repeats=1)
    rates = {(rate.kind, rate.walk): rate for rate in measure(setup, 4, 2e6)}
    assert rates["ring", "forward"].bytes_per_s < 1.3 * 2e6  # one card, and what a bucket lets through
    assert rates["routed_ring", "forward"].bytes_per_s > 1.5 * 2e6
