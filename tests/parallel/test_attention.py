"""The attention engine against dense attention with a document mask, in float64: relative error below 1e-12."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel
from parallel.program import compile_rank_program
from planner.plan import AttentionGroup, AttentionKind
from planner.schedules.check import check_schedules
from planner.schedules.exchange import write_schedule
from planner.schedules.layout import head_degree, shard_spans
from tests.examples import by_day_and_nightly
from tests.plans import KINDS, inner_degree, verified_plan
from tests.ranks import ThreadFabric, run_threads

TOLERANCE = 1e-12
CPU = torch.device("cpu")


def dense_attention(q_SNH, k_SKH, v_SKH):
    """Causal attention of one document, plain softmax."""
    ratio = q_SNH.shape[1] // k_SKH.shape[1]
    k, v = k_SKH.repeat_interleave(ratio, 1), v_SKH.repeat_interleave(ratio, 1)
    scores = torch.einsum("snh,tnh->nst", q_SNH, k) * q_SNH.shape[-1] ** -0.5
    size = q_SNH.shape[0]
    scores = scores.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf)
    return torch.einsum("nst,tnh->snh", scores.softmax(-1), v)


def run_case(groups, lengths, num_ranks, heads, kv_heads, head_dim=8, seed=0, dtype=torch.float64):
    """Relative errors of out, dq, dk, dv between the engine on ``num_ranks`` threads and dense attention."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim), (heads, head_dim)]
    documents = [
        [torch.randn(size, *shape, generator=generator, dtype=torch.float64) for shape in shapes] for size in lengths
    ]
    wanted = []
    for q, k, v, dout in documents:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dense_attention(*leaves)
        wanted.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    plan = verified_plan([groups], lengths, num_ranks)
    fabric = ThreadFabric(num_ranks)

    def rank_main(rank):
        program = compile_rank_program(plan, rank)
        engine = AttentionEngine(CpuFlashKernel(), fabric.wire(rank), CPU)
        results = []
        for microbatch in program.microbatches:
            attention = engine.bind(microbatch, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
            rows = [
                torch.cat([documents[s.sequence][part][s.start_token : s.stop_token] for s in microbatch.spans]
                          or [torch.zeros(0, *shapes[part], dtype=torch.float64)]).to(dtype)
                for part in range(4)
            ]
            leaves = [x.requires_grad_() for x in rows[:3]]
            out = attention(*leaves)
            results.append((microbatch.spans, out.detach(), *torch.autograd.grad(out, leaves, rows[3])))
        return results

    got = [[torch.full_like(part, torch.nan) for part in doc] for doc in wanted]
    for results in run_threads(num_ranks, rank_main):
        for spans, *parts in results:
            row = 0
            for span in spans:
                for part, target in zip(parts, got[span.sequence], strict=True):
                    target[span.start_token : span.stop_token] = part[row : row + span.num_tokens]
                row += span.num_tokens
    errors = []
    for part in range(4):
        all_got, all_wanted = (torch.cat([doc[part].flatten() for doc in docs]) for docs in (got, wanted))
        # dq and dk of a one-token document are exactly zero: never divide by less than the scale of the problem
        scale = max(all_wanted.norm().item(), 1e-2 * len(all_wanted) ** 0.5)
        errors.append((all_got - all_wanted).norm().item() / scale)
    return errors


@st.composite
def cases(draw):
    degree = draw(st.integers(1, 8))
    kind = draw(st.sampled_from(KINDS)) if degree > 1 else AttentionKind.LOCAL
    inner = inner_degree(kind, degree)
    if kind in (AttentionKind.USP, AttentionKind.DOUBLE_RING, AttentionKind.ROUTED_RING):
        inner = draw(st.sampled_from([size for size in range(1, degree + 1) if degree % size == 0]))
    lengths = draw(st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=6))
    ratio = draw(st.sampled_from([1, 3, 4, 8]))
    kv_heads = draw(st.integers(1, 3)) if ratio == 1 else draw(st.integers(1, 2))
    heads = kv_heads * ratio
    team = head_degree(kind, degree, inner)
    if team > heads:  # degree above KV heads, with an uneven number of query heads each
        heads = kv_heads = draw(st.integers(team, 9))
    ranks = draw(st.permutations(range(8)))[:degree]
    group = AttentionGroup(
        kind=kind, ranks=tuple(ranks), sequences=tuple(range(len(lengths))), inner_degree=inner
    )
    return group, lengths, heads, kv_heads


@by_day_and_nightly(60, 500)
def test_engine_equals_dense_attention_in_float64(num_examples):
    @settings(max_examples=num_examples, deadline=None)
    @given(cases())
    def check(case):
        group, lengths, heads, kv_heads = case
        check_schedules(group, lengths, [write_schedule(group, lengths, i) for i in range(group.degree)])
        errors = run_case([group], lengths, 8, heads, kv_heads)
        assert max(errors) < TOLERANCE, errors

    check()


def test_rank_in_several_groups_of_one_microbatch():
    groups = [
        AttentionGroup(kind=AttentionKind.RING, ranks=(0, 1, 2), sequences=(0, 3)),
        AttentionGroup(kind=AttentionKind.ULYSSES, ranks=(1, 2), sequences=(1,)),
        AttentionGroup(kind=AttentionKind.LOCAL, ranks=(2,), sequences=(2,)),
        AttentionGroup(kind=AttentionKind.USP, ranks=(3, 1, 0, 2), sequences=(4,), inner_degree=2),
        AttentionGroup(kind=AttentionKind.DOUBLE_RING, ranks=(0, 3, 2, 1), sequences=(5,), inner_degree=2),
        AttentionGroup(kind=AttentionKind.GROUP_CAST, ranks=(2, 1), sequences=(6,)),
    ]
    errors = run_case(groups, [40, 17, 9, 23, 31, 33, 12], 4, 4, 2)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 1), (5, 5)])
def test_heads_that_do_not_divide_and_fewer_kv_heads_than_ranks(kind, heads, kv_heads):
    other = (4, 4) if kind is AttentionKind.USP else (3, inner_degree(kind, 3))
    for degree, inner in ((4, inner_degree(kind, 4)), other):
        group = AttentionGroup(kind=kind, ranks=tuple(range(degree)), sequences=(0, 1, 2), inner_degree=inner)
        assert max(run_case([group], [57, 3, 20], 4, heads, kv_heads)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_merges_in_fp32(kind):
    group = AttentionGroup(kind=kind, ranks=(0, 1, 2, 3), sequences=(0, 1), inner_degree=inner_degree(kind, 4))
    whole = AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(0, 1))
    lengths = [200, 61]
    split = run_case([group], lengths, 4, 8, 2, dtype=torch.bfloat16)
    alone = run_case([whole], lengths, 1, 8, 2, dtype=torch.bfloat16)
    # splitting a sequence over ranks must not cost accuracy beyond rounding the partial results
    assert all(a < 1.5 * b + 1e-3 for a, b in zip(split, alone, strict=True)), (split, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_shorter_than_the_group_leave_ranks_without_rows(kind):
    group = AttentionGroup(kind=kind, ranks=tuple(range(8)), sequences=(0, 1, 2), inner_degree=inner_degree(kind, 8))
    lengths = [1, 2, 3]
    assert any(not spans for spans in shard_spans(group, lengths))
    assert max(run_case([group], lengths, 8, 8, 1)) < TOLERANCE
