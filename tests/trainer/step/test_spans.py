"""Microbatch times from all ranks: packed into one sum, and true on real processes."""

from __future__ import annotations

import time

import pytest

from memory.activations import ActivationMemory
from parallel.program import compile_rank_program
from planner.errors import SpecError
from planner.measured.copy_times import OUT, lanes_from_plain, lanes_to_plain
from planner.measured.step_times import microbatch_places
from planner.plan import AttentionGroup, AttentionKind
from tests.planner.replay.executed import cost_here, executed_on, make_plan
from tests.ranks import RankPool
from tests.trainer.step.test_one_step import NUM_RANKS, documents_of, plan_of, random_plan, reader, start
from trainer.settings.resolve import resolve_config
from trainer.step.one_step import train_step
from trainer.step.spans import (
    MAX_LANE_RANKS,
    NUM_TIMES,
    gather_lanes,
    is_recorded,
    lanes_interval,
    pack_times,
    spans_interval,
    unpack_times,
)

SLEEP_S = 0.4


def recorded(rank, world_size, init_method, seeds):
    runtime = start(rank, world_size, init_method)
    outcomes = []
    for seed in seeds:
        plan = random_plan(seed)
        outcomes.append(train_step(
            runtime, compile_rank_program(plan, rank), reader(documents_of(plan, seed)), num_tokens=plan.num_tokens,
            lr=0.0, places=microbatch_places(plan),
        ))
    return outcomes


def one_rank_late(rank, world_size, init_method):
    """Ranks 0 and 1 share a ring, 2 works alone, 3 not at all; rank 1 reads its tokens slowly."""
    runtime = start(rank, world_size, init_method)
    groups = [
        AttentionGroup(kind=AttentionKind.RING, ranks=(0, 1), sequences=(0,)),
        AttentionGroup(kind=AttentionKind.LOCAL, ranks=(2,), sequences=(1,)),
    ]
    plan = plan_of(groups, [40, 9])
    read = reader(documents_of(plan))

    def read_slowly(spans):
        if rank == 1:
            time.sleep(SLEEP_S)
        return read(spans)

    program = compile_rank_program(plan, rank)
    for _ in range(2):  # the first step loads code
        outcome = train_step(
            runtime, program, read_slowly, num_tokens=plan.num_tokens, lr=0.0, places=microbatch_places(plan)
        )
    silent = train_step(runtime, program, read, num_tokens=plan.num_tokens, lr=0.0)
    return outcome, silent


def lanes_of_all(rank, world_size, init_method):
    """Every rank notes another number of copies, rank 1 none."""
    runtime = start(rank, world_size, init_method)
    memory = ActivationMemory()
    memory.timeline.restart(runtime.mesh.device)
    for number in range(0 if rank == 1 else 200 * rank + 1):
        memory.timeline.add(OUT, f"layer {number}", memory.timeline.stamp(), num_bytes=rank)
    return gather_lanes(memory, runtime.mesh)


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(NUM_RANKS)
    yield pool
    pool.close()


def test_every_rank_gets_all_times_and_they_add_up(pool):
    seeds = (0, 1, 2, 3)
    results = pool.run(recorded, seeds)
    for number, seed in enumerate(seeds):
        plan, outcome = random_plan(seed), results[0][number]
        assert all(result[number].ranks == outcome.ranks for result in results)
        found = {(each.microbatch, rank) for rank, times in enumerate(outcome.ranks) for each in times.microbatches}
        assert found == set(microbatch_places(plan))
        for rank, times in enumerate(outcome.ranks):
            assert (times.gather_s, times.reduce_s) == (outcome.gather_s[rank], outcome.reduce_s[rank])
            assert times.finish_s == outcome.span_s[rank]
            assert times.finish_s - times.wait_s == pytest.approx(outcome.busy_s[rank])
            last_s = 0.0
            for each in times.microbatches:
                assert last_s <= each.start_s <= each.middle_s <= each.stop_s
                assert each.forward_wait_s <= each.middle_s - each.start_s
                assert each.backward_wait_s <= each.stop_s - each.middle_s
                last_s = each.stop_s
        own = results[0][number]
        parts_s = own.gather_s[0] + own.span_s[0] + own.reduce_s[0] + own.update_s
        assert parts_s == pytest.approx(own.measured_s)


def test_a_late_peer_shows_as_waiting_of_the_others(pool):
    outcome, silent = pool.run(one_rank_late)[0]
    waiting, late, alone, idle = outcome.ranks
    assert waiting.wait_s > late.wait_s + SLEEP_S / 2, "rank 0 stands still for rank 1, not the other way round"
    assert late.compute_s > SLEEP_S and late.compute_s > waiting.compute_s + SLEEP_S / 2
    assert alone.wait_s == 0 and idle.microbatches == ()
    assert idle.reduce_s > late.reduce_s + SLEEP_S / 2, "it waits for the others in the reduction"
    assert silent.ranks == () and silent.span_s[0] > 0


def test_rank_0_gets_the_lanes_of_all(pool):
    found, *others = pool.run(lanes_of_all)
    assert others == [[]] * (NUM_RANKS - 1)
    lanes = lanes_from_plain(lanes_to_plain(3, found))
    assert [rank.rank for rank in lanes.ranks] == list(range(NUM_RANKS))
    for rank in lanes.ranks:
        assert len(rank.intervals) == (0 if rank.rank == 1 else 200 * rank.rank + 1)
        assert {each.num_bytes for each in rank.intervals} <= {rank.rank}


def test_packed_rows_of_all_ranks_sum_to_the_step():
    plan, measured = executed_on(make_plan(3, cost_here()), cost_here())
    places = microbatch_places(plan)
    packed = [pack_times(times.microbatches, places, rank) for rank, times in enumerate(measured.ranks)]
    assert {part.shape for part in packed} == {(len(places), NUM_TIMES)}
    gather_s, reduce_s = zip(*((rank.gather_s, rank.reduce_s) for rank in measured.ranks), strict=True)
    assert unpack_times(sum(packed), places, gather_s, reduce_s) == measured.ranks


@pytest.mark.parametrize(
    ("asked", "num_steps", "num_ranks", "every"),
    [(None, 120, 4, 1), (None, 100_000, 4096, 8192), (None, 10_000, 64, 13), (7, 120, 4, 7), (0, 120, 4, 0)],
)
def test_the_interval_keeps_the_file_small(asked, num_steps, num_ranks, every):
    assert spans_interval(asked, num_steps=num_steps, num_ranks=num_ranks) == every
    recorded = [step for step in range(num_steps) if is_recorded(step, every=every, num_steps=num_steps)]
    assert (recorded == []) == (every == 0)
    if every:
        assert recorded[-1] == num_steps - 1 and recorded[0] == min(every, num_steps) - 1
        assert asked is not None or len(recorded) * num_ranks <= 50_000 + num_ranks


@pytest.mark.parametrize(
    ("asked", "num_steps", "num_ranks", "every"),
    [(None, 100, 4, 1), (None, 120, 4, 2), (None, 10_000, 64, 1612), (7, 120, 4, 7), (0, 120, 4, 0)],
)
def test_lanes_are_recorded_with_spans_and_more_seldom(asked, num_steps, num_ranks, every):
    assert lanes_interval(asked, num_steps=num_steps, num_ranks=num_ranks) == every
    spans_every = spans_interval(asked, num_steps=num_steps, num_ranks=num_ranks)
    lanes = {step for step in range(num_steps) if is_recorded(step, every=every, num_steps=num_steps)}
    assert lanes <= {step for step in range(num_steps) if is_recorded(step, every=spans_every, num_steps=num_steps)}
    assert (num_steps - 1 in lanes) == (every > 0)
    if asked is None:
        assert len(lanes) * min(num_ranks, MAX_LANE_RANKS) <= 400 + num_ranks


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metrics.spans-every", "-1"], "metrics.spans_every must be at least 0, got -1"),
        (["--metrics.drift-factor", "1"], "metrics.drift_factor must be above 1 (inf never warns), got 1.0"),
        (["--metrics.drift-factor", "nan"], "metrics.drift_factor must be above 1 (inf never warns), got nan"),
    ],
)
def test_wrong_settings_are_refused(flags, words):
    with pytest.raises(SpecError) as caught:
        resolve_config(flags)
    assert str(caught.value) == words


def test_settings_reach_the_config():
    config = resolve_config(["--metrics.spans-every", "7", "--metrics.drift-factor", "inf"])
    assert (config.metrics.spans_every, config.metrics.drift_factor) == (7, float("inf"))
    assert resolve_config([]).metrics.spans_every is None
