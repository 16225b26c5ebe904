"""Orders of pipeline actions: legal, within 1F1B's memory, 1F1B itself where all microbatches are alike, close to it
where they are not, and forwards first."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.pricing.pipeline_order import StageWork, pipeline_order, rank_actions

WORK = st.lists(
    st.builds(
        lambda ranks, seconds: StageWork(ranks=tuple(ranks), seconds=seconds),
        st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True),
        st.floats(0, 9, allow_subnormal=False),
    ),
    min_size=1, max_size=12,
)


@settings(deadline=None)
@given(work=WORK, num_stages=st.integers(1, 5))
def test_every_action_once_after_all_it_waits_for(work, num_stages):
    order = pipeline_order(work, num_stages=num_stages)
    place = {(a.microbatch, a.stage, a.backward): number for number, a in enumerate(order)}
    assert len(place) == len(order) == 2 * num_stages * len(work)
    for number, action in enumerate(order):
        m, stage = action.microbatch, action.stage
        if action.backward:
            assert place[m, stage, False] < number
            assert stage == num_stages - 1 or place[m, stage + 1, True] < number
        else:
            assert stage == 0 or place[m, stage - 1, False] < number
    assert [a.start_s for a in order] == sorted(a.start_s for a in order)


@settings(deadline=None)
@given(work=WORK, num_stages=st.integers(1, 5))
def test_each_stage_of_each_rank_is_a_queue_with_a_limit(work, num_stages):
    order = pipeline_order(work, num_stages=num_stages)
    for rank in {rank for item in work for rank in item.ranks}:
        wanted = [index for index, item in enumerate(work) if rank in item.ranks]
        for stage in range(num_stages):
            mine = rank_actions(order, work, rank=rank, stage=stage)
            for backward in (False, True):
                assert [a.microbatch for a in mine if a.backward is backward] == wanted
            in_flight = 0
            for action in mine:
                in_flight += -1 if action.backward else 1
                assert in_flight <= num_stages - stage
            for before, after in zip(mine, mine[1:], strict=False):
                assert before.stop_s <= after.start_s + 1e-9


@settings(deadline=None)
@given(work=WORK, num_stages=st.integers(1, 5))
def test_executed_with_blocking_receives_it_never_deadlocks(work, num_stages):
    """Every (rank, stage) is a process that may only run its next action; a microbatch's action needs all its ranks."""
    order = pipeline_order(work, num_stages=num_stages)
    lists = {
        (rank, stage): list(rank_actions(order, work, rank=rank, stage=stage))
        for rank in {r for item in work for r in item.ranks} for stage in range(num_stages)
    }
    done = set()
    while any(lists.values()):
        heads = {key: queue[0] for key, queue in lists.items() if queue}
        ran = False
        for (_, stage), action in heads.items():
            key = (action.microbatch, action.stage, action.backward)
            needs = (action.microbatch, stage + (1 if action.backward else -1), action.backward)
            free = not 0 <= needs[1] < num_stages or needs in done
            ranks = work[action.microbatch].ranks
            if free and all(heads.get((rank, stage)) == action for rank in ranks) and key not in done:
                for rank in ranks:
                    lists[rank, stage].pop(0)
                done.add(key)
                ran = True
                break
        assert ran, f"stuck with {heads}"


def one_f_one_b(num_microbatches: int, num_stages: int, stage: int) -> list[tuple[int, bool]]:
    """The stage's table of 1F1B (Narayanan et al., arXiv 2104.04473): warm-up forwards, then one of each in turn."""
    num_ahead = min(num_stages - stage - 1, num_microbatches)
    table = [(number, False) for number in range(num_ahead)]
    for number in range(num_microbatches):
        if number + num_ahead < num_microbatches:
            table.append((number + num_ahead, False))
        table.append((number, True))
    return table


def one_f_one_b_s(work: Sequence[StageWork], num_stages: int) -> float:
    """When 1F1B's tables end on one pipeline."""
    tables = [one_f_one_b(len(work), num_stages, stage) for stage in range(num_stages)]
    done_s: dict[tuple[int, int, bool], float] = {}
    free_s = [0.0] * num_stages
    while any(tables):
        for stage, table in enumerate(tables):
            while table:
                number, backward = table[0]
                from_stage = stage + 1 if backward else stage - 1
                needed = (number, from_stage, backward)
                if 0 <= from_stage < num_stages and needed not in done_s:
                    break
                share = 1 - work[number].forward_share if backward else work[number].forward_share
                free_s[stage] = max(free_s[stage], done_s.get(needed, 0.0)) + work[number].seconds * share
                done_s[number, stage, backward] = free_s[stage]
                table.pop(0)
    return max(free_s)


def makespan_s(work: Sequence[StageWork], num_stages: int) -> float:
    return max(action.stop_s for action in pipeline_order(work, num_stages=num_stages))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.floats(0.01, 10.0), st.sampled_from([1 / 3, 0.3, 0.5]))
def test_equal_microbatches_take_the_time_of_1f1b(num_microbatches, num_stages, seconds, forward_share):
    work = [StageWork(ranks=(0,), seconds=seconds, forward_share=forward_share)] * num_microbatches
    assert makespan_s(work, num_stages) == pytest.approx(seconds * (num_microbatches + num_stages - 1))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 8))
def test_equal_microbatches_run_in_the_order_of_1f1b(num_microbatches, num_stages):
    """With times that add up exactly, so that no order hangs on the last digit of a sum."""
    work = [StageWork(ranks=(0, 1), seconds=4.0, forward_share=0.25)] * num_microbatches
    order = pipeline_order(work, num_stages=num_stages)
    for stage in range(num_stages):
        mine = [(action.microbatch, action.backward) for action in rank_actions(order, work, rank=1, stage=stage)]
        assert mine == one_f_one_b(num_microbatches, num_stages, stage)


def test_unequal_microbatches_by_hand():
    # stage 0: F1 0-1, F2 1-4, B1 4-5, B2 10-13; stage 1: F1 1-2, B1 2-3, F2 4-7, B2 7-10
    work = [StageWork(ranks=(0,), seconds=seconds, forward_share=0.5) for seconds in (2.0, 6.0)]
    assert makespan_s(work, 2) == 13.0


def test_a_stage_holds_no_more_microbatches_than_stages_follow():
    # Stage 0 holds two: the third forward waits until the first backward is back, else it could run from 2 on.
    # stage 0: F1 0-1, F2 1-2, B1 12-22, F3 22-42, B2 42-43, B3 63-64
    # stage 1: F1 1-2, B1 2-12, F2 12-13, B2 13-14, F3 42-62, B3 62-63
    passes_s = [(1.0, 10.0), (1.0, 1.0), (20.0, 1.0)]
    work = [StageWork(ranks=(0,), seconds=f + b, forward_share=f / (f + b)) for f, b in passes_s]
    order = pipeline_order(work, num_stages=2)
    assert order[-1].stop_s == pytest.approx(64.0)
    first = [(a.microbatch, a.backward) for a in rank_actions(order, work, rank=0, stage=0)]
    assert first == [(0, False), (1, False), (0, True), (2, False), (1, True), (2, True)]


@settings(deadline=None)
@given(seconds=st.lists(st.floats(0.1, 9), min_size=1, max_size=12), num_stages=st.integers(1, 5))
def test_a_backward_runs_only_while_no_forward_can(seconds, num_stages):
    """On one pipeline: the next forward of the stage is over the limit, or it is not there yet."""
    work = [StageWork(ranks=(0,), seconds=each_s) for each_s in seconds]
    order = pipeline_order(work, num_stages=num_stages)
    arrival_s = {(a.microbatch, a.stage + 1): a.stop_s for a in order if not a.backward}
    for stage in range(num_stages):
        num_forwards = num_backwards = 0
        for action in rank_actions(order, work, rank=0, stage=stage):
            if not action.backward:
                num_forwards += 1
                continue
            may_run = num_forwards < len(work) and num_forwards - num_backwards < num_stages - stage
            assert not may_run or arrival_s.get((num_forwards, stage), 0.0) > action.start_s
            num_backwards += 1


def test_unequal_microbatches_take_about_as_long_as_in_1f1b():
    """On one pipeline, where 1F1B's fixed alternation cannot deadlock."""
    ratios = []
    for seed in range(100):
        draw = random.Random(seed)
        work = [StageWork(ranks=(0,), seconds=draw.lognormvariate(0, 1)) for _ in range(draw.randint(1, 40))]
        num_stages = draw.randint(2, 8)
        ratios.append(makespan_s(work, num_stages) / one_f_one_b_s(work, num_stages))
    assert sum(ratios) / len(ratios) < 1.01
    assert max(ratios) < 1.08


@settings(deadline=None)
@given(work=WORK, num_stages=st.integers(1, 5))
def test_a_step_ends_between_the_bounds(work, num_stages):
    ends_s = makespan_s(work, num_stages)
    busiest_s = max(sum(item.seconds for item in work if rank in item.ranks) for rank in range(5))
    assert ends_s >= max(busiest_s, num_stages * max(item.seconds for item in work)) * (1 - 1e-9)
    assert ends_s <= num_stages * sum(item.seconds for item in work) * (1 + 1e-9)


def test_counts_that_deadlock_a_fixed_alternation_finish():
    """Microbatches 5 and 9 are shared. Rank 0 runs them far apart, so its alternation has the backward of 5 before the
    forward of 9; rank 1 runs them together and has it after."""
    alone, shared, between = (StageWork(ranks=ranks, seconds=2.0, forward_share=0.5) for ranks in ((1,), (0, 1), (0,)))
    assert 2 * 7 + 6 <= makespan_s([*[alone] * 5, shared, *[between] * 3, shared], 4) < 2 * 4 * 10


def test_pipelines_without_common_work_do_not_wait_for_each_other():
    work = [StageWork(ranks=(place % 2,), seconds=3.0 + place % 2) for place in range(8)]
    alone_s = [makespan_s(work[rank::2], 3) for rank in range(2)]
    assert makespan_s(work, 3) == pytest.approx(max(alone_s))


def test_one_stage_runs_the_list_without_gaps():
    work = [StageWork(ranks=(0,), seconds=s) for s in (2.0, 5.0, 1.0)]
    order = pipeline_order(work, num_stages=1)
    assert [(a.microbatch, a.backward) for a in order] == [(m, b) for m in range(3) for b in (False, True)]
    assert order[-1].stop_s == pytest.approx(8.0)


def test_a_pipeline_has_stages():
    with pytest.raises(PlanError, match="at least 1 stage"):
        pipeline_order([], num_stages=0)
