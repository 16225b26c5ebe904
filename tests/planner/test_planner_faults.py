"""Whatever the strategy: no time, a broken solver and a step that fits nowhere end in a legal plan or one error that
says what is missing; and the same inputs are the same plan in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError
from planner.plan import Sharding
from planner.pricing.verify import verify_plan
from planner.solver import LinearModel, SolverFailure
from planner.step_planner import STRATEGIES, plan_step
from tests.planner.step_cases import RING, ULYSSES, make_cost, make_limits, skewed_lengths
from tests.plans import step_problem

ROOT = Path(__file__).parents[2]
NUM_RANKS = 8
EVERY = pytest.mark.parametrize("strategy", sorted(STRATEGIES))
SHARDED = pytest.mark.parametrize("sharding", list(Sharding))


def setting(sharding: Sharding, **limits: Any) -> tuple[list[int], CostModel, PlanLimits]:
    """Skewed lengths for which no simple plan is proven good, so that strategies with a solver call it."""
    kinds = (ULYSSES, RING)
    cost = replace(make_cost(NUM_RANKS, kinds=kinds, fixed_s=0.03), sharding=sharding)
    return skewed_lengths(4, 40, 9000), cost, make_limits(kinds=kinds, max_nodes=30, relative_gap=0.0, **limits)


@EVERY
@SHARDED
@pytest.mark.parametrize("time_limit_s", [0.0, 0.01, 0.1])
def test_hardly_any_time_is_enough_for_a_legal_plan(strategy: str, sharding: Sharding, time_limit_s: float) -> None:
    lengths, cost, limits = setting(sharding, time_limit_s=time_limit_s)
    plan = plan_step(step_problem(lengths, NUM_RANKS, cost, limits), step=0, strategy=strategy)
    verify_plan(plan, step_problem(lengths, NUM_RANKS, cost, limits))


@EVERY
@SHARDED
def test_a_solver_that_breaks_down_leaves_a_legal_plan(
    strategy: str, sharding: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def broken(*_: Any, **__: Any) -> None:
        asked.append(strategy)
        raise SolverFailure("made up")

    monkeypatch.setattr(LinearModel, "solve", broken)
    lengths, cost, limits = setting(sharding)
    plan = plan_step(step_problem(lengths, NUM_RANKS, cost, limits), step=0, strategy=strategy)
    verify_plan(plan, step_problem(lengths, NUM_RANKS, cost, limits))
    if strategy == "flexsp":
        assert asked
        assert "solver failed: made up" in plan.solver.note


@EVERY
@SHARDED
def test_a_step_that_fits_nowhere_says_what_is_missing(strategy: str, sharding: Sharding) -> None:
    lengths, cost, limits = setting(sharding)
    lengths[7] = 4096 * NUM_RANKS + 1
    with pytest.raises(InfeasibleError, match=r"sequence 7 \(32769 tokens\)") as refused:
        plan_step(step_problem(lengths, NUM_RANKS, cost, limits), step=0, strategy=strategy)
    assert refused.value.binding == "device memory"
    assert refused.value.needed_bytes > refused.value.available_bytes == limits.device_budget_bytes
    assert refused.value.exit_code == 94
    assert "\n" not in str(refused.value)


DIGESTS = """
import json
from planner.plan import Sharding, plan_digest
from planner.step_planner import STRATEGIES, plan_step
from tests.plans import step_problem
from tests.planner.test_planner_faults import NUM_RANKS, setting
found = {}
for sharding in Sharding:
    lengths, cost, limits = setting(sharding)
    for name in STRATEGIES:
        plan = plan_step(step_problem(lengths, NUM_RANKS, cost, limits), step=1, strategy=name)
        found[f"{name}, {sharding}"] = plan_digest(plan)
print(json.dumps(found))
"""


def test_every_strategy_plans_the_same_in_every_process() -> None:
    found = []
    for seed in ("0", "1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True, timeout=200,
        )
        found.append(json.loads(done.stdout))
    assert len(found[0]) == len(STRATEGIES) * len(Sharding)
    assert found[1] == found[0]
    assert found[2] == found[0]
