"""Zeppelin's layer simulator by hand and by property, and the rebuilt table's verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.inputs.cluster import ClusterSpec
from planner.reproduce import zeppelin
from planner.reproduce.table import load_data
from planner.reproduce.zeppelin import ZeppelinData, batches_of, cluster_of, layer_of, variant_times, zones_of
from planner.reproduce.zeppelin_layer import Layer, ZoneGroup
from planner.schedules.remap import balanced_counts, token_moves


@pytest.fixture(scope="module")
def data() -> ZeppelinData:
    return replace(load_data(ZeppelinData, "zeppelin"), num_batches=3)


def layer_3b(data: ZeppelinData, num_devices: int = 16, tensor_parallel: int = 1) -> Layer:
    return layer_of(cluster_of(data, data.cluster_a), data.model_3b, num_devices, tensor_parallel)


def with_rates(cluster: ClusterSpec, *, intra_bytes_per_s: float, device_bytes_per_s: float) -> ClusterSpec:
    return replace(
        cluster, intra_node=replace(cluster.intra_node, bytes_per_s=intra_bytes_per_s),
        inter_node=replace(cluster.inter_node, bytes_per_s=device_bytes_per_s),
    )


def test_a_ring_transfer_is_its_bytes_over_one_nic(data: ZeppelinData) -> None:
    hop_s = layer_3b(data).hop_s(4096, between_nodes=True, routed=False)
    assert hop_s == pytest.approx(2 * 4096 * 3200 * 2 / 24.0e9)
    assert layer_3b(data).hop_s(4096, between_nodes=False, routed=True) == pytest.approx(2 * 4096 * 3200 * 2 / 155e9)


@pytest.mark.parametrize(("tensor_parallel", "direct_bytes_per_s"), [(1, 24e9), (2, 24e9), (4, 48e9), (8, 96e9)])
def test_devices_of_a_rank_share_the_nics_next_to_them(
    data: ZeppelinData, tensor_parallel: int, direct_bytes_per_s: float
) -> None:
    """Two devices have one NIC; routed over free links inside the node, all four NICs carry the message."""
    layer = layer_3b(data, tensor_parallel=tensor_parallel)
    num_bytes = 2 * 1000 * 3200 * 2
    assert layer.hop_s(1000, between_nodes=True, routed=False) == pytest.approx(num_bytes / direct_bytes_per_s)
    free = replace(layer, cluster=with_rates(layer.cluster, intra_bytes_per_s=1e20, device_bytes_per_s=12e9))
    assert free.hop_s(1000, between_nodes=True, routed=True) == pytest.approx(num_bytes / 96e9)


def test_ring_time_where_transfers_rule_and_where_they_are_free(data: ZeppelinData) -> None:
    layer = layer_3b(data)
    group = ZoneGroup(ranks=tuple(range(16)), lengths=(65536,))
    hop_s = layer.hop_s(4096, between_nodes=True, routed=False)
    compute_s = layer.attention_forward_s(4096**2)
    assert 2.5 * compute_s < 2 * hop_s
    assert layer.ring_s(group, routed=False) == pytest.approx(15 * 3 * hop_s + 3.5 * compute_s)
    fast = with_rates(layer.cluster, intra_bytes_per_s=1e20, device_bytes_per_s=1e20)
    assert replace(layer, cluster=fast).ring_s(group, routed=False) == pytest.approx(16 * 3.5 * compute_s)


def test_a_ring_shares_the_work_of_one_rank(data: ZeppelinData) -> None:
    layer = layer_3b(data)
    fast = replace(layer, cluster=with_rates(layer.cluster, intra_bytes_per_s=1e20, device_bytes_per_s=1e20))
    alone_s = fast.ring_s(ZoneGroup(ranks=(3,), lengths=(9000, 700)), routed=False)
    shared_s = fast.ring_s(ZoneGroup(ranks=(1, 2, 3), lengths=(9000, 700)), routed=False)
    assert alone_s == pytest.approx(3 * shared_s)


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_no_variant_beats_even_work_without_transfers(lengths: list[int]) -> None:
    """And routing never slows down: it falls back to a direct message where that is quicker."""
    layer = layer_3b(load_data(ZeppelinData, "zeppelin"))
    times = variant_times(layer, [lengths])
    compute_s = 3.5 * layer.attention_forward_s(sum(size**2 for size in lengths)) / layer.num_ranks
    least_s = compute_s + layer.linear_s(1) * sum(lengths) / layer.num_ranks
    fastest_s = min(times.te_cp_s, times.routing_s, times.engine_s, times.engine_routing_s, times.full_s)
    assert fastest_s >= least_s * (1 - 1e-9)
    assert times.routing_s <= times.te_cp_s and times.engine_routing_s <= times.engine_s


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=40), st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_zones_hold_every_sequence_once(lengths: list[int], tensor_parallel: int) -> None:
    layer = layer_3b(load_data(ZeppelinData, "zeppelin"), 32, tensor_parallel)
    (groups,) = zones_of(layer, [lengths])
    assert sorted(size for group in groups for size in group.lengths) == sorted(lengths)
    assert all(max(group.ranks) < layer.num_ranks for group in groups)


def test_a_remap_evens_the_linear_layers_and_pays_for_its_busiest_link(data: ZeppelinData) -> None:
    layer = layer_3b(data)
    groups = (ZoneGroup(ranks=(0,), lengths=(800,)), ZoneGroup(ranks=(9,), lengths=(800,)))
    attention_s = layer.ring_s(groups[0], routed=False)
    assert layer.seconds(groups, routed=False, remapped=False) == pytest.approx(attention_s + layer.linear_s(800))
    moved_s = 700 * 3200 * 2 / 155e9  # each keeps 100 of its 800 tokens and no token leaves a node
    assert layer.seconds(groups, routed=False, remapped=True) == pytest.approx(
        attention_s + 4 * moved_s + layer.linear_s(100)
    )


def test_moves_between_nodes_share_their_nics(data: ZeppelinData) -> None:
    """One node has all tokens: every rank sends half of its 160, two ranks by the same NIC."""
    layer = layer_3b(data)
    moves = token_moves((160,) * 8 + (0,) * 8, balanced_counts(1280, 16), layer.node_ranks)
    assert layer.moves_s(moves) == pytest.approx(2 * 80 * 3200 * 2 / 24e9)


def test_batches_hold_exactly_their_tokens_and_repeat(data: ZeppelinData) -> None:
    for lengths in data.grid.lengths:
        batches = batches_of(data, lengths, 65536)
        assert [sum(batch) for batch in batches] == [65536] * 3
        assert batches == batches_of(data, lengths, 65536)
    drawn = [size for batch in batches_of(replace(data, num_batches=400), "arxiv", 2**20) for size in batch]
    assert sum(drawn) / len(drawn) == pytest.approx(data.arxiv.mean_tokens, rel=0.05)


def test_short_sequences_gain_more_than_long_ones(data: ZeppelinData) -> None:
    layer = layer_3b(data)
    short, long = (variant_times(layer, [[size] * (65536 // size)]).speedup for size in (1024, 65536))
    assert 1 < long < short


def test_the_table_says_what_it_misses(data: ZeppelinData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one model: the rows that rest on lengths move, the others do not."""
    small = replace(data, num_batches=2, grid=replace(data.grid, models=data.grid.models[1:2], devices=(16,)))
    monkeypatch.setattr(zeppelin, "load_data", lambda cls, name: small)
    result = zeppelin.reproduce_zeppelin()
    rows = {row.name: row for row in result.rows}
    assert rows["64k sequence: transfer of a round, ms"].within
    routed = rows["64k sequence: routed transfer of a round, ms"]
    # 52.4 MB in 0.411 ms is more than four NICs of 24.0 GB/s carry, so on A no proxies can meet it
    assert not routed.within and routed.ours > 1000 * 2 * 4096 * 3200 * 2 / (4 * 24e9)
    assert all(math.isfinite(row.ours) for row in result.rows)
    assert not result.met and len(rows) == len(result.rows)
    assert any("grid, declared before" in line for line in result.assumptions)
