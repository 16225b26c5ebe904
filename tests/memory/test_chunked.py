"""SeCO: chunk by chunk through all layers gives the dense model's gradients, whatever the chunks, groups and budget."""

from __future__ import annotations

import copy
import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.activations import ActivationMemory
from memory.chunked import cut_chunks, place_rows, schedule_chunks
from memory.chunked_kv import ChunkStore
from memory.sparse_chunks import ChunkSampler, Sampling
from parallel import chunk_attention
from parallel.engine import AttentionEngine
from parallel.kernel import CpuFlashKernel, Pairs, choose_kernel
from parallel.program import compile_rank_program
from planner.cost.limits import PlanLimits
from planner.plan import AttentionKind, Span
from planner.step_planner import STRATEGIES, plan_step
from tests.examples import by_day_and_nightly
from tests.memory.chunk_cases import (
    CPU,
    KINDS,
    SPEC,
    SavedBytes,
    chunked_gradients,
    dense_gradients,
    group_of,
    make_model,
    plan_gradients,
    random_documents,
    reader,
    worst_error,
)
from tests.plans import cost_model, step_problem, verified_plan
from tests.ranks import ThreadFabric
from trainer.step.chunk_policy import ChunkPolicy
from trainer.step.chunks import run_chunked

TOLERANCE = 1e-12
LENGTHS = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=5)


def documents_of(lengths):
    return tuple(Span(index, 0, size) for index, size in enumerate(lengths))


@pytest.fixture(scope="module")
def model(lone_rank):
    return make_model()


class TestPlan:
    @settings(max_examples=200, deadline=None)
    @given(LENGTHS, st.integers(1, 4), st.integers(1, 12))
    def test_chunks_partition_the_tokens_in_order(self, lengths, degree, chunk_tokens):
        chunks = cut_chunks(documents_of(lengths), degree=degree, chunk_tokens=chunk_tokens)
        tokens = [
            (span.sequence, token)
            for chunk in chunks for member in chunk.members for span in member
            for token in range(span.start_token, span.stop_token)
        ]
        assert tokens == [(index, token) for index, size in enumerate(lengths) for token in range(size)]
        assert len(chunks) == -(-sum(lengths) // (chunk_tokens * degree))
        for chunk in chunks:
            counts = [sum(span.num_tokens for span in member) for member in chunk.members]
            assert chunk.most_rows == max(counts) <= chunk_tokens and max(counts) - min(counts) <= 1
            last = chunk.spans[-1]
            assert chunk.continues == (last.stop_token < lengths[last.sequence])

    @settings(max_examples=300, deadline=None)
    @given(LENGTHS, st.integers(1, 3), st.integers(1, 8), st.integers(0, 30), st.randoms(use_true_random=False))
    def test_everything_read_was_stored_before(self, lengths, degree, chunk_tokens, keep_rows, rng):
        chunks = cut_chunks(documents_of(lengths), degree=degree, chunk_tokens=chunk_tokens)
        selected = [rng.random() < 0.6 for _ in chunks]
        schedule = schedule_chunks(chunks, selected, keep_rows=keep_rows)
        assert list(schedule.backward) == [i for i in reversed(range(len(chunks))) if selected[i]]
        assert set(schedule.kept) <= set(schedule.backward) and set(schedule.kept) <= set(schedule.forward)
        member = rng.randrange(degree) if rng.random() < 0.5 else None
        places, num_rows, num_carried = place_rows(chunks, schedule, member=member)
        holder: dict[int, tuple[int, int]] = {}  # stored row -> (sequence, token)
        carrier: dict[int, tuple[int, int]] = {}
        read: set[int] = set()
        for index in schedule.forward:
            self.check_reads(chunks[index], places[index], holder, carrier, selected, read,
                             whole=index in schedule.kept, member=member)
            tail = self.owned(chunks[index].tail(), member) if schedule.needed[index] else []
            assert places[index].tail[1] - places[index].tail[0] == len(tail)
            holder |= dict(zip(range(*places[index].tail), tail, strict=True))
            if places[index].carried is not None:
                assert selected[index]
                carrier |= dict(zip(range(*places[index].carried), tail, strict=True))
        for index in schedule.backward:
            self.check_reads(chunks[index], places[index], holder, carrier, selected, read, whole=True, member=member)
        assert set(holder) == set(range(num_rows)) and set(carrier) == set(range(num_carried))
        assert read == set(range(num_rows)), "stored but read by nobody"

    @staticmethod
    def owned(chunk, member):
        parts = chunk.members if member is None else chunk.members[member : member + 1]
        return [(s.sequence, t) for part in parts for s in part for t in range(s.start_token, s.stop_token)]

    def check_reads(self, chunk, placed, holder, carrier, selected, read, *, whole, member):
        first = chunk.spans[0]
        if not whole and len(chunk.spans) > 1:
            return  # only the last document runs, and it began here
        rows = [row for part, _ in placed.parts for row in range(*part)]
        got = [holder[row] for row in rows]
        read |= set(rows)
        if member is None:
            assert got == [(first.sequence, token) for token in range(first.start_token)]
        else:
            assert got == sorted(set(got)) and all(s == first.sequence and t < first.start_token for s, t in got)
        for part, carried in placed.parts:
            if carried is not None:
                assert [carrier[row] for row in range(*carried)] == [holder[row] for row in range(*part)]

    def test_first_pass_is_trimmed(self):
        # one document of 3 chunks, two short ones that end inside the fourth and one that goes on from there
        chunks = cut_chunks(documents_of([12, 1, 1, 5]), degree=1, chunk_tokens=4)
        schedule = schedule_chunks(chunks, [True] * 5)
        assert schedule.needed == (True, True, False, True, False)
        assert schedule.forward == (0, 1, 3, 4) and schedule.kept == {4}
        assert chunks[3].tail().spans == (Span(3, 0, 2),)
        assert schedule_chunks(chunks, [False, False, True, False, False]).forward == (0, 1, 2)
        assert schedule_chunks(chunks, [True] * 5, keep_rows=7).kept == {3, 4}, "3 + 4 rows fit, 11 do not"


class TestExactness:
    @by_day_and_nightly(12, 60)
    def test_gradients_equal_the_dense_models_in_float64(self, model, num_examples):
        @settings(max_examples=num_examples, deadline=None)
        @given(
            lengths=LENGTHS, degree=st.integers(1, 4), kind=st.sampled_from(KINDS), chunk_tokens=st.integers(1, 20),
            keep_rows=st.sampled_from([0, 10, 1000]),
        )
        def check(lengths, degree, kind, chunk_tokens, keep_rows):
            documents = random_documents(lengths)
            group = group_of(kind if degree > 1 else AttentionKind.LOCAL, degree, len(lengths))
            policy = ChunkPolicy(chunk_tokens=chunk_tokens, keep_rows=keep_rows)
            loss, got = chunked_gradients(model, [group], lengths, policy, reader(documents), num_ranks=degree)
            wanted_loss, wanted = dense_gradients(model, documents)
            assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
            assert worst_error(got, wanted) < TOLERANCE

        check()

    @by_day_and_nightly(2, 10)
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_plans_of_every_strategy_in_float64(self, model, strategy, num_examples):
        """Several microbatches on overlapping ranks, groups of every kind that the strategy uses; in chunks all of it
        equals the dense model to rounding."""

        @settings(max_examples=num_examples, deadline=None)
        @given(
            lengths=st.lists(st.integers(1, 60), min_size=4, max_size=8), num_ranks=st.integers(2, 4),
            chunk_tokens=st.integers(3, 20), keep_rows=st.sampled_from([0, 10]),
        )
        def check(lengths, num_ranks, chunk_tokens, keep_rows):
            lengths, documents = [*lengths, 80], random_documents([*lengths, 80])
            limits = PlanLimits(device_budget_bytes=80 // num_ranks + 30, max_ulysses_degree=4, kinds=KINDS)
            plan = plan_step(step_problem(lengths, num_ranks, cost_model(num_ranks), limits), step=0, strategy=strategy)
            assert any(group.degree > 1 for microbatch in plan.microbatches for group in microbatch.groups)
            policy = ChunkPolicy(chunk_tokens=chunk_tokens, keep_rows=keep_rows)
            loss, got = plan_gradients(model, plan, policy, reader(documents))
            wanted_loss, wanted = dense_gradients(model, documents)
            assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
            assert worst_error(got, wanted) < TOLERANCE

        check()

    @pytest.mark.parametrize("chunk_tokens", [2, 7, 40])
    @pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
    def test_head_counts(self, lone_rank, heads, chunk_tokens):
        spec = dataclasses.replace(SPEC, num_query_heads=heads[0], num_kv_heads=heads[1], qk_norm=False, tied_head=True)
        model, lengths = make_model(spec), [40, 3, 17]
        documents = random_documents(lengths)
        wanted = dense_gradients(model, documents, spec)[1]
        for kind, degree in ((AttentionKind.LOCAL, 1), (AttentionKind.ULYSSES, 4), (AttentionKind.RING, 3)):
            group = group_of(kind, degree, 3)
            policy = ChunkPolicy(chunk_tokens=-(-chunk_tokens // degree))
            got = chunked_gradients(model, [group], lengths, policy, reader(documents), num_ranks=degree)[1]
            assert worst_error(got, wanted) < TOLERANCE, kind

    def test_stored_rows_in_pieces(self, model, monkeypatch):
        monkeypatch.setattr(chunk_attention, "_PIECE_ROWS", 5)
        documents = random_documents([64])
        policy = ChunkPolicy(chunk_tokens=4)
        got = chunked_gradients(
            model, [group_of(AttentionKind.LOCAL, 1, 1)], [64], policy, reader(documents), num_ranks=1
        )[1]
        assert worst_error(got, dense_gradients(model, documents)[1]) < TOLERANCE

    def test_ranks_in_several_groups_of_one_microbatch(self, model):
        lengths = [30, 9, 14, 21]
        documents = random_documents(lengths)
        groups = [
            dataclasses.replace(group_of(AttentionKind.RING, 3, 1), sequences=(0, 3)),
            dataclasses.replace(group_of(AttentionKind.ULYSSES, 2, 1), ranks=(2, 1), sequences=(1,)),
            dataclasses.replace(group_of(AttentionKind.LOCAL, 1, 1), ranks=(2,), sequences=(2,)),
        ]
        policy = ChunkPolicy(chunk_tokens=4)
        got = chunked_gradients(model, groups, lengths, policy, reader(documents), num_ranks=3)[1]
        assert worst_error(got, dense_gradients(model, documents)[1]) < TOLERANCE

    def test_float32(self, lone_rank):
        model, lengths = make_model(dtype=torch.float32), [90, 5, 33]
        documents = random_documents(lengths)
        group = group_of(AttentionKind.ULYSSES, 2, 3)
        got = chunked_gradients(model, [group], lengths, ChunkPolicy(chunk_tokens=6), reader(documents), num_ranks=2)[1]
        assert worst_error(got, dense_gradients(model, documents)[1]) < 1e-5

    @pytest.mark.parametrize("hidden", ["add_gradients", "gradients"])
    def test_a_lost_gradient_is_seen(self, model, monkeypatch, hidden):
        """Dropping what one chunk leaves for another must show: no test above passes by detached K/V."""
        monkeypatch.setattr(ChunkStore, hidden, lambda *args: None)
        documents = random_documents([40])
        got = chunked_gradients(
            model, [group_of(AttentionKind.LOCAL, 1, 1)], [40], ChunkPolicy(chunk_tokens=8), reader(documents),
            num_ranks=1,
        )[1]
        assert worst_error(got, dense_gradients(model, documents)[1]) > 1e-3

    def test_trimming_and_keeping_save_rows(self, model):
        lengths, documents = [40, 2, 2], random_documents([40, 2, 2])
        group = group_of(AttentionKind.LOCAL, 1, 3)
        rows = {}
        for keep_rows in (0, 24, 1000):
            read: list[int] = []
            policy = ChunkPolicy(chunk_tokens=10, keep_rows=keep_rows)
            chunked_gradients(model, [group], lengths, policy, reader(documents, log=read), num_ranks=1)
            rows[keep_rows] = sum(read)
        # 30 rows run twice (not the last chunk of the long document, not the short ones); 20 if the last 24 stay
        assert rows == {0: 44 + 30, 24: 44 + 20, 1000: 44}


class TestMemory:
    def peak_bytes(self, model, policy, monkeypatch):
        """Saved tensors and stored K/V and dK/dV, over one document of 1,024 tokens."""
        stores = []
        create = ChunkStore.__init__
        monkeypatch.setattr(ChunkStore, "__init__", lambda self, *args: (create(self, *args), stores.append(self))[0])
        documents = random_documents([1024])
        group = group_of(AttentionKind.LOCAL, 1, 1)
        local = copy.deepcopy(model, {id(model.tensor.group): model.tensor.group})
        runtime = types.SimpleNamespace(
            model=local, chunking=policy, mesh=types.SimpleNamespace(device=CPU, tensor_size=1),
            engine=AttentionEngine(CpuFlashKernel(), ThreadFabric(1).wire(0), CPU), memory=ActivationMemory(),
        )
        (microbatch,) = compile_rank_program(verified_plan([[group]], [1024], 1), 0).microbatches
        counted = SavedBytes(local.parameters(), lambda: sum(store.num_bytes for store in stores))
        with counted:
            if policy is None:
                rows = reader(documents)(microbatch.spans)
                attention = runtime.engine.bind(microbatch, num_query_heads=4, num_kv_heads=2, head_dim=4)
                local(rows.tokens_T, rows.positions_T, rows.labels_T, attention).backward()
            else:
                run_chunked(runtime, microbatch, reader(documents), step=0, num_tokens=1024)
        return counted.peak

    def test_peak_is_keys_values_gradients_and_one_chunk(self, model, monkeypatch):
        whole = self.peak_bytes(model, None, monkeypatch)
        seco = self.peak_bytes(model, ChunkPolicy(chunk_tokens=32), monkeypatch)
        stored = 2 * SPEC.num_layers * (1024 - 32) * 2 * SPEC.num_kv_heads * SPEC.head_dim * 8  # nothing reads the last
        assert seco < stored + 1.1 * whole / 32 and seco < whole / 5

    def test_sparse_chunks_carry_few_gradients(self, model, monkeypatch):
        seco = self.peak_bytes(model, ChunkPolicy(chunk_tokens=32), monkeypatch)
        sampler = ChunkSampler(kind=Sampling.EVEN, fraction=1 / 8, seed=0)
        spaco = self.peak_bytes(model, ChunkPolicy(chunk_tokens=32, sampler=sampler), monkeypatch)
        keys_values = SPEC.num_layers * (1024 - 32) * 2 * SPEC.num_kv_heads * SPEC.head_dim * 8
        assert spaco < seco - 0.8 * keys_values  # dK/dV of 4 of the 32 chunks, and of the last one none


def test_gradients_of_half_precision_chunks_gather_in_fp32():
    store = ChunkStore(4, 4)
    part = torch.full((4, 1, 2), 1.0, dtype=torch.bfloat16)
    for _ in range(1000):
        store.add_gradients(0, (0, 4), part, part)
    dk, dv = store.gradients(0, (0, 4))
    assert dk.dtype == torch.float32 and dk.eq(1000).all() and dv.eq(1000).all()  # bfloat16 would stop at 256


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 40), (1500, 1100)])
def test_query_gradient_equals_the_kernels(num_heads, num_kv_heads, num_queries, num_keys):
    generator = torch.Generator().manual_seed(2)

    def normal(rows, heads):
        return torch.randn(rows, heads, 8, generator=generator, dtype=torch.float64)

    q, dout = normal(num_queries, num_heads), normal(num_queries, num_heads)
    k, v = normal(num_keys, num_kv_heads), normal(num_keys, num_kv_heads)
    pairs = Pairs(False, ((0, num_queries),), ((0, num_keys),), CPU)
    kernel = CpuFlashKernel()
    out, lse = kernel.forward(q, k, v, pairs, 0.3)
    lse = lse + 0.7  # as if there were more keys elsewhere
    arguments = (dout, q, k, v, out, lse, pairs, 0.3)
    wanted = kernel.backward(*arguments)[0]
    torch.testing.assert_close(kernel.query_gradient(*arguments), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_query_gradient_on_cuda_is_as_exact_as_the_kernels():
    generator = torch.Generator().manual_seed(2)
    q, dout, k, v = (torch.randn(rows, heads, 64, generator=generator) for rows, heads in
                     ((700, 8), (700, 8), (1100, 2), (1100, 2)))
    device = torch.device("cuda")
    pairs, cpu_pairs = (Pairs(False, ((0, 700),), ((0, 1100),), place) for place in (device, CPU))
    exact_kernel = CpuFlashKernel()
    exact = exact_kernel.backward(
        dout, q, k, v, *exact_kernel.forward(q, k, v, cpu_pairs, 0.125), cpu_pairs, 0.125
    )[0]
    kernel = choose_kernel(device, torch.bfloat16)
    halves = [x.to(device, torch.bfloat16) for x in (dout, q, k, v)]
    arguments = (*halves, *kernel.forward(*halves[1:], pairs, 0.125), pairs, 0.125)
    errors = [
        (grad.float().cpu() - exact).norm() / exact.norm()
        for grad in (kernel.query_gradient(*arguments), kernel.backward(*arguments)[0])
    ]
    assert errors[0] < 1.5 * errors[1]
