"""Three real ranks agree on one plan, or all of them refuse it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from parallel import comm
from parallel.agree import agree_on_plan, compare_digests
from planner.errors import InfeasibleError, LonghaulError, PlanMismatchError
from planner.plan import StepPlan, plan_digest
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from tests.planner.step_cases import make_cost, make_limits
from tests.plans import step_problem
from tests.ranks import RankPool

NUM_RANKS = 3
LENGTHS = (5000, 900, 700, 300, 120, 80)
COST, LIMITS = make_cost(NUM_RANKS), make_limits()
TIMEOUT_S = 30.0


def make_plan() -> StepPlan:
    return plan_step(step_problem(LENGTHS, NUM_RANKS, COST, LIMITS), step=7, strategy="flexsp")


def on_rank(
    rank: int, world_size: int, init_method: str, action: Callable[[int, comm.Group], Any]
) -> tuple[str, dict[str, Any]]:
    """(type of the error, what it says), or ("", what ``action`` returned). ``action(rank, group)``."""
    comm.init_process_group(
        device=torch.device("cpu"), rank=rank, world_size=world_size, timeout_s=TIMEOUT_S, init_method=init_method
    )
    group = comm.new_group(range(world_size), timeout_s=TIMEOUT_S)
    try:
        return "", {"result": action(rank, group)}
    except LonghaulError as error:
        names = ("exit_code", "binding", "needed_bytes", "available_bytes")
        return type(error).__name__, {"message": str(error), **{name: getattr(error, name, None) for name in names}}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(NUM_RANKS)
    yield pool
    pool.close()


def verify(plan: StepPlan) -> None:
    verify_plan(plan, step_problem(LENGTHS, NUM_RANKS, COST, LIMITS))


def agree(rank: int, group: comm.Group) -> str:
    plan = make_plan() if rank == 1 else None
    return plan_digest(agree_on_plan(plan, source=1, group=group, verify=verify))


def test_everyone_receives_the_plan_of_the_source(pool: RankPool) -> None:
    answers = pool.run(on_rank, agree)
    assert [kind for kind, _ in answers] == [""] * NUM_RANKS
    digests = {facts["result"] for _, facts in answers}
    assert len(digests) == 1
    assert digests == {plan_digest(make_plan())}


def agree_on_digests(rank: int, group: comm.Group) -> None:
    plan = make_plan()
    if rank == 2:  # as a bug or a bit flip on one rank would change it
        plan = dataclasses.replace(plan, microbatches=plan.microbatches[::-1])
    compare_digests(plan_digest(plan), group)


def test_another_plan_on_one_rank_stops_all(pool: RankPool) -> None:
    answers = pool.run(on_rank, agree_on_digests)
    good = plan_digest(make_plan())[:12]
    assert [kind for kind, _ in answers] == [PlanMismatchError.__name__] * NUM_RANKS
    assert len({facts["message"] for _, facts in answers}) == 1
    assert f"(rank 0: {good}, rank 1: {good}, rank 2: " in answers[0][1]["message"]
    assert answers[0][1]["message"].count(good) == 2


def reject_on_rank_1(rank: int, group: comm.Group) -> None:
    def verify_here(plan: StepPlan) -> None:
        lengths = (*LENGTHS[:-1], 81) if rank == 1 else LENGTHS  # this rank reads other data than the planner did
        verify_plan(plan, step_problem(lengths, NUM_RANKS, COST, LIMITS))

    agree_on_plan(make_plan() if rank == 0 else None, source=0, group=group, verify=verify_here)


def test_a_plan_that_one_rank_rejects_stops_all(pool: RankPool) -> None:
    answers = pool.run(on_rank, reject_on_rank_1)
    assert [kind for kind, _ in answers] == [PlanMismatchError.__name__] * NUM_RANKS
    assert all("rank 1: rejected" in facts["message"] for _, facts in answers)
    assert answers[1][1]["message"].endswith("this rank: sequence 5: plan says 80 tokens, the step has 81")


def send_an_illegal_plan(rank: int, group: comm.Group) -> None:
    plan = make_plan() if rank == 0 else None
    if plan is not None:
        plan = dataclasses.replace(plan, microbatches=plan.microbatches[:-1])
    agree_on_plan(plan, source=0, group=group, verify=verify)


def test_a_plan_that_all_reject_stops_all(pool: RankPool) -> None:
    answers = pool.run(on_rank, send_an_illegal_plan)
    assert [kind for kind, _ in answers] == [PlanMismatchError.__name__] * NUM_RANKS
    assert all("is in no microbatch" in facts["message"] for _, facts in answers)


def send_no_plan(rank: int, group: comm.Group) -> None:
    error = None
    if rank == 0:
        try:
            plan_step(step_problem([10**6], NUM_RANKS, COST, LIMITS), step=0, strategy="flexsp")
        except InfeasibleError as found:
            error = found
    agree_on_plan(error, source=0, group=group, verify=verify)


def test_no_plan_at_all_is_the_same_error_everywhere(pool: RankPool) -> None:
    answers = pool.run(on_rank, send_no_plan)
    assert answers == [answers[0]] * NUM_RANKS
    kind, facts = answers[0]
    assert kind == InfeasibleError.__name__
    assert facts["exit_code"] == 94
    assert facts["needed_bytes"] > facts["available_bytes"] == LIMITS.device_budget_bytes


def agree_after_a_refusal(rank: int, group: comm.Group) -> str:
    """The group is in step after a refusal: nobody still waits for somebody."""
    with pytest.raises(PlanMismatchError):
        reject_on_rank_1(rank, group)
    return agree(rank, group)


def test_the_group_is_usable_after_a_refusal(pool: RankPool) -> None:
    answers = pool.run(on_rank, agree_after_a_refusal)
    assert len({facts["result"] for _, facts in answers}) == 1
