"""Head layouts for any degree, KV heads fewer than ranks included, and what they put on the wire."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.engine import AttentionEngine
from parallel.heads import HeadExchange, HeadLayout, MappedHeadsKernel
from parallel.kernel import CpuFlashKernel, Pairs
from parallel.program import compile_rank_program
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind
from tests.plans import verified_plan

layouts = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64)).map(
    lambda t: HeadLayout(t[0] * t[1], t[0], min(t[2], t[0] * t[1]))
)


@given(layouts)
def test_members_share_the_query_heads_out_exactly_and_evenly(layout):
    ranges = [layout.query_heads(index) for index in range(layout.degree)]
    assert [head for start, stop in ranges for head in range(start, stop)] == list(range(layout.num_query_heads))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@given(layouts)
def test_kv_heads_are_just_those_that_the_query_heads_read(layout):
    ratio = layout.num_query_heads // layout.num_kv_heads
    for index in range(layout.degree):
        queries = range(*layout.query_heads(index))
        assert set(range(*layout.kv_heads(index))) == {head // ratio for head in queries}


@given(layouts)
def test_kernel_rule_or_explicit_map_reads_the_right_kv_head(layout):
    ratio = layout.num_query_heads // layout.num_kv_heads
    for index in range(layout.degree):
        (q0, q1), (k0, k1) = layout.query_heads(index), layout.kv_heads(index)
        wanted = [head // ratio - k0 for head in range(q0, q1)]
        explicit = layout.irregular_kv_map(index)
        if explicit is None:
            assert wanted == [head // ((q1 - q0) // (k1 - k0)) for head in range(q1 - q0)]
        else:
            assert list(explicit) == wanted


@pytest.mark.parametrize(("query", "kv", "degree"), [(4, 2, 5), (4, 3, 2), (4, 4, 0)])
def test_impossible_layouts_are_refused(query, kv, degree):
    with pytest.raises(PlanError, match="cannot split"):
        HeadLayout(query, kv, degree)


class Counter:
    """A wire that only notes the shape of every message, by its other end."""

    def __init__(self):
        self.sent, self.received = [], []

    def post(self, sends, receives, what):
        self.sent += [(message.rank, tuple(message.tensor.shape)) for message in sends]
        self.received += [(message.rank, tuple(message.tensor.shape)) for message in receives]
        return self

    def wait(self):
        pass


@settings(max_examples=60, deadline=None)
@given(layouts, st.lists(st.integers(0, 7), min_size=64, max_size=64))
def test_a_rank_receives_each_kv_head_that_it_reads_once_and_no_other(layout, rows):
    rows, head_dim = tuple(rows[: layout.degree]), 2
    ratio = layout.num_query_heads // layout.num_kv_heads
    q, k = torch.zeros(7, layout.num_query_heads, head_dim), torch.zeros(7, layout.num_kv_heads, head_dim)
    for index in range(layout.degree):
        wire, own = Counter(), rows[index]
        exchange = HeadExchange(layout, tuple(range(layout.degree)), index, rows, wire)
        gathered = exchange.gather_qkv(q[:own], k[:own], k[:own])
        queries = range(*layout.query_heads(index))
        read = len({head // ratio for head in queries})
        assert [part.shape[1] for part in gathered] == [len(queries), read, read]  # nothing is replicated after it
        heads = len(queries) + 2 * read
        assert wire.received == [(j, (rows[j], heads, head_dim)) for j in range(layout.degree) if j != index]
        assert wire.sent == [(j, (own, layout.width(j), head_dim)) for j in range(layout.degree) if j != index]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 2), (5, 5), (9, 3), (4, 1)])
def test_rings_of_usp_carry_kv_heads_and_never_query_heads(heads, kv_heads):
    group = AttentionGroup(kind=AttentionKind.USP, ranks=tuple(range(8)), sequences=(0,), inner_degree=4)
    layout = HeadLayout(heads, kv_heads, 4)
    plan = verified_plan([[group]], [64], 8)
    for rank in range(8):
        wire = Counter()
        (microbatch,) = compile_rank_program(plan, rank).microbatches
        engine = AttentionEngine(CpuFlashKernel(), wire, torch.device("cpu"))
        bound = engine.bind(microbatch, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=8)
        rows = microbatch.num_rows
        bound(torch.zeros(rows, heads, 8), torch.zeros(rows, kv_heads, 8), torch.zeros(rows, kv_heads, 8))
        (ring,) = [shape for peer, shape in wire.sent if peer // 4 != rank // 4]
        first, stop = layout.kv_heads(rank % 4)
        assert ring == (32, 2, stop - first, 8)


def test_a_kernel_of_mapped_heads_is_the_kernel_of_repeated_heads():
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(6, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(6, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    index = torch.tensor([0, 1, 1])
    pairs = Pairs(True, ((0, 6),), ((0, 6),), torch.device("cpu"))
    plain, mapped = CpuFlashKernel(), MappedHeadsKernel(CpuFlashKernel(), index)
    out, lse = mapped.forward(q, k, v, pairs, 0.5)
    wanted, _ = plain.forward(q, k[:, index], v[:, index], pairs, 0.5)
    assert torch.equal(out, wanted)
    dq, dk, dv = mapped.backward(dout, q, k, v, out, lse, pairs, 0.5)
    wide = plain.backward(dout, q, k[:, index], v[:, index], out, lse, pairs, 0.5)
    assert torch.equal(dq, wide[0])
    for got, parts in ((dk, wide[1]), (dv, wide[2])):
        assert torch.allclose(got, torch.stack((parts[:, 0], parts[:, 1] + parts[:, 2]), dim=1), rtol=1e-14)
