"""Drift: when it is said, and a refit that brings the cost model back to what was measured."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.codec import to_plain
from planner.measured.drift import (
    MIN_SAMPLES,
    MIN_STEPS,
    WARM_UP_STEPS,
    WINDOW_STEPS,
    DriftWatch,
    drift_of,
    group_samples,
    planned_span_s,
    refit_cost,
)
from planner.plan import MemoryPolicy
from planner.pricing.simulate import simulate
from tests.planner.replay.executed import cost_here, executed_on, make_plan, slower
from trainer.prices.plan_inputs import load_cost


def steps_on(machine, *, num_steps=12, noise=None):
    cost = cost_here()
    return [executed_on(make_plan(step, cost), machine, noise=noise) for step in range(num_steps)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_the_planned_span_is_what_the_simulator_says(seed):
    cost = cost_here()
    plan = make_plan(0, cost, seed)
    assert planned_span_s(plan) == pytest.approx(simulate(plan, cost).step_s - cost.step_fixed_s)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_model_wrong_by_two_is_called_out_once_within_ten_steps(factor):
    watch, news = DriftWatch(1.5), []
    for step in range(20):
        drift = watch.add(predicted_s=1.0, measured_s=factor)
        if watch.is_news(drift):
            news.append(step)
            assert drift.is_off and "is off" in drift.sentence() and f"{factor:.2f} times" in drift.sentence()
    assert news == [WARM_UP_STEPS + MIN_STEPS - 1] and news[0] < 10


def test_slow_first_steps_and_single_stalls_are_no_drift():
    watch = DriftWatch(1.5)
    for step in range(40):
        slow = step < WARM_UP_STEPS or step % 5 == 0
        drift = watch.add(predicted_s=1.0, measured_s=9.0 if slow else 1.1)
        assert not watch.is_news(drift)
    assert drift is not None and drift.num_steps == WINDOW_STEPS and drift.ratio == pytest.approx(1.1)


def test_the_factor_decides():
    pairs = [(1.0, 1.6)] * MIN_STEPS
    assert drift_of(pairs[1:], 1.5) is None
    assert drift_of(pairs, 1.5).is_off and not drift_of(pairs, 1.7).is_off
    assert not drift_of(pairs, float("inf")).is_off


def test_refit_finds_a_machine_that_is_slower_in_everything():
    machine = slower(cost_here(), 1.7)
    refit = refit_cost(cost_here(), steps_on(machine))
    assert refit.error_before == pytest.approx(1 - 1 / 1.7) and refit.error_after < 1e-9
    for ours, true in zip(refit.cost.times, machine.times, strict=True):  # those never seen included
        assert (ours.kind, ours.degree) == (true.kind, true.degree)
        for name in ("s_per_token2", "s_per_token", "s_per_sequence", "fixed_s"):
            assert getattr(ours, name) == pytest.approx(getattr(true, name), rel=1e-6)
    assert refit.cost.step_fixed_s == pytest.approx(machine.step_fixed_s)
    assert refit.cost.memory == cost_here().memory
    assert f"refitted to {refit.num_samples} microbatches" in refit.cost.provenance.notes[-1]


def test_refit_follows_single_terms_and_noise_as_far_as_they_are_seen():
    """The attention part alone is twice as slow: scaling everything would not do."""
    cost = cost_here()
    times = tuple(dataclasses.replace(fit, s_per_token2=2 * fit.s_per_token2) for fit in cost.times)
    machine = dataclasses.replace(cost, times=times)
    refit = refit_cost(cost, steps_on(machine, num_steps=40, noise=random.Random(1)))
    assert refit.error_after < 0.04 < refit.error_before
    fresh = [executed_on(make_plan(step, cost, seed=7), machine) for step in range(10)]
    samples = group_samples(fresh)
    errors = [refit.cost.group_s(s.kind, s.degree, s.lengths) / s.seconds - 1 for s in samples]
    assert max(map(abs, errors)) < 0.15


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.05, 20), min_size=10, max_size=10))
def test_refit_is_a_function_of_its_inputs_and_never_prices_work_below_nothing(factors):
    cost = cost_here()
    steps = [executed_on(make_plan(step, cost), slower(cost, factor)) for step, factor in enumerate(factors)]
    refit = refit_cost(cost, steps)
    assert refit is None or refit == refit_cost(cost, steps)  # a negative price would have raised SpecError


def test_stalls_of_the_machine_do_not_move_the_model():
    cost = cost_here()
    steps = [executed_on(make_plan(step, cost), slower(cost, 25.0 if step == 3 else 1.2)) for step in range(12)]
    refit = refit_cost(cost, steps)
    assert refit.error_after < 1e-9 and refit.cost.step_fixed_s == pytest.approx(1.2 * cost.step_fixed_s)


def test_steps_planned_with_another_model_do_not_count():
    cost, other = cost_here(), slower(cost_here(), 3.0)
    steps = steps_on(slower(cost, 1.2))
    foreign = [executed_on(make_plan(step, other), slower(cost, 2.5)) for step in range(40)]
    assert refit_cost(cost, [*foreign, *steps]) == refit_cost(cost, steps)
    assert refit_cost(cost, foreign) is None


@pytest.mark.parametrize("memory", [
    MemoryPolicy(chunk_tokens=64), MemoryPolicy(keep_fraction=0.5, recompute_fraction=0.5),
], ids=["chunks", "recompute"])
def test_what_computes_something_twice_is_no_sample_of_its_shape(memory):
    ((plan, measured),) = steps_on(cost_here(), num_steps=1)
    first = dataclasses.replace(plan.microbatches[0], memory=memory)
    other = dataclasses.replace(plan, microbatches=(first, *plan.microbatches[1:]))
    assert len(group_samples([(other, measured)])) == len(group_samples([(plan, measured)])) - 1


def test_too_little_is_no_refit():
    steps = steps_on(cost_here(), num_steps=1)
    assert len(group_samples(steps)) < MIN_SAMPLES and refit_cost(cost_here(), steps) is None
    assert refit_cost(cost_here(), []) is None


def test_the_file_is_a_cost_model_that_training_takes(tmp_path: Path):
    refit = refit_cost(cost_here(), steps_on(slower(cost_here(), 1.7)))
    path = tmp_path / "refit.json"
    path.write_text(json.dumps(to_plain(refit.cost)))
    assert load_cost(str(path)) == refit.cost
