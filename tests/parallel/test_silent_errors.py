"""Errors that other systems shipped without noticing, each with a test that fails if Longhaul had it.

The cases are bugs that users reported against public sequence-parallel trainers. Those that need the trainer (losses,
metrics, resuming) stand in ``tests/trainer/test_silent_errors.py``. What Longhaul does not do, it must refuse aloud.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
import torch

from parallel.comm import Message, Pending
from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.heads import HeadLayout
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.cost.limits import PlanLimits
from planner.errors import PlanError, SpecError
from planner.inputs.files import load_model
from planner.plan import AttentionKind, MemoryPolicy
from planner.pricing.assemble import GroupChoice
from planner.pricing.verify import verify_plan
from planner.step_planner import STRATEGIES, plan_step
from tests.parallel.engine_cases import (
    CPU,
    SHARED_KINDS,
    dense_results,
    engine_results,
    inner_degrees,
    make_case,
    random_documents,
    shared_case,
    worst_error,
)
from tests.parallel.test_attention import dense_attention
from tests.planner.random_plans import Case
from tests.plans import cost_model, step_problem
from tests.ranks import ThreadFabric, ThreadWire, run_threads

TOLERANCE = 1e-11
PACKED = (23, 40, 1, 17)
"""Documents of one group: none divides by anything useful."""


def degrees(kind: AttentionKind, num_heads: int, most: int = 4) -> list[int]:
    return [degree for degree in range(2, most + 1) if inner_degrees(kind, degree, num_heads)]


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_no_attention_across_packed_documents(kind: AttentionKind) -> None:
    """Packing under context parallelism that let a document see its neighbours in the pack."""
    documents = random_documents(PACKED, 4, 2)
    changed = [tuple(100 * x for x in document) if place == 1 else document for place, document in enumerate(documents)]
    for degree in degrees(kind, 4):
        case = shared_case(kind, degree, PACKED, num_heads=4)
        before, after = engine_results(case, documents), engine_results(case, changed)
        for place in (0, 2, 3):  # nothing of them may move, not by one bit
            assert all(torch.equal(a, b) for a, b in zip(before[place], after[place], strict=True)), (degree, place)
        assert not torch.equal(before[1][0], after[1][0])


def test_no_mask_silently_replaced_by_the_causal_one(tmp_path: Path) -> None:
    """Sliding windows, chunked masks or linear attention that context parallelism turned into plain causal attention.

    Longhaul computes causal attention over whole documents; there is no way to ask the engine or the model
    description for anything else. (A Megatron model that asks is refused: see test_megatron.)
    """
    assert list(inspect.signature(MicrobatchAttention.__call__).parameters)[1:] == ["q_TNH", "k_TKH", "v_TKH"]
    file = tmp_path / "windowed.yaml"
    sizes = "num_layers hidden_dim ffn_dim num_query_heads num_kv_heads head_dim vocab_size".split()
    file.write_text("name: windowed\nsliding_window: 4096\n" + "".join(f"{size}: 2\n" for size in sizes))
    with pytest.raises(SpecError, match="sliding_window") as refused:
        load_model(str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_no_wrong_input_gradients_when_a_sequence_is_split(kind: AttentionKind) -> None:
    """dq, dk, dv half wrong under context parallelism, with grouped-query attention."""
    for num_heads, num_kv_heads in ((4, 4), (4, 2), (8, 1)):
        documents = random_documents(PACKED, num_heads, num_kv_heads)
        wanted = dense_results(documents)
        for degree in degrees(kind, num_heads):
            got = engine_results(shared_case(kind, degree, PACKED, num_heads=num_heads), documents)
            assert worst_error(got, wanted) < TOLERANCE, (degree, num_heads, num_kv_heads)


def test_no_swapping_that_nobody_allowed() -> None:
    """Activation offload in a run that has no tier for it: a plan that asks for it is refused before it runs.

    That what is swapped comes back as it was is tested in ``tests/trainer/test_silent_errors.py``.
    """
    case = make_case([GroupChoice(AttentionKind.RING, (0, 1), (0,))], (16,), 2, num_heads=1)
    policy = MemoryPolicy(keep_fraction=0.5, swap_fraction=0.5)
    microbatch = dataclasses.replace(case.plan.microbatches[0], memory=policy)
    plan = dataclasses.replace(case.plan, microbatches=(microbatch,))
    with pytest.raises(PlanError, match="memory policy swap is not allowed here"):
        verify_plan(plan, step_problem(case.lengths, 2, case.cost, case.limits))


def chained_error(kind: AttentionKind, degree: int, depth: int, length: int) -> float:
    """Relative error of the input gradient of ``depth`` bf16 attentions in a row, against float64 dense attention."""
    num_heads = 8
    case = shared_case(kind, degree, (length,), num_heads=num_heads)
    ((q, k, v, dout),) = random_documents((length,), num_heads, num_heads, seed=3, head_dim=16)
    wanted = _chain(dense_attention, depth, *(x.clone() for x in (q, k, v)), dout)
    fabric = ThreadFabric(degree)
    got = torch.zeros_like(wanted)

    def rank_main(rank: int) -> None:
        (microbatch,) = compile_rank_program(case.plan, rank).microbatches
        engine = AttentionEngine(CpuFlashKernel(), fabric.wire(rank), CPU)
        attention = engine.bind(microbatch, num_query_heads=num_heads, num_kv_heads=num_heads, head_dim=16)
        rows = torch.cat([torch.arange(s.start_token, s.stop_token) for s in microbatch.spans])
        got[rows] = _chain(attention, depth, *(x[rows].bfloat16() for x in (q, k, v, dout))).double()

    run_threads(degree, rank_main)
    return ((got - wanted).norm() / wanted.norm()).item()


def _chain(
    attention: Callable[..., torch.Tensor], depth: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    dout: torch.Tensor,
) -> torch.Tensor:
    """Gradient of q after ``depth`` residual attention layers."""
    q = q.requires_grad_()
    x = q
    for _ in range(depth):
        x = x + attention(x, k + x, v - x)
    return torch.autograd.grad(x, q, dout)[0]


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_no_backward_error_that_grows_with_the_ring(kind: AttentionKind) -> None:
    """A ring whose partial results were rounded to half precision at every hop: worse with each rank and layer."""
    alone = chained_error(AttentionKind.LOCAL, 1, depth=4, length=128)
    split = {degree: chained_error(kind, degree, depth=4, length=128) for degree in degrees(kind, 8, most=8)}
    assert split and max(split.values()) < 1.25 * alone, (alone, split)


def test_no_head_split_shared_between_models() -> None:
    """Process-wide state for uneven heads: 3, 3, 3, 3 heads became 4, 4, 4, 0, and the ranks hung."""
    uneven = HeadLayout(num_query_heads=13, num_kv_heads=13, degree=4)
    even = HeadLayout(num_query_heads=12, num_kv_heads=12, degree=4)
    assert [stop - start for start, stop in map(even.query_heads, range(4))] == [3, 3, 3, 3]
    assert sorted(stop - start for start, stop in map(uneven.query_heads, range(4))) == [3, 3, 3, 4]
    # and two models with different heads may take turns on the same ranks
    case = shared_case(AttentionKind.ULYSSES, 4, PACKED, num_heads=12)
    for num_heads in (13, 12, 5, 12):
        documents = random_documents(PACKED, num_heads, num_heads)
        assert worst_error(engine_results(case_for(case, num_heads), documents), dense_results(documents)) < TOLERANCE


def case_for(case: Case, num_heads: int) -> Case:
    return dataclasses.replace(case, limits=dataclasses.replace(case.limits, max_ulysses_degree=num_heads))


@dataclasses.dataclass(frozen=True)
class SlowWire:
    """A wire whose every message and every wait takes a random while: ranks run rounds and layers ahead of others."""

    wire: ThreadWire
    rng: random.Random

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        time.sleep(self.rng.choice((0.0, 0.0, 0.004)))
        return self.wire.post(sends, receives, what)


class SlowFabric(ThreadFabric):
    def wire(self, rank: int) -> SlowWire:  # type: ignore[override]
        return SlowWire(super().wire(rank), random.Random(rank))


def test_no_deadlock_between_rounds_without_a_barrier() -> None:
    """Ranks that are rounds and microbatches apart mixed up messages or waited for each other for ever."""
    kinds = [kind for kind in SHARED_KINDS if 3 in degrees(kind, 4)]
    choices = []
    for number in range(12):
        ranks = tuple(random.Random(number).sample(range(4), 3))
        choices.append(GroupChoice(kinds[number % len(kinds)], ranks, (number,)))
    lengths = [9 + number for number in range(12)]
    case = make_case(choices, lengths, 4, num_heads=4)
    documents = random_documents(lengths, 4, 2)
    fabric = SlowFabric(4, timeout_s=20)
    assert worst_error(engine_results(case, documents, fabric), dense_results(documents)) < TOLERANCE
    assert not fabric.undelivered()


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_no_crash_of_the_attention_under_any_packing_scheduler(strategy: str) -> None:
    """Fine-tuning data, many short documents and a few long ones, crashed with either packing scheduler."""
    rng = random.Random(7)
    lengths = [rng.choice((1, 2, 3, 5, 8, 13)) for _ in range(40)] + [200, 130, 64]
    num_ranks, cost = 4, cost_model(4)
    limits = PlanLimits(device_budget_bytes=200, max_ulysses_degree=4, kinds=SHARED_KINDS)
    plan = plan_step(
        step_problem(lengths, num_ranks, cost, limits),
        step=0,
        strategy=strategy,
        degree=2 if strategy == "static" else None,
    )
    case = Case(plan=plan, lengths=tuple(lengths), num_ranks=num_ranks, cost=cost, limits=limits)
    documents = random_documents(lengths, 4, 2)
    assert worst_error(engine_results(case, documents), dense_results(documents)) < TOLERANCE


@pytest.mark.parametrize("kind", SHARED_KINDS)
@pytest.mark.parametrize("wanted", ["qkv", "v", "q", "kv"])
def test_no_wrong_number_of_gradients_from_backward(kind: AttentionKind, wanted: str) -> None:
    """A backward with one gradient too few or too many; also where only some inputs need one."""
    case = shared_case(kind, 2, PACKED, num_heads=4)
    fabric = ThreadFabric(2)

    def rank_main(rank: int) -> None:
        (microbatch,) = compile_rank_program(case.plan, rank).microbatches
        engine = AttentionEngine(CpuFlashKernel(), fabric.wire(rank), CPU)
        attention = engine.bind(microbatch, num_query_heads=4, num_kv_heads=2, head_dim=8)
        inputs = {
            name: torch.randn(microbatch.num_rows, heads, 8, requires_grad=name in wanted)
            for name, heads in (("q", 4), ("k", 2), ("v", 2))
        }
        attention(*inputs.values()).sum().backward()
        for name, x in inputs.items():
            assert (x.grad is not None) == (name in wanted)
            assert x.grad is None or (x.grad.shape == x.shape and x.grad.dtype == x.dtype)

    run_threads(2, rank_main)


@pytest.mark.parametrize("degree", range(2, 9))
def test_no_unmatched_requests_in_a_zigzag_ring(degree: int) -> None:
    """A zigzag ring whose requests did not pair up. The thread wire compares shape, dtype and round of both ends."""
    lengths = (1, 2 * degree - 1, 2 * degree + 1, 50)
    fabric = ThreadFabric(degree, timeout_s=20)
    documents = random_documents(lengths, 2, 1)
    case = shared_case(AttentionKind.RING, degree, lengths, num_heads=2)
    assert worst_error(engine_results(case, documents, fabric), dense_results(documents)) < TOLERANCE
    assert fabric.posted
    assert not fabric.undelivered()
