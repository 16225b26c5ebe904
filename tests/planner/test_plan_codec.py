"""Plans as JSON: lossless, canonical, strict, the same digest in every process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.codec import from_plain, to_plain
from planner.cost.model import CostModel
from planner.errors import PlanError, SpecError
from planner.plan import PLAN_SCHEMA, plan_digest, plan_from_json, plan_to_json
from tests.planner.random_plans import random_case

ROOT = Path(__file__).parents[2]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_json_round_trip_is_lossless(seed: int) -> None:
    plan = random_case(random.Random(seed)).plan
    text = plan_to_json(plan)
    again = plan_from_json(text)
    assert again == plan and hash(again) == hash(plan)
    assert plan_to_json(again) == text and "\n" not in text
    assert plan_digest(again) == plan_digest(plan)


def test_cost_model_round_trip_keeps_the_digest() -> None:
    cost = random_case(random.Random(5)).cost
    plain = json.loads(json.dumps(to_plain(cost)))
    again = from_plain(CostModel, plain, where="cost")
    assert again == cost and again.digest == cost.digest


def test_digest_ignores_wall_time_and_nothing_else() -> None:
    plan = random_case(random.Random(7)).plan
    later = replace(plan, solver=replace(plan.solver, wall_s=9.0))
    assert plan_digest(later) == plan_digest(plan)
    changed = [
        replace(plan, step=plan.step + 1),
        replace(plan, strategy="other"),
        replace(plan, microbatches=plan.microbatches[::-1]),
        replace(plan, solver=replace(plan.solver, note="x")),
        replace(plan, predicted_s=plan.predicted_s * (1 + 1e-15)),
    ]
    assert len({plan_digest(plan), *map(plan_digest, changed)}) == 1 + len(changed)


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_digest_does_not_depend_on_the_process(hash_seed: str) -> None:
    plan = random_case(random.Random(11)).plan
    program = (
        "import random\n"
        "from planner.plan import plan_digest, plan_from_json\n"
        "from tests.planner.random_plans import random_case\n"
        "case = random_case(random.Random(11))\n"
        f"print(plan_digest(case.plan), plan_digest(plan_from_json({plan_to_json(plan)!r})), case.cost.digest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=True, timeout=60,
    )
    assert done.stdout.split() == [plan_digest(plan), plan_digest(plan), plan.cost_digest]


def test_plans_are_immutable() -> None:
    plan = random_case(random.Random(1)).plan
    with pytest.raises(FrozenInstanceError):
        plan.step = 3  # type: ignore[misc]


def test_unreadable_plans_are_refused_in_one_line() -> None:
    plan = random_case(random.Random(2)).plan
    good = json.loads(plan_to_json(plan))
    group = good["microbatches"][0]["groups"][0]
    bad = {
        "unknown key": {**good, "stepp": 1},
        "missing key": {key: value for key, value in good.items() if key != "cost_digest"},
        "expected a list": {**good, "sequences": 3},
        "expected int": {**good, "step": 1.5},
        "'gather_twice' is not one of": {**good, "sharding": "gather_twice"},
        "'star' is not one of": {**good, "microbatches": [
            {**good["microbatches"][0], "groups": [{**group, "kind": "star"}]}
        ]},
        f"not a plan of schema {PLAN_SCHEMA}": {**good, "schema": PLAN_SCHEMA + 1},
    }
    for words, value in bad.items():
        with pytest.raises(PlanError) as refused:
            plan_from_json(json.dumps(value))
        assert words in str(refused.value) and "\n" not in str(refused.value)
    for text in ("", "{", "[]", "null", plan_to_json(plan)[:-1]):
        with pytest.raises(PlanError):
            plan_from_json(text)


def test_not_a_number_never_reaches_json() -> None:
    plan = random_case(random.Random(3)).plan
    with pytest.raises(ValueError):
        plan_to_json(replace(plan, predicted_s=float("nan")))


def test_codec_names_the_place_and_suggests() -> None:
    cost = to_plain(random_case(random.Random(3)).cost)
    with pytest.raises(SpecError, match=r"cost: unknown key 'memroy' \(did you mean 'memory'\?\)"):
        from_plain(CostModel, {**cost, "memroy": 1}, where="cost")
    cost["times"][1]["degree"] = True
    with pytest.raises(SpecError, match=r"cost\.times\[1\]\.degree: expected int, got True"):
        from_plain(CostModel, cost, where="cost")
