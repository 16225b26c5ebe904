"""Time of pipelines: 1F1B where microbatches are equal, no deadlock where they are shared, proven ends elsewhere."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import SpecError
from planner.reproduce.pipeline import PipelineWork, pipeline_makespan_s, step_makespan_s

SECONDS = st.floats(0.01, 10.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), SECONDS, SECONDS)
def test_equal_microbatches_take_the_time_of_1f1b(
    num: int, num_stages: int, forward_s: float, backward_s: float
) -> None:
    makespan_s = pipeline_makespan_s([forward_s] * num, [backward_s] * num, num_stages)
    assert makespan_s == pytest.approx((num + num_stages - 1) * (forward_s + backward_s))


def test_unequal_microbatches_by_hand() -> None:
    # stage 0: F1 0-1, F2 1-4, B1 4-5, B2 10-13; stage 1: F1 1-2, B1 2-3, F2 4-7, B2 7-10
    assert pipeline_makespan_s([1.0, 3.0], [1.0, 3.0], 2) == 13.0


def test_a_stage_holds_no_more_microbatches_than_stages_follow() -> None:
    # Stage 0 holds two: the third forward waits until the first backward is back, else it could run from 2 on.
    # stage 0: F1 0-1, F2 1-2, B1 12-22, F3 22-42, B2 42-43, B3 63-64
    # stage 1: F1 1-2, B1 2-12, F2 12-13, B2 13-14, F3 42-62, B3 62-63
    assert pipeline_makespan_s([1.0, 1.0, 20.0], [10.0, 1.0, 1.0], 2) == 64.0


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[PipelineWork], int, int]:
    num_pipelines = draw(st.integers(1, 5))
    works = draw(st.lists(
        st.builds(
            lambda pipelines, forward_s, backward_s: PipelineWork(
                pipelines=tuple(sorted(pipelines)), forward_s=forward_s, backward_s=backward_s
            ),
            st.sets(st.integers(0, num_pipelines - 1), min_size=1), SECONDS, SECONDS,
        ),
        max_size=12,
    ))
    return works, num_pipelines, draw(st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(steps())
def test_shared_microbatches_always_finish_between_the_bounds(step: tuple[list[PipelineWork], int, int]) -> None:
    works, num_pipelines, num_stages = step
    makespan_s = step_makespan_s(works, num_pipelines=num_pipelines, num_stages=num_stages)
    both_s = [work.forward_s + work.backward_s for work in works]
    busiest_s = max(
        sum(each_s for work, each_s in zip(works, both_s, strict=True) if pipeline in work.pipelines)
        for pipeline in range(num_pipelines)
    )
    assert makespan_s >= max(busiest_s, num_stages * max(both_s, default=0.0)) * (1 - 1e-9)
    assert makespan_s <= num_stages * sum(both_s) * (1 + 1e-9)


def test_counts_that_deadlock_a_fixed_alternation_finish() -> None:
    """Works 5 and 6 are shared. Pipeline 0 runs them far apart, so its alternation has the backward of 5 before the
    forward of 6; pipeline 1 runs them together and has it after."""
    alone = [PipelineWork(pipelines=(1,), forward_s=1.0, backward_s=1.0)] * 5
    shared = PipelineWork(pipelines=(0, 1), forward_s=1.0, backward_s=1.0)
    between = [PipelineWork(pipelines=(0,), forward_s=1.0, backward_s=1.0)] * 3
    makespan_s = step_makespan_s([*alone, shared, *between, shared], num_pipelines=2, num_stages=4)
    assert 2 * 7 + 6 <= makespan_s < 2 * 4 * 10


def test_pipelines_without_common_work_do_not_wait_for_each_other() -> None:
    works = [PipelineWork(pipelines=(place % 2,), forward_s=1.0 + place % 2, backward_s=2.0) for place in range(8)]
    alone_s = [pipeline_makespan_s([1.0 + pipeline] * 4, [2.0] * 4, 3) for pipeline in range(2)]
    assert step_makespan_s(works, num_pipelines=2, num_stages=3) == pytest.approx(max(alone_s))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (PipelineWork(pipelines=(), forward_s=1.0, backward_s=1.0), "pipelines must be some"),
        (PipelineWork(pipelines=(0, 0), forward_s=1.0, backward_s=1.0), "each once"),
        (PipelineWork(pipelines=(0, 2), forward_s=1.0, backward_s=1.0), "there are 2 pipelines"),
        (PipelineWork(pipelines=(0,), forward_s=0.0, backward_s=1.0), "seconds must be positive"),
        (PipelineWork(pipelines=(0,), forward_s=1.0, backward_s=float("nan")), "seconds must be positive"),
    ],
)
def test_impossible_work_is_refused(work: PipelineWork, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        step_makespan_s([work], num_pipelines=2, num_stages=2)


def test_no_stage_and_unpaired_passes_are_refused() -> None:
    with pytest.raises(SpecError, match="0 stages"):
        pipeline_makespan_s([1.0], [1.0], 0)
    with pytest.raises(SpecError, match="2 forward times and 1 backward"):
        pipeline_makespan_s([1.0, 1.0], [1.0], 2)
