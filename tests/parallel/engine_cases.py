"""Legal plans over any attention kind, and the engine run on them with threads as ranks: for tests of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import cache

import torch

from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.cost.fits import MemoryFit, Provenance, RemapFit, TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import PlanError
from planner.plan import AttentionKind, SolveStatus
from planner.pricing.assemble import GroupChoice, MicrobatchChoice, assemble_plan
from planner.pricing.verify import verify_plan
from tests.parallel.test_attention import dense_attention
from tests.planner.random_plans import Case
from tests.plans import step_problem
from tests.ranks import ThreadFabric, run_threads

SHARED_KINDS = tuple(kind for kind in AttentionKind if kind is not AttentionKind.LOCAL)
HEAD_DIM = 4
CPU = torch.device("cpu")

Shapes = Mapping[tuple[AttentionKind, int], int]  # (kind, degree) -> inner degree
Parts = tuple[torch.Tensor, ...]


def toy_cost(shapes: Shapes) -> CostModel:
    """Prices single ranks, these shapes and moves. The prices do not matter here."""
    times = [
        TimeFit(kind=kind, degree=degree, inner_degree=inner, s_per_token2=1e-9, s_per_token=1e-6, s_per_sequence=1e-6,
                fixed_s=1e-3)
        for (kind, degree), inner in {(AttentionKind.LOCAL, 1): 1, **shapes}.items()
    ]
    return CostModel(
        times=tuple(times), memory=MemoryFit(fixed_bytes=0, bytes_per_token=1), step_fixed_s=1e-3, peak_flop_per_s=1e9,
        provenance=Provenance(source="test", cluster="test", model="test"),
        remap=RemapFit(
            linear_s_per_token=5e-7, intra_s_per_token=1e-9, inter_s_per_token=1e-8, fixed_s=1e-6, node_size=4
        ),
    )


def make_case(
    microbatches: SequenceOf[MicrobatchChoice], lengths: SequenceOf[int], num_ranks: int, *, num_heads: int,
    shapes: Shapes | None = None,
) -> Case:
    """The verified plan of these microbatches in this order. ``shapes``: by default the largest legal inner degrees."""
    if shapes is None:
        groups = [g for choice in microbatches for g in ((choice,) if isinstance(choice, GroupChoice) else choice)]
        shapes = {
            (group.kind, len(group.ranks)): max(inner_degrees(group.kind, len(group.ranks), num_heads), default=1)
            for group in groups if group.kind is not AttentionKind.LOCAL
        }
    cost = toy_cost(shapes)
    limits = PlanLimits(device_budget_bytes=2**40, max_ulysses_degree=num_heads, kinds=SHARED_KINDS)
    plan = assemble_plan(
        step=0, strategy="test", num_ranks=num_ranks, lengths=lengths, groups=microbatches, cost=cost,
        status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0,
    )
    verify_plan(plan, step_problem(lengths, num_ranks, cost, limits))
    return Case(plan=plan, lengths=tuple(lengths), num_ranks=num_ranks, cost=cost, limits=limits)


@cache
def inner_degrees(kind: AttentionKind, degree: int, num_heads: int) -> tuple[int, ...]:
    """Inner degrees with which such a group is legal, by the verifier; none if the kind cannot have this degree."""
    legal = []
    for inner in (size for size in range(1, degree + 1) if degree % size == 0):
        choice = GroupChoice(kind, tuple(range(degree)), (0, 1, 2))
        try:
            make_case([choice], (37, 5, 1), degree, num_heads=num_heads, shapes={(kind, degree): inner})
        except PlanError:
            continue
        legal.append(inner)
    return tuple(legal)


def shared_case(kind: AttentionKind, degree: int, lengths: SequenceOf[int], *, num_heads: int) -> Case:
    """One group of all ranks for all sequences."""
    choice = GroupChoice(kind, tuple(range(degree)), tuple(range(len(lengths))))
    return make_case([choice], lengths, degree, num_heads=num_heads)


def random_documents(
    lengths: SequenceOf[int], num_heads: int, num_kv_heads: int, *, seed: int = 0, head_dim: int = HEAD_DIM
) -> list[Parts]:
    """(q, k, v, dout) of every document, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            torch.randn(size, heads, head_dim, generator=generator, dtype=torch.float64)
            for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        )
        for size in lengths
    ]


def dense_results(documents: SequenceOf[Parts]) -> list[Parts]:
    """(out, dq, dk, dv) of every document by plain dense attention."""
    results = []
    for *inputs, dout in documents:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = dense_attention(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    return results


def engine_results(
    case: Case, documents: SequenceOf[Parts], fabric: ThreadFabric | None = None
) -> list[Parts]:
    """(out, dq, dk, dv) of every document by the engine: every rank verifies the plan, compiles its part and runs it.

    Raises what any rank raises.
    """
    fabric = fabric or ThreadFabric(case.num_ranks)
    results = [tuple(torch.full_like(x, torch.nan) for x in (q, q, k, v)) for q, k, v, _ in documents]
    heads = [x.shape[1] for x in documents[0]]
    head_dim = documents[0][0].shape[2]

    def rank_main(rank: int) -> None:
        verify_plan(case.plan, step_problem(case.lengths, case.num_ranks, case.cost, case.limits))
        engine = AttentionEngine(CpuFlashKernel(), fabric.wire(rank), CPU)
        for microbatch in compile_rank_program(case.plan, rank).microbatches:
            attention = engine.bind(microbatch, num_query_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
            rows = [
                torch.cat([documents[s.sequence][part][s.start_token : s.stop_token] for s in microbatch.spans]
                          or [torch.zeros(0, heads[part], head_dim, dtype=torch.float64)])
                for part in range(4)
            ]
            leaves = [x.requires_grad_() for x in rows[:3]]
            out = attention(*leaves)
            got = (out.detach(), *torch.autograd.grad(out, leaves, rows[3]))
            first = 0
            for span in microbatch.spans:
                for part, target in zip(got, results[span.sequence], strict=True):
                    target[span.start_token : span.stop_token] = part[first : first + span.num_tokens]
                first += span.num_tokens

    run_threads(case.num_ranks, rank_main)
    return results


def worst_error(got: SequenceOf[Parts], wanted: SequenceOf[Parts]) -> float:
    """Largest absolute difference of any element; NaN (a row nobody computed) counts as infinite."""
    errors = [(a - b).abs().nan_to_num(torch.inf).max().item() for one, other in zip(got, wanted, strict=True)
              for a, b in zip(one, other, strict=True)]
    return max(errors)
