"""Orders of pipeline actions: legal, within 1F1B's memory, and its time where all microbatches are alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.pricing.pipeline_order import StageWork, peak_tokens_in_flight, pipeline_order, rank_actions

WORK = st.lists(
    st.builds(
        lambda ranks, seconds: StageWork(ranks=tuple(ranks), seconds=seconds),
        st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True),
        st.floats(0, 9, allow_subnormal=False),
    ),
    min_size=1, max_size=12,
)


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


@given(work=WORK, num_stages=st.integers(1, 5))
def test_each_stage_of_each_rank_is_a_queue_with_a_limit(work, num_stages):
    order = pipeline_order(work, num_stages=num_stages)
    for rank in {rank for item in work for rank in item.ranks}:
        wanted = [index for index, item in enumerate(work) if rank in item.ranks]
        for stage in range(num_stages):
            mine = rank_actions(order, work, rank=rank, stage=stage)
            for backward in (False, True):
                assert [a.microbatch for a in mine if a.backward is backward] == wanted
            assert peak_tokens_in_flight(mine, [1] * len(work)) <= num_stages - stage
            for before, after in zip(mine, mine[1:], strict=False):
                assert before.stop_s <= after.start_s + 1e-9


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


@pytest.mark.parametrize(("num_microbatches", "num_stages"), [(1, 1), (1, 4), (4, 4), (9, 4), (3, 2), (12, 5)])
def test_equal_microbatches_take_the_time_of_1f1b(num_microbatches, num_stages):
    work = [StageWork(ranks=(0,), seconds=3.0)] * num_microbatches
    order = pipeline_order(work, num_stages=num_stages)
    assert max(a.stop_s for a in order) == pytest.approx(3.0 * (num_microbatches + num_stages - 1))


def test_one_stage_runs_the_list_without_gaps():
    work = [StageWork(ranks=(0,), seconds=s) for s in (2.0, 5.0, 1.0)]
    order = pipeline_order(work, num_stages=1)
    assert [(a.microbatch, a.backward) for a in order] == [(m, b) for m in range(3) for b in (False, True)]
    assert order[-1].stop_s == pytest.approx(8.0)


def test_a_pipeline_has_stages():
    with pytest.raises(PlanError, match="at least 1 stage"):
        pipeline_order([], num_stages=0)
