"""The solver wrapper: truthful outcomes, bounds, warm starts, and the same work for the same input."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest

from planner.solver import LinearModel, Outcome, SolverFailure, WorkLimits

ENOUGH = WorkLimits(max_nodes=10**6, max_work=10**12, time_limit_s=30.0, relative_gap=0.0)


def makespan_model(num_jobs: int, num_machines: int, seed: int = 0) -> tuple[LinearModel, list[float], list[float]]:
    """Minimise the makespan of random jobs; returns the model, the job times and 'all on machine 0' as a start."""
    draw = random.Random(seed)
    times = [draw.uniform(1.0, 10.0) for _ in range(num_jobs)]
    model = LinearModel()
    makespan = model.variable()
    places = [[model.variable(high=1.0, integer=True) for _ in range(num_machines)] for _ in times]
    for row in places:
        model.row(dict.fromkeys(row, 1.0), low=1.0, high=1.0)
    for machine in range(num_machines):
        load = {row[machine]: time for row, time in zip(places, times, strict=True)}
        model.row({**load, makespan: -1.0}, high=0.0)
    model.minimize({makespan: 1.0})
    start = [0.0] * (1 + num_jobs * num_machines)
    start[makespan] = sum(times)
    for row in places:
        start[row[0]] = 1.0
    return model, times, start


def brute_force_makespan(times: list[float], num_machines: int) -> float:
    def makespan(choice: tuple[int, ...]) -> float:
        return max(sum(t for t, m in zip(times, choice, strict=True) if m == each) for each in range(num_machines))

    return min(makespan(choice) for choice in itertools.product(range(num_machines), repeat=len(times)))


@pytest.mark.parametrize("seed", range(3))
def test_optimal_agrees_with_brute_force(seed: int) -> None:
    model, times, _ = makespan_model(7, 3, seed)
    solution = model.solve(ENOUGH)
    assert solution.outcome is Outcome.OPTIMAL
    assert solution.objective == pytest.approx(brute_force_makespan(times, 3))
    assert solution.bound == pytest.approx(solution.objective)
    assert len(solution.values) == 1 + 7 * 3


def test_a_run_that_hits_its_limit_is_feasible_with_a_bound_below() -> None:
    model, times, start = makespan_model(30, 6)
    solution = model.solve(WorkLimits(max_nodes=20, max_work=10**12, time_limit_s=30.0, relative_gap=0.0), start)
    assert solution.outcome is Outcome.FEASIBLE
    assert not solution.hit_clock
    assert sum(times) / 6 * (1 - 1e-6) <= solution.bound < solution.objective


def test_warm_start_is_the_incumbent_when_no_work_is_allowed() -> None:
    model, times, start = makespan_model(30, 6)
    least = WorkLimits(max_nodes=0, max_work=1, time_limit_s=30.0, relative_gap=0.0)
    cold = model.solve(least)
    warm = model.solve(least, start)
    assert cold.outcome is Outcome.NOTHING_FOUND
    assert cold.values == ()
    assert warm.outcome is Outcome.FEASIBLE
    assert warm.objective == pytest.approx(sum(times))
    assert warm.values == pytest.approx(tuple(start))


def test_infeasible_and_pure_linear_models() -> None:
    model = LinearModel()
    x = model.variable(high=3.0, integer=True)
    model.row({x: 2.0}, low=3.0, high=3.5)
    model.minimize({x: 1.0})
    assert model.solve(ENOUGH).outcome is Outcome.INFEASIBLE
    model = LinearModel()
    x = model.variable(high=3.0)
    model.row({x: 2.0}, low=3.0)
    model.minimize({x: 1.0})
    solution = model.solve(ENOUGH)
    assert (solution.outcome, solution.objective, solution.bound) == (Outcome.OPTIMAL, 1.5, 1.5)


def test_clock_is_reported() -> None:
    model, _, start = makespan_model(40, 8)
    solution = model.solve(WorkLimits(max_nodes=10**6, max_work=10**12, time_limit_s=0.05, relative_gap=0.0), start)
    assert solution.outcome is Outcome.FEASIBLE
    assert solution.hit_clock


def test_work_limit_is_reproducible() -> None:
    model, _, start = makespan_model(30, 6)
    limits = WorkLimits(max_nodes=10**6, max_work=300_000, time_limit_s=60.0, relative_gap=0.0)
    first, second = model.solve(limits, start), model.solve(limits, start)
    assert first == second
    assert not first.hit_clock
    assert first.outcome is Outcome.FEASIBLE


def test_breakdown_is_a_solver_failure() -> None:
    model, _, _ = makespan_model(3, 2)
    with pytest.raises(SolverFailure, match="HiGHS failed"):
        model.solve(ENOUGH, [0.0] * 99)  # a start for another model
    unbounded = LinearModel()
    x = unbounded.variable(low=float("-inf"))
    unbounded.minimize({x: 1.0})
    unbounded.row({x: 1.0}, high=5.0)
    with pytest.raises(SolverFailure, match="[Uu]nbounded"):
        unbounded.solve(ENOUGH)


def test_import_is_lazy_and_stdout_stays_clean() -> None:
    code = (
        "import sys, planner.solver as s, planner.step_planner\n"
        "assert not {'pulp', 'highspy', 'torch'} & set(sys.modules)\n"
        "m = s.LinearModel(); x = m.variable(high=2.0, integer=True); m.row({x: 1.0}, low=1.0); m.minimize({x: 1.0})\n"
        "print(m.solve(s.WorkLimits(max_nodes=1, max_work=10**9, time_limit_s=9, relative_gap=0)).objective)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n"
