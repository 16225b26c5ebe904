"""The replay obeys what any machine obeys, equals closed forms where there are some, and agrees with the prediction
where that one's assumptions hold."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from planner.cost.data_sheet import OPTIMIZER_PASS_BYTES, derive_cost
from planner.cost.fits import MemoryFit
from planner.inputs.cluster import ClusterSpec, LinkSpec
from planner.inputs.files import load_cluster, load_model
from planner.plan import AttentionGroup, AttentionKind, MemoryPolicy, Sharding, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, MicrobatchChoice, assemble_plan
from planner.pricing.breakdown import free_links
from planner.pricing.simulate import step_lengths
from planner.replay import layer as replay_layer
from planner.replay.layer import KEPT_LAYERS, token_seconds
from planner.replay.operations import load_curves, machine_model
from planner.replay.state import DataRanks, kernel_seconds
from planner.replay.step import Replay, replay_step
from planner.replay.work import split_heads, whole_work, zigzag_blocks
from planner.schedules.exchange import Round, write_schedule
from tests.planner.random_plans import random_case

LOCAL, ULYSSES, RING = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING
CURVES = load_curves()
MODEL = replace(load_model("llama-3-8b"), num_layers=4)
MEMORY = MemoryFit(fixed_bytes=1000, bytes_per_token=10.0)


def cluster_of(
    num_nodes: int, devices_per_node: int, nics_per_node: int, *, inter_bytes_per_s: float = 47e9, speed: float = 1.0
) -> ClusterSpec:
    """H100 nodes. ``speed``: of all links."""
    start = load_cluster("h100-1024")
    intra, inter = start.intra_node, start.inter_node
    return replace(
        start, num_nodes=num_nodes, devices_per_node=devices_per_node, nics_per_node=nics_per_node,
        intra_node=replace(intra, bytes_per_s=speed * intra.bytes_per_s, latency_s=intra.latency_s / speed),
        inter_node=replace(inter, bytes_per_s=speed * inter_bytes_per_s, latency_s=inter.latency_s / speed),
    )


def plan_of(num_ranks: int, lengths: SequenceOf[int], *groups: MicrobatchChoice, **changes: Any) -> StepPlan:
    cost = derive_cost(cluster_of(num_ranks, 1, 1), MODEL, num_ranks=num_ranks)
    plan = assemble_plan(
        step=0, strategy="test", num_ranks=num_ranks, lengths=lengths, groups=groups, cost=cost,
        status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0,
    )
    return replace(plan, **changes)


def replayed(plan: StepPlan, cluster: ClusterSpec, **options: Any) -> Replay:
    return replay_step(plan, cluster, MODEL, MEMORY, curves=CURVES, **options)


def data_ranks_of(cluster: ClusterSpec, num_ranks: int) -> DataRanks:
    return DataRanks(
        machine=machine_model(cluster, CURVES), model=MODEL, num_ranks=num_ranks, tensor_parallel=1, element_bytes=2
    )


def random_plan(seed: int) -> StepPlan:
    plan = random_case(random.Random(seed)).plan
    return replace(plan, sharding=Sharding.ZERO3) if seed % 5 == 4 else plan


def test_ring_arrays_are_the_written_schedule() -> None:
    draw = random.Random(0)
    for _ in range(60):
        degree = draw.randint(2, 9)
        lengths = [draw.choice([draw.randint(1, 30), draw.randint(1, 2000)]) for _ in range(draw.randint(1, 5))]
        group = AttentionGroup(kind=RING, ranks=tuple(range(degree)), sequences=tuple(range(len(lengths))))
        work = zigzag_blocks(np.array(lengths), degree).work
        for rank in range(degree):
            schedule = write_schedule(group, lengths, rank)
            for walk, towards in ((schedule.forward, -1), (schedule.backward, 1)):
                for number, step in enumerate(walk[:degree]):
                    owner = (rank + towards * number) % degree
                    found = (work.queries[rank, owner], work.keys[rank, owner], work.pairs[rank, owner])
                    assert found == round_work(step)
                    assert work.calls[rank, owner] == len({task.causal for task in step.tasks})


def round_work(step: Round) -> tuple[int, int, int]:
    pairs = (
        task.query.num_tokens * (task.query.num_tokens + 1) // 2 if task.causal
        else task.query.num_tokens * task.key.num_tokens
        for task in step.tasks
    )
    queries, keys = (sum(span.num_tokens for span in spans) for spans in zip(
        *((task.query, task.key) for task in step.tasks), strict=True
    )) if step.tasks else (0, 0)
    return queries, keys, sum(pairs)


@pytest.mark.parametrize(("query", "kv", "degree"), [(32, 8, 8), (32, 8, 32), (28, 4, 5), (5, 1, 3), (8, 8, 3)])
def test_heads_are_split_as_the_engine_splits_them(query: int, kv: int, degree: int) -> None:
    heads = pytest.importorskip("parallel.heads")
    layout, split = heads.HeadLayout(query, kv, degree), split_heads(query, kv, degree)
    assert split.width.tolist() == [layout.width(index) for index in range(degree)]
    assert split.queries.sum() == query


def test_a_single_rank_is_a_closed_form() -> None:
    lengths, cluster = [3000, 500, 70], cluster_of(1, 1, 1)
    plan = plan_of(1, lengths, GroupChoice(LOCAL, (0,), (0, 1)), GroupChoice(LOCAL, (0,), (2,)))
    replay = replayed(plan, cluster)
    data_ranks, expected_s = data_ranks_of(cluster, 1), 0.0
    for microbatch in plan.microbatches:
        (group,) = microbatch.groups
        tokens = np.array([float(sum(lengths[index] for index in group.sequences))])
        sizes = np.array([lengths[index] for index in group.sequences])
        kernels = kernel_seconds(whole_work(sizes), data_ranks, MODEL.num_query_heads)
        forward_s, backward_s, head_s = token_seconds(tokens, data_ranks)
        layer_s = forward_s + backward_s + kernels[0].sum() + kernels[1].sum()
        expected_s += float(MODEL.num_layers * layer_s[0] + head_s[0])
    expected_s += OPTIMIZER_PASS_BYTES * MODEL.num_params / cluster.device.memory_bytes_per_s
    assert replay.step_s == pytest.approx(expected_s, rel=1e-9)
    assert replay.compute_s == (pytest.approx(replay.step_s),) and replay.idle_s == (pytest.approx(0.0),)
    assert replay.sent_bytes == (0,)


@pytest.mark.parametrize("seed", range(12))
def test_a_ring_is_what_its_schedule_says_message_by_message(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a walk over the written schedules, one Python object at a time, every layer."""
    draw = random.Random(seed)
    degree, lengths = draw.choice([2, 2, 3, 5, 8]), [draw.randint(8, 60_000) for _ in range(draw.randint(1, 3))]
    cluster = cluster_of(3, 3, 3, speed=draw.choice([0.01, 0.3, 1.0]))
    ranks = tuple(draw.sample(range(9), degree))
    plan = plan_of(9, lengths, GroupChoice(RING, ranks, tuple(range(len(lengths)))))
    (group,) = plan.microbatches[0].groups
    data_ranks, clock, tokens = data_ranks_of(cluster, 9), [0.0] * degree, np.zeros(9)
    for index, rank in enumerate(ranks):
        own = write_schedule(group, lengths, index).forward[0].tasks
        tokens[rank] = sum(task.query.num_tokens for task in own if task.causal)
    forward_s, backward_s, head_s = token_seconds(tokens, data_ranks)
    for is_forward, seconds in ((True, forward_s), (False, backward_s)):
        early = (MODEL.num_query_heads + 2 * MODEL.num_kv_heads) * MODEL.head_dim * MODEL.hidden_dim
        share = early / MODEL.layer_active_params if is_forward else 1 - early / MODEL.layer_active_params
        for _ in range(MODEL.num_layers):
            clock = [now + share * seconds[rank] for now, rank in zip(clock, ranks, strict=True)]
            clock = walked(group, lengths, clock, data_ranks, is_forward=is_forward)
            clock = [now + (1 - share) * seconds[rank] for now, rank in zip(clock, ranks, strict=True)]
        if is_forward:
            clock = [now + head_s[rank] for now, rank in zip(clock, ranks, strict=True)]
    nothing = replayed(plan_of(9, [1], GroupChoice(LOCAL, (0,), (0,))), cluster)
    once_s = nothing.exposed_communication_s[1] + nothing.compute_s[1]  # rank 1 does only what all do once a step
    monkeypatch.setattr(replay_layer, "REPLAYED_LAYERS", MODEL.num_layers)
    assert replayed(plan, cluster).step_s == pytest.approx(max(clock) + once_s, rel=1e-9)
    monkeypatch.undo()
    assert replayed(plan, cluster).step_s == pytest.approx(max(clock) + once_s, rel=5e-3)


def walked(
    group: AttentionGroup, lengths: SequenceOf[int], clock: list[float], data_ranks: DataRanks, *, is_forward: bool
) -> list[float]:
    """When each rank ends one layer's attention: in every round a rank posts its messages, computes, and waits for both
    ends of them."""
    schedules = [write_schedule(group, lengths, index) for index in range(group.degree)]
    walks = [schedule.forward if is_forward else schedule.backward for schedule in schedules]
    index_of = {rank: index for index, rank in enumerate(group.ranks)}
    for number in range(len(walks[0])):
        posted: dict[tuple[int, int], int] = {}
        for index, walk in enumerate(walks):
            if number + 1 < len(walk):
                for out in walk[number + 1].sends:
                    posted[index, index_of[out.rank]] = 2 * sum(span.num_tokens for span in out.spans)
            for out in walk[number - 1].grad_sends if number else ():
                pair = (index, index_of[out.rank])
                posted[pair] = posted.get(pair, 0) + 4 * sum(span.num_tokens for span in out.spans)
        after = [now + round_s(walk[number], number, data_ranks, is_forward=is_forward)
                 for now, walk in zip(clock, walks, strict=True)]
        for (source, target), token_bytes in posted.items():
            near = group.ranks[source] // 3 == group.ranks[target] // 3
            link: LinkSpec = data_ranks.machine.intra_node if near else data_ranks.machine.inter_node
            arrives_s = max(clock[source], clock[target]) + link.transfer_s(
                2 * MODEL.num_kv_heads * MODEL.head_dim * token_bytes
            )
            after[source], after[target] = max(after[source], arrives_s), max(after[target], arrives_s)
        clock = after
    return clock


def round_s(step: Round, number: int, data_ranks: DataRanks, *, is_forward: bool) -> float:
    queries, keys, pairs = round_work(step)
    calls = len({task.causal for task in step.tasks})
    kernel_s = float(data_ranks.machine.attention.forward_s(
        calls=calls, queries=queries, keys=keys, pairs=pairs, heads=MODEL.num_query_heads, head_dim=MODEL.head_dim
    ))
    row_bytes = (4 + 4 + 2) * MODEL.head_dim
    if is_forward:
        own = sum(task.query.num_tokens for task in step.tasks if task.causal)
        return kernel_s + float(data_ranks.machine.move_s(row_bytes * MODEL.num_query_heads * (queries - own)))
    rows = MODEL.num_query_heads * queries + 2 * MODEL.num_kv_heads * keys
    return data_ranks.machine.backward_ratio * kernel_s + float(data_ranks.machine.move_s(row_bytes * rows))


@pytest.mark.parametrize("seed", range(15))
def test_what_is_sent_arrives_and_time_is_accounted_for(seed: int) -> None:
    plan, cluster = random_plan(seed), cluster_of(3, 4, 2 if seed % 2 else 4)
    replay = replayed(plan, cluster)
    assert sum(replay.sent_bytes) == pytest.approx(sum(replay.received_bytes), rel=1e-9)
    parts = zip(
        replay.compute_s, replay.exposed_communication_s, replay.exposed_swap_s, replay.idle_s, strict=True
    )
    for rank_parts in parts:
        assert min(rank_parts) >= -1e-12 and sum(rank_parts) == pytest.approx(replay.step_s, rel=1e-9)
    assert replay.low_s <= replay.step_s <= replay.high_s
    assert max(replay.node_nic_share) <= 1 and 0 < replay.mfu < 1


@pytest.mark.parametrize("seed", range(10))
def test_ring_bytes_are_those_of_the_schedules(seed: int) -> None:
    plan = random_plan(5 * seed)
    lengths, token_bytes = step_lengths(plan), 2 * MODEL.num_kv_heads * MODEL.head_dim
    expected = np.zeros(plan.num_ranks)
    rings = [group for each in plan.microbatches for group in each.groups if group.kind is RING]
    for group in rings:
        for index, rank in enumerate(group.ranks):
            schedule = write_schedule(group, lengths, index)
            for step in (*schedule.forward, *schedule.backward):
                for sends, size in ((step.sends, 2), (step.grad_sends, 4)):
                    tokens = sum(span.num_tokens for out in sends for span in out.spans)
                    expected[rank] += size * token_bytes * tokens
    only = [replace(each, groups=tuple(
        group if group.kind is RING else replace(group, kind=LOCAL, ranks=group.ranks[:1]) for group in each.groups
    )) for each in plan.microbatches]
    replay = replayed(replace(plan, microbatches=tuple(only)), cluster_of(3, 4, 4))
    once = (plan.num_ranks - 1) / plan.num_ranks * 6 * MODEL.num_params
    assert np.array(replay.sent_bytes) - once == pytest.approx(MODEL.num_layers * expected, abs=1.0)


@pytest.mark.parametrize("seed", range(15))
def test_links_change_only_communication(seed: int) -> None:
    plan, cluster = random_plan(seed), cluster_of(3, 4, 4)
    slow, fast = replayed(plan, cluster), replayed(plan, cluster_of(3, 4, 4, speed=3.0))
    free = replayed(plan, free_links(cluster))
    assert slow.compute_s == pytest.approx(fast.compute_s) and slow.compute_s == pytest.approx(free.compute_s)
    assert max(free.exposed_communication_s) < 1e-9 * free.step_s
    assert free.step_s <= fast.step_s <= slow.step_s


@pytest.mark.parametrize("seed", range(12))
def test_twice_the_links_are_never_slower(seed: int) -> None:
    plan = random_plan(seed)
    for nics, slack in ((4, 1e-9), (2, 0.01)):  # the fluid sharing between groups may give back a little
        steps = [replayed(plan, cluster_of(3, 4, nics, speed=speed)).step_s for speed in (0.25, 0.5, 1.0, 2.0)]
        assert all(after <= before * (1 + slack) for before, after in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("num_flows", [2, 3, 4])
@pytest.mark.parametrize("apart", [True, False])
def test_a_nic_shared_by_flows_is_shared_evenly(num_flows: int, apart: bool) -> None:
    """Rings of two across two nodes with one NIC each, over a network so slow that all else vanishes: k of them take k
    times as long as one; as arrays of their own (a local group goes first) or in one."""
    cluster = cluster_of(2, 4, 1, inter_bytes_per_s=1e4)
    lengths = [8192] * num_flows + [1] * num_flows
    rings = [GroupChoice(RING, (index, 4 + index), (index,)) for index in range(num_flows)]
    locals_ = [GroupChoice(LOCAL, (index,), (num_flows + index,)) for index in range(num_flows)]
    many = replayed(plan_of(8, lengths, *[
        (local, ring) if apart and index % 2 else (ring, local)
        for index, (ring, local) in enumerate(zip(rings, locals_, strict=True))
    ]), cluster)
    one = replayed(plan_of(8, lengths, (rings[0], locals_[0])), cluster)
    none = replayed(plan_of(8, lengths, locals_[0]), cluster)
    took = [max(replay.exposed_communication_s) - none.exposed_communication_s[1] for replay in (one, many)]
    assert took[1] / took[0] == pytest.approx(num_flows, rel=0.02)


def test_one_group_shares_its_nics_with_itself() -> None:
    """A ring that crosses between two nodes with every message: four flows leave each node at once."""
    zigzag, aligned = (0, 4, 1, 5, 2, 6, 3, 7), tuple(range(8))
    took = []
    for ranks, nics in ((aligned, 1), (zigzag, 1), (zigzag, 4)):
        cluster = cluster_of(2, 4, nics, inter_bytes_per_s=1e4)
        replay = replayed(plan_of(8, [32_768], GroupChoice(RING, ranks, (0,))), cluster)
        none = replayed(plan_of(8, [1], GroupChoice(LOCAL, (0,), (0,))), cluster)
        took.append(max(replay.exposed_communication_s) - none.exposed_communication_s[1])
    assert took[1] / took[0] == pytest.approx(4, rel=0.02)
    assert took[2] / took[1] == pytest.approx(1, rel=0.02), "four NICs of a quarter of the rate"


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_ulysses_bytes_and_seconds(degree: int) -> None:
    """All-to-alls of one node: every rank sends (degree - 1) / degree of its q, k, v, output and their gradients."""
    cluster, lengths = cluster_of(1, 8, 8), [32_768]
    plan = plan_of(8, lengths, GroupChoice(ULYSSES, tuple(range(degree)), (0,)))
    replay, none = replayed(plan, cluster), replayed(plan_of(8, [1], GroupChoice(LOCAL, (0,), (0,))), cluster)
    heads = 2 * MODEL.num_query_heads + 2 * MODEL.num_kv_heads
    sent = 2 * (degree - 1) / degree * 32_768 / degree * heads * MODEL.head_dim * 2 * MODEL.num_layers
    assert replay.sent_bytes[0] - none.sent_bytes[0] == pytest.approx(sent, rel=1e-9)
    latency_s = machine_model(cluster, CURVES).collective_latency_s(degree, 8)
    wire_s = sent / cluster.intra_node.bytes_per_s + 4 * MODEL.num_layers * latency_s
    assert replay.exposed_communication_s[0] - none.exposed_communication_s[0] == pytest.approx(wire_s, rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_two_layers_stand_for_all(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(MODEL, num_layers=12)
    plan, cluster = random_plan(seed), cluster_of(3, 4, 2 if seed % 2 else 4)
    quick = replay_step(plan, cluster, model, MEMORY, curves=CURVES)
    monkeypatch.setattr(replay_layer, "REPLAYED_LAYERS", 12)
    every = replay_step(plan, cluster, model, MEMORY, curves=CURVES)
    assert quick.step_s == pytest.approx(every.step_s, rel=5e-3)
    assert quick.compute_s == pytest.approx(every.compute_s, rel=1e-9) and quick.sent_bytes == every.sent_bytes


def test_swap_hides_behind_compute_or_shows() -> None:
    lengths, cluster = [30_000], cluster_of(1, 1, 1)
    plan = plan_of(1, lengths, GroupChoice(LOCAL, (0,), (0,)))
    swapping = replace(plan, microbatches=tuple(
        replace(each, memory=MemoryPolicy(keep_fraction=0.0, swap_fraction=1.0)) for each in plan.microbatches
    ))
    rates = {rate: replace(cluster, host=replace(cluster.host, copy_bytes_per_s=rate)) for rate in (1e15, 1e7)}
    kept, hidden, shown = replayed(plan, cluster), replayed(swapping, rates[1e15]), replayed(swapping, rates[1e7])
    assert hidden.step_s == pytest.approx(kept.step_s) and hidden.exposed_swap_s == (0.0,)
    away = (MODEL.num_layers - KEPT_LAYERS) / MODEL.num_layers
    copies_s = 2 * away * MODEL.num_layers * MODEL.saved_bytes_per_token(2) * 30_000 / 1e7
    assert copies_s - kept.step_s < shown.exposed_swap_s[0] < copies_s
    assert shown.step_s == pytest.approx(kept.step_s + shown.exposed_swap_s[0])
    assert shown.host_bytes == (int(MEMORY.bytes_per_token * 30_000 * away),) and kept.host_bytes == (0,)
    assert kept.peak_bytes == (1000 + 300_000,) and shown.peak_bytes == (1000 + int(300_000 * (1 - away)),)


def test_waiting_for_a_message_is_told_from_waiting_for_work() -> None:
    """In a balanced ring with one slow hop nobody waits for work; beside a rank with more work all others do."""
    cluster = cluster_of(2, 4, 4, inter_bytes_per_s=1e8)
    ring = GroupChoice(RING, tuple(range(8)), (0,))
    balanced = replayed(plan_of(8, [32_768], ring), cluster)
    assert max(balanced.idle_s) < 0.02 * min(balanced.exposed_communication_s), "only at the very end"
    skewed = replayed(plan_of(8, [32_768, 16_384], (GroupChoice(LOCAL, (3,), (1,)), ring)), cluster_of(1, 8, 8))
    more_s = skewed.compute_s[3] - skewed.compute_s[0]
    assert more_s > 0 and skewed.idle_s[0] == pytest.approx(more_s, rel=0.1) and skewed.idle_s[3] < 0.1 * more_s


def test_zero3_ranks_wait_for_the_slowest_microbatch() -> None:
    groups = [GroupChoice(LOCAL, (rank,), (rank,)) for rank in range(4)]
    plan, cluster = plan_of(4, [20_000, 100, 20_000, 100], *groups), cluster_of(1, 4, 4)
    more = [GroupChoice(LOCAL, (rank,), (rank + 4,)) for rank in range(4)]
    uneven = plan_of(4, [20_000, 100, 20_000, 100, 100, 20_000, 100, 20_000], *groups, *more)
    once, layered = (replayed(replace(uneven, sharding=sharding), cluster) for sharding in Sharding)
    alone = replayed(replace(plan, sharding=Sharding.ZERO3), cluster)
    assert layered.step_s == pytest.approx(2 * alone.step_s, rel=0.01), "the long and the short never even out"
    assert min(layered.idle_s) > 0.3 * layered.step_s and max(once.idle_s) < 0.05 * once.step_s


def test_model_flops_count_squares_of_documents() -> None:
    cluster = cluster_of(1, 1, 1)
    whole = replayed(plan_of(1, [8192], GroupChoice(LOCAL, (0,), (0,))), cluster)
    halves = replayed(plan_of(1, [4096, 4096], GroupChoice(LOCAL, (0,), (0, 1))), cluster)
    assert whole.model_flop - halves.model_flop == pytest.approx(MODEL.attention_flop([8192]) / 2)
    assert whole.mfu == pytest.approx(whole.model_flop / (whole.step_s * cluster.device.peak_flop_per_s))


def test_tensor_parallel_peers_share_heads_and_bytes() -> None:
    plan = plan_of(2, [16_384], GroupChoice(RING, (0, 1), (0,)))
    single, split = replayed(plan, cluster_of(2, 4, 4)), replayed(plan, cluster_of(2, 4, 4), tensor_parallel=4)
    assert split.sent_bytes[0] == pytest.approx(single.sent_bytes[0] / 4, rel=1e-9)
    assert max(split.compute_s) < 0.4 * max(single.compute_s)
    assert split.exposed_communication_s[0] > 0


@pytest.mark.parametrize(("kind", "degree", "length"), [
    (LOCAL, 1, 30_000), (ULYSSES, 8, 65_536), (ULYSSES, 8, 200_000), (RING, 8, 200_000), (RING, 64, 524_288),
])
def test_long_sequences_agree_with_the_prediction(kind: AttentionKind, degree: int, length: int) -> None:
    """Where the coefficients' assumptions hold: long sequences at full efficiency, rings whose messages hide. The rest
    is what the coefficients leave out: the backward's lower rate and the token-wise kernels that move bytes."""
    cluster, model = load_cluster("h200-64"), load_model("llama-3-8b")
    cost = derive_cost(cluster, model, num_ranks=64)
    groups = [
        GroupChoice(kind, tuple(range(first, first + degree)), (first // degree,)) for first in range(0, 64, degree)
    ]
    plan = assemble_plan(
        step=0, strategy="test", num_ranks=64, lengths=[length] * len(groups), groups=groups, cost=cost,
        status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0,
    )
    replay = replay_step(plan, cluster, model, cost.memory, curves=CURVES)
    assert 0.9 < replay.step_s / plan.predicted_s < 1.25
    assert max(replay.peak_bytes) == plan.peak_bytes
