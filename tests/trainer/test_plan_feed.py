"""Plans from a child process: the normal way, and every way in which the child can let a step down."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from planner.cost.limits import PlanLimits
from planner.errors import InfeasibleError, PlanError, SpecError
from planner.plan import SolveStatus, plan_digest
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from tests.planner.step_cases import make_cost, make_limits, skewed_lengths
from tests.plans import step_problem
from trainer.plan_feed import PlanFeed, PlanTaken

COST, LIMITS = make_cost(4), make_limits()
HARD = make_limits(relative_gap=0.0)  # so that the solver is asked
LENGTHS = [skewed_lengths(seed, 12, 4096) for seed in range(12)]
START_S = 20.0  # a child's start on a loaded machine


@pytest.fixture
def make_feed() -> Iterator[Callable[..., PlanFeed]]:
    feeds: list[PlanFeed] = []

    def make(**changes: object) -> PlanFeed:
        fields: dict[str, object] = {
            "num_ranks": 4, "cost": COST, "limits": LIMITS, "strategy": "flexsp", "degree": None, "ahead": 2
        }
        feeds.append(PlanFeed(**{**fields, **changes}))  # type: ignore[arg-type]
        return feeds[-1]

    yield make
    for feed in feeds:
        feed.close()


def child_pid(feed: PlanFeed) -> int:
    return feed._child.pid


def check_late(taken: PlanTaken, step: int, budget_s: float, limits: PlanLimits = LIMITS) -> None:
    assert taken.late
    assert taken.wait_s < budget_s + START_S  # not until the child answers, which it never does
    assert taken.plan.solver.status is SolveStatus.LATE
    assert taken.plan.strategy == "flexsp"
    assert taken.plan.step == step
    verify_plan(taken.plan, step_problem(LENGTHS[step], 4, COST, limits))


def kill_child(feed: PlanFeed) -> None:
    os.kill(child_pid(feed), signal.SIGKILL)
    feed._child.wait(START_S)


def test_plans_come_in_order_as_plan_step_makes_them(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    for step in range(3):
        feed.submit(step, LENGTHS[step])
    for step in range(6):
        taken = feed.take(step, LENGTHS[step], START_S)
        if step + 3 < 6:
            feed.submit(step + 3, LENGTHS[step + 3])
        assert not taken.late
        here = plan_step(step_problem(LENGTHS[step], 4, COST, LIMITS), step=step, strategy="flexsp")
        assert plan_digest(taken.plan) == plan_digest(here)


def test_a_ready_plan_needs_no_budget(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    feed.submit(0, LENGTHS[0])
    feed.submit(1, LENGTHS[1])
    feed.take(0, LENGTHS[0], START_S)
    deadline = time.perf_counter() + START_S
    while 1 not in feed._answers and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not feed.take(1, LENGTHS[1], 0.0).late


def test_no_budget_means_the_greedy_plan_now(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    taken = feed.take(0, LENGTHS[0], 0.0)  # the child has not even started
    check_late(taken, 0, 0.0)
    assert "no plan within" in taken.plan.solver.note
    assert not feed.take(1, LENGTHS[1], START_S).late


def test_a_killed_child_is_replaced(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    assert not feed.take(0, LENGTHS[0], START_S).late
    kill_child(feed)
    taken = feed.take(1, LENGTHS[1], START_S)
    check_late(taken, 1, START_S)
    assert taken.wait_s < START_S
    assert "killed by signal 9" in taken.plan.solver.note
    assert not feed.take(2, LENGTHS[2], START_S).late


def test_a_stopped_child_delays_no_step_and_is_replaced(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed(hang_s=0.3)
    assert not feed.take(0, LENGTHS[0], START_S).late
    stopped = child_pid(feed)
    os.kill(stopped, signal.SIGSTOP)
    feed.submit(1, LENGTHS[1])
    check_late(feed.take(1, LENGTHS[1], 0.05), 1, 0.05)
    time.sleep(0.4)
    check_late(feed.take(2, LENGTHS[2], 0.05), 2, 0.05)  # finds the child hung and kills it
    assert not feed.take(3, LENGTHS[3], START_S).late
    assert child_pid(feed) != stopped


@pytest.mark.parametrize(("fault", "obituary"), [
    ("raise MemoryError('made up')", "ended with code 1 .MemoryError: made up"),
    ("import os; os._exit(3)", "ended with code 3"),
    ("import os; os.abort()", "was killed by signal 6"),
])
def test_a_solver_that_takes_the_child_down_leaves_the_greedy_plan(
    make_feed: Callable[..., PlanFeed], monkeypatch: pytest.MonkeyPatch, fault: str, obituary: str
) -> None:
    break_solver(monkeypatch, fault)
    feed = make_feed(limits=HARD)
    for step in (0, 1):  # and again after the restart
        taken = feed.take(step, LENGTHS[step], START_S)
        check_late(taken, step, START_S, HARD)
        assert re.search(obituary, taken.plan.solver.note)


def test_a_solver_that_never_returns_costs_no_more_than_the_budget(
    make_feed: Callable[..., PlanFeed], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_solver(monkeypatch, "while True: pass")
    feed = make_feed(limits=HARD, hang_s=0.2)
    first = child_pid(feed)
    check_late(feed.take(0, LENGTHS[0], 0.5), 0, 0.5, HARD)
    check_late(feed.take(1, LENGTHS[1], 0.5), 1, 0.5, HARD)
    deadline = time.perf_counter() + START_S
    while child_pid(feed) == first and time.perf_counter() < deadline:  # killed by the first take, replaced soon after
        time.sleep(0.01)
    assert child_pid(feed) != first


def break_solver(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Children of feeds made from here on run ``fault`` in place of the solver."""
    start = subprocess.Popen
    program = (
        "from planner import service\n"
        "from planner.strategies.flexsp import strategy\n"
        f"def broken(*_, **__):\n    {fault}\n"
        "strategy.flexsp_schedule = broken\n"
        "service.main()\n"
    )

    def with_fault(command: list[str], **how: Any) -> Any:
        assert command[1:] == ["-m", "planner.service"]
        return start([command[0], "-c", program], **how)

    monkeypatch.setattr("trainer.plan_feed.subprocess.Popen", with_fault)


def test_restarts_are_bounded(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed(max_restarts=1)
    assert not feed.take(0, LENGTHS[0], START_S).late
    for step in (1, 2):
        kill_child(feed)
        check_late(feed.take(step, LENGTHS[step], START_S), step, START_S)
    taken = feed.take(3, LENGTHS[3], START_S)
    check_late(taken, 3, 0.0)
    assert "no more restarts" in taken.plan.solver.note


def test_a_large_step_to_a_stopped_child_blocks_nothing(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    assert not feed.take(0, LENGTHS[0], START_S).late
    os.kill(child_pid(feed), signal.SIGSTOP)
    feed.submit(1, [1000] * 60_000)  # more than a pipe holds
    feed.submit(2, LENGTHS[2])
    check_late(feed.take(2, LENGTHS[2], 0.0), 2, 0.0)


def test_the_users_errors_come_through(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    with pytest.raises(InfeasibleError, match=r"sequence 1 \(100000 tokens\)") as caught:
        feed.take(0, [5, 100_000], START_S)
    assert caught.value.needed_bytes > caught.value.available_bytes
    with pytest.raises(SpecError, match="at least one sequence"):
        feed.take(1, [], START_S)
    with pytest.raises(InfeasibleError):  # the greedy plan says the same when the child has no time
        feed.take(2, [5, 100_000], 0.0)
    assert not feed.take(3, LENGTHS[3], START_S).late
    with pytest.raises(SpecError, match="unknown strategy 'hpd' .did you mean 'hdp'"):
        make_feed(strategy="hpd")


def test_misuse_is_refused(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed(ahead=1)
    feed.submit(0, LENGTHS[0])
    feed.submit(1, LENGTHS[1])
    with pytest.raises(PlanError, match="ahead is 1"):
        feed.submit(2, LENGTHS[2])
    with pytest.raises(PlanError, match="other lengths"):
        feed.take(0, LENGTHS[5], 0.0)
    with pytest.raises(SpecError, match="0 or more"):
        make_feed(ahead=-1)


def test_close_ends_the_child(make_feed: Callable[..., PlanFeed]) -> None:
    feed = make_feed()
    feed.take(0, LENGTHS[0], START_S)
    pid = child_pid(feed)
    feed.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    feed.close()
    stopped = make_feed()
    os.kill(child_pid(stopped), signal.SIGSTOP)
    stopped.submit(0, LENGTHS[0])
    stopped.close()  # hangs where the child is waited for
    with pytest.raises(ProcessLookupError):
        os.kill(child_pid(stopped), 0)
