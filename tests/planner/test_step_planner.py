"""``plan_step`` as callers meet it, and the planner process behind its JSON lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.codec import to_plain
from planner.errors import InfeasibleError, SpecError
from planner.plan import AttentionKind, SolveStatus, plan_digest, plan_from_json
from planner.pricing.verify import verify_plan
from planner.service import error_from_plain
from planner.solver import LinearModel, SolverFailure
from planner.step_planner import greedy_step, plan_step
from planner.strategies.flexsp import strategy as flexsp
from tests.planner.step_cases import RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem

BOTH = (ULYSSES, RING)


@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 30), st.sampled_from([(ULYSSES,), (RING,), BOTH]),
    st.sampled_from([1e-4, 5e-3, 5e-2]),
)
@settings(max_examples=40, deadline=None)
def test_flexsp_is_legal_and_never_behind_static_or_greedy(
    seed: int, num_ranks: int, num_sequences: int, kinds: tuple[AttentionKind, ...], fixed_s: float
) -> None:
    lengths = skewed_lengths(seed, num_sequences, 4096)
    cost = make_cost(num_ranks, kinds=kinds, fixed_s=fixed_s)
    limits = make_limits(kinds=kinds, max_ulysses_degree=6, max_nodes=10)
    plan = plan_step(step_problem(lengths, num_ranks, cost, limits), step=7, strategy="flexsp")
    verify_plan(plan, step_problem(lengths, num_ranks, cost, limits))
    assert (plan.step, plan.strategy) == (7, "flexsp")
    others = [
        plan_step(step_problem(lengths, num_ranks, cost, limits), step=7, strategy="static"),
        greedy_step(step_problem(lengths, num_ranks, cost, limits), step=7),
    ]
    for other in others:
        proven = plan.solver.status is SolveStatus.OPTIMAL  # then the search stops at the gap asked for
        assert plan.predicted_s <= other.predicted_s * (1 + (limits.relative_gap if proven else 0) + 1e-9)
    if plan.solver.status is SolveStatus.OPTIMAL:
        assert plan.solver.gap <= limits.relative_gap + 1e-9
    else:
        assert plan.solver.gap > limits.relative_gap


def test_skewed_lengths_gain_over_the_best_static_degree() -> None:
    cost, limits = make_cost(4), make_limits()
    lengths = [4000, 500, 400, 400, 300, 300, 200, 200, 100, 100]
    flexible = plan_step(step_problem(lengths, 4, cost, limits), step=0, strategy="flexsp")
    best_static = plan_step(step_problem(lengths, 4, cost, limits), step=0, strategy="static")
    assert flexible.predicted_s < 0.99 * best_static.predicted_s


@pytest.mark.parametrize(
    ("strategy", "degree", "message"),
    [
        ("flexps", None, "unknown strategy 'flexps' .did you mean 'flexsp'"),
        ("flexsp", 2, "chooses its own degrees"),
    ],
)
def test_bad_strategies(strategy: str, degree: int | None, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plan_step(step_problem([10], 2, make_cost(2), make_limits()), step=0, strategy=strategy, degree=degree)


@pytest.mark.parametrize(("lengths", "message"), [([], "at least one sequence"), ([5, 0], "sequence 1 has 0 tokens")])
def test_bad_lengths(lengths: list[int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plan_step(step_problem(lengths, 2, make_cost(2), make_limits()), step=0, strategy="flexsp")


def test_a_cost_model_for_other_ranks_is_refused() -> None:
    cost = make_cost(4)
    limits = make_limits(kinds=(RING,))
    only_groups = type(cost)(
        times=cost.times[1:], memory=cost.memory, step_fixed_s=0.0, peak_flop_per_s=1.0, provenance=cost.provenance
    )
    with pytest.raises(SpecError, match="calibrate again"):
        plan_step(step_problem([10], 4, only_groups, limits), step=0, strategy="flexsp")


def test_a_broken_solver_leaves_a_plan_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise SolverFailure("HiGHS failed: test")

    monkeypatch.setattr(flexsp, "flexsp_schedule", broken)
    cost, limits = make_cost(4), make_limits(relative_gap=0.0)
    lengths = skewed_lengths(3, 12, 4096)
    plan = plan_step(step_problem(lengths, 4, cost, limits), step=0, strategy="flexsp")
    assert "solver failed: HiGHS failed: test" in plan.solver.note
    assert plan.solver.status in (SolveStatus.GREEDY, SolveStatus.FEASIBLE)


def test_no_time_still_gives_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the solver was asked, with no time left")

    monkeypatch.setattr(LinearModel, "solve", never)
    cost = make_cost(16, fixed_s=0.05)
    lengths = skewed_lengths(2, 60, 30_000)
    limits = make_limits(time_limit_s=0.0, relative_gap=0.0)
    plan = plan_step(step_problem(lengths, 16, cost, limits), step=0, strategy="flexsp")
    assert plan.solver.status is SolveStatus.GREEDY


def child_digest(hash_seed: str) -> str:
    code = (
        "from tests.planner.step_cases import *\n"
        "from planner.step_planner import plan_step\n"
        "from planner.plan import plan_digest\n"
        "from tests.plans import step_problem\n"
        "limits = make_limits(kinds=(ULYSSES, RING), max_nodes=30)\n"
        "cost = make_cost(8, kinds=(ULYSSES, RING), fixed_s=0.03)\n"
        "asked = step_problem(skewed_lengths(4, 40, 9000), 8, cost, limits)\n"
        "plan = plan_step(asked, step=1, strategy='flexsp')\n"
        "assert 'programs' in plan.solver.note, plan.solver.note\n"
        "print(plan_digest(plan))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_same_plan_in_every_process() -> None:
    assert child_digest("1") == child_digest("2")


def header(**changes: Any) -> str:
    fields = {"num_ranks": 4, "cost": make_cost(4), "limits": make_limits(), "strategy": "flexsp", "degree": None}
    return json.dumps(to_plain({**fields, **changes})) + "\n"


def request(step: int, lengths: list[int]) -> str:
    return json.dumps({"step": step, "lengths": lengths}) + "\n"


SERVICE = [sys.executable, "-m", "planner.service"]


def test_service_answers_as_plan_step_and_ends_with_its_input() -> None:
    lines = header() + request(5, [900, 800, 10]) + request(6, [10**6]) + request(7, [])
    done = subprocess.run(SERVICE, input=lines, capture_output=True, text=True, timeout=60, check=True)
    plan, infeasible, empty = (json.loads(line) for line in done.stdout.splitlines())
    here = plan_step(step_problem([900, 800, 10], 4, make_cost(4), make_limits()), step=5, strategy="flexsp")
    assert plan["step"] == 5
    assert plan_digest(plan_from_json(plan["plan"])) == plan_digest(here)
    error = error_from_plain(infeasible["error"])
    assert isinstance(error, InfeasibleError)
    assert (error.binding, error.exit_code) == ("device memory", 94)
    assert error.needed_bytes > error.available_bytes > 0
    assert isinstance(error_from_plain(empty["error"]), SpecError)


def test_service_outlives_an_interrupt_but_not_its_parent() -> None:
    with subprocess.Popen(SERVICE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(header() + request(0, [10, 20]))
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["step"] == 0
        child.send_signal(signal.SIGINT)
        time.sleep(0.05)
        child.stdin.write(request(1, [10, 20]))
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["step"] == 1
        child.stdin.close()  # what a killed parent's end looks like
        assert child.wait(timeout=10) == 0
