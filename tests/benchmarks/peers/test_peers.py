"""Peers of the step benchmark: packing and padding, adapters on made-up peers, and on the real ones where installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peers.adapters import connect, repeat_kv
from benchmarks.peers.kernel import FlashCall, install_flash_attn, packed_pairs
from benchmarks.peers.packing import pack_batch, rank_program
from benchmarks.peers.step import padded_reader
from benchmarks.peers.systems import PEERS
from benchmarks.step import main
from benchmarks.step_results import StepRun, StepSettings
from benchmarks.step_worker import measure_rank
from memory.chunked_loss import IGNORE
from parallel import comm
from parallel.kernel import CpuFlashKernel
from planner.codec import from_plain
from planner.inputs.files import load_model
from planner.plan import AttentionGroup, AttentionKind, Span
from planner.schedules.layout import shard_spans
from tests.ranks import RankPool
from tests.trainer.few_sweeps import few_sweeps

RING, ULYSSES = AttentionKind.RING, AttentionKind.ULYSSES
CPU = torch.device("cpu")


def squares(lengths):
    return float(sum(size * size for size in lengths))


def pack(lengths, kind, degree, num_ranks, capacity_tokens):
    return pack_batch(
        tuple(lengths), kind=kind, degree=degree, num_ranks=num_ranks, capacity_tokens=capacity_tokens, work=squares
    )


class TestPacking:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        st.lists(st.integers(1, 60), min_size=1, max_size=30), st.sampled_from([RING, ULYSSES]),
        st.sampled_from([(2, 2), (2, 8), (4, 8), (8, 8), (3, 6)]), st.integers(16, 40),
    )
    def test_every_token_once_and_every_rank_the_same_within_capacity(self, lengths, kind, shape, capacity_tokens):
        degree, num_ranks = shape
        plan = pack(lengths, kind, degree, num_ranks, capacity_tokens)
        multiple = 2 * degree if kind is RING else 1
        if plan is None:
            assert -(-max(lengths) // multiple) * multiple > capacity_tokens * degree
            return
        seen, num_padding = [], 0
        for first in range(0, num_ranks, degree):
            programs = [rank_program(plan, 0, rank) for rank in range(first, first + degree)]
            for same in zip(*(program.microbatches for program in programs), strict=True):
                assert {mb.num_rows for mb in same} == {same[0].num_rows}  # what their exchanges need
                assert 0 < same[0].num_rows <= capacity_tokens
                for span in (span for mb in same for span in mb.spans):
                    size = lengths[span.sequence] if span.sequence < len(lengths) else 0
                    num_real = max(0, min(span.stop_token, size) - span.start_token)
                    seen += [(span.sequence, span.start_token + token) for token in range(num_real)]
                    num_padding += span.num_tokens - num_real
        assert sorted(seen) == [(number, token) for number, size in enumerate(lengths) for token in range(size)]
        assert num_padding == plan.num_padding_tokens

    def test_padding_by_hand(self):
        ring = pack([5, 9, 8], RING, 2, 2, 20)
        assert ring.groups[0][0].lengths == (12, 8, 8) and ring.num_padding_tokens == 6  # to multiples of 4
        ulysses = pack([5, 9, 9], ULYSSES, 2, 2, 20)
        assert ulysses.groups[0][0].lengths == (9, 9, 5, 1) and ulysses.num_padding_tokens == 1
        assert pack([5, 9, 8], ULYSSES, 2, 2, 20).num_padding_tokens == 0

    def test_a_document_that_fits_only_without_padding_does_not_fit(self):
        assert pack([10], ULYSSES, 2, 2, 5) is not None
        assert pack([10], RING, 2, 2, 5) is None

    def test_replicas_get_equal_work_and_as_few_microbatches_as_fit(self):
        plan = pack([10, 10, 4, 4, 4, 4], ULYSSES, 2, 4, 20)
        assert [[sorted(mb.lengths) for mb in group] for group in plan.groups] == [[[4, 4, 10]], [[4, 4, 10]]]
        assert pack([10] * 8, ULYSSES, 2, 4, 10).num_microbatches == 2

    def test_best_fit_where_even_work_leaves_one_over(self):
        plan = pack([6, 6, 4, 4, 4], ULYSSES, 2, 4, 6)  # rooms of 12: even work makes 6 + 4 and 6 + 4
        assert [[mb.lengths for mb in group] for group in plan.groups] == [[(6, 6)], [(4, 4, 4)]]

    def test_a_microbatch_more_where_nothing_else_fits(self):
        assert pack([7, 7, 7], ULYSSES, 2, 4, 6).num_microbatches == 2

    def test_programs_go_forward_and_straight_back(self):
        program = rank_program(pack([10] * 8, ULYSSES, 2, 4, 10), 7, 3)
        assert program.step == 7 and program.rank == 3
        assert [(action.place, action.backward) for action in program.actions] == [
            (0, False), (0, True), (1, False), (1, True)
        ]


def test_reader_pads_behind_documents_and_behind_the_batch():
    read = padded_reader([np.array([7, 8, 9, 5]), np.array([3, 4])], CPU)
    rows = read((Span(0, 1, 5), Span(0, 6, 8), Span(1, 0, 1), Span(2, 0, 2)))
    assert rows.tokens_T.tolist() == [8, 9, 0, 0, 0, 0, 3, 0, 0]
    assert rows.labels_T.tolist() == [9, 5, IGNORE, IGNORE, IGNORE, IGNORE, 4, IGNORE, IGNORE]
    assert rows.positions_T.tolist() == [1, 2, 3, 4, 6, 7, 0, 0, 1]


def test_degrees_a_peer_can_run():
    tiny = load_model("tiny")  # 4 query heads, 2 KV heads
    assert [degree for degree in range(2, 9) if PEERS["verl"].can_split(tiny, degree)] == [2, 4]
    assert all(PEERS["ring-flash-attn"].can_split(tiny, degree) for degree in range(2, 9))


def test_repeated_kv_heads_meet_their_query_heads():
    k_TKH = torch.arange(2.0).view(1, 2, 1)
    assert repeat_kv(k_TKH, 4).flatten().tolist() == [0, 0, 1, 1]
    assert repeat_kv(k_TKH, 2) is k_TKH


def test_missing_and_unknown_peers_are_refused_in_one_line(monkeypatch, capsys):
    assert main(["--peers", "verk"]) == 2
    assert "unknown peer (did you mean 'verl'?)" in capsys.readouterr().err
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name))
    assert main(["--peers", "deepspeed"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.step: error: --peers deepspeed: deepspeed is not installed; in the benchmark's environment: "
        "pip install deepspeed==0.19.8\n"
    )


def test_stand_in_for_flash_attn_computes_attention(monkeypatch):
    fake_modules(monkeypatch, "flash_attn", "flash_attn.flash_attn_interface")
    install_flash_attn(CpuFlashKernel())
    interface = sys.modules["flash_attn.flash_attn_interface"]
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(9, heads, 8, requires_grad=heads < 9) for heads in (4, 2, 2, 4))
    want = FlashCall.apply(q, k, v, packed_pairs((4, 5), CPU), CpuFlashKernel())
    grads = torch.autograd.grad(want, (q, k, v), dout)
    edges = torch.tensor([0, 4, 9], dtype=torch.int32)
    same = {
        "cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": 5, "max_seqlen_k": 5, "dropout_p": 0.0,
        "softmax_scale": 8**-0.5, "causal": True, "window_size_left": -1,
    }
    with torch.no_grad():
        out, lse, *_ = interface._flash_attn_varlen_forward(q=q, k=k, v=v, **same)
        found = tuple(torch.empty_like(x) for x in (q, k, v))
        interface._flash_attn_varlen_backward(
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=found[0], dk=found[1], dv=found[2], **same
        )
    assert torch.equal(out, want) and lse.shape == (4, 9)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(found, grads, strict=True))


class OneRank:
    """A group of one: nothing is exchanged, so a peer's attention must be the kernel's."""

    def size(self):
        return 1


def fake_modules(monkeypatch, *names):
    """Made-up modules, their packages included, in place of whatever is installed."""
    tops = {"flash_attn", *(name.split(".")[0] for name in names)}
    for name in [name for name in sys.modules if name.split(".")[0] in tops]:
        monkeypatch.delitem(sys.modules, name)
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return [sys.modules[name] for name in names]


def attention_of_one_rank(name):
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    out = connect(name, OneRank(), CpuFlashKernel(), CPU)((4, 5))(q, k, v)
    return out, FlashCall.apply(q, k, v, packed_pairs((4, 5), CPU), CpuFlashKernel())


def test_deepspeed_adapter_gives_the_local_kernel_whole_documents(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    layer, ops, communication = fake_modules(
        monkeypatch, "deepspeed.sequence.layer", "deepspeed.ops", "deepspeed.comm"
    )

    class DistributedAttention:
        def __init__(self, local_attention, group, scatter_idx, gather_idx):
            assert (scatter_idx, gather_idx) == (2, 1)  # heads and tokens of [batch, tokens, heads, head dim]
            self.local_attention = local_attention

        def __call__(self, q, k, v, batch_dim_idx, rotary, *arguments):
            assert q.dim() == 4 and q.shape[batch_dim_idx] == 1 and rotary is None
            return self.local_attention(q, k, v, *arguments)

    layer.DistributedAttention = DistributedAttention
    started = []
    communication.init_distributed = lambda **options: started.append(options["dist_backend"])
    out, want = attention_of_one_rank("deepspeed")
    assert torch.equal(out, want) and started == ["gloo"] and ops.__compatible_ops__ == {}


def test_ring_adapter_gives_local_edges_and_our_kernel(monkeypatch):
    package, module, *_ = fake_modules(
        monkeypatch, "ring_flash_attn", "ring_flash_attn.zigzag_ring_flash_attn_varlen", "flash_attn",
        "flash_attn.flash_attn_interface",  # the stand-in must not outlive the test
    )
    package.__path__ = []

    def zigzag(q, k, v, edges, longest, *, causal, group):
        assert edges.tolist() == [0, 4, 9] and edges.dtype == torch.int32 and longest == 5 and causal
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        return interface._flash_attn_varlen_forward(q, k, v, edges, edges, longest, longest, 0.0, 8**-0.5, causal)[0]

    module.zigzag_ring_flash_attn_varlen_func = zigzag
    out, want = attention_of_one_rank("ring-flash-attn")
    assert torch.equal(out, want)


FAKE_ULYSSES = '''
import torch
import torch.distributed as dist

SCALE = 1.0


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scatter, gather):
        ctx.way = group, scatter, gather
        parts = [part.contiguous() for part in x.chunk(group.size(), scatter)]
        found = [torch.empty_like(part) for part in parts]
        dist.all_to_all(found, parts, group=group)
        return torch.cat(found, gather)

    @staticmethod
    def backward(ctx, grad):
        group, scatter, gather = ctx.way
        return SCALE * Exchange.apply(grad, group, gather, scatter), None, None, None


def gather_seq_scatter_heads(x, seq_dim, head_dim, group):
    return Exchange.apply(x, group, head_dim, seq_dim)


def gather_heads_scatter_seq(x, head_dim, seq_dim, group):
    return Exchange.apply(x, group, seq_dim, head_dim)
'''
SETTINGS = StepSettings(
    num_ranks=4, num_batches=2, tokens_per_batch=300, max_length=200, capacity_tokens=60, attention="ulysses",
    model="tiny", seed=3, peers=("verl",),
)


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(4)
    yield pool
    pool.close()


def measure_fake(rank, world_size, init_method, folder, given, scale):
    """A made-up verl whose packages cannot be imported: only the one module may be loaded."""
    sys.path.insert(0, folder)
    module = importlib.import_module("benchmarks.peers.adapters")._import_alone("verl.utils.ulysses")
    module.SCALE = scale
    try:
        with few_sweeps():
            measure_rank(given, rank, Path(folder))
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
            del sys.modules[name]


def write_fake(folder):
    package = folder / "verl" / "utils"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").write_text("raise RuntimeError('this package needs too much')")
    (package / "ulysses.py").write_text(FAKE_ULYSSES)


class TestFakePeer:
    def test_runs_the_same_batches_and_is_checked(self, pool, tmp_path):
        write_fake(tmp_path)
        pool.run(measure_fake, str(tmp_path), SETTINGS, 1.0)
        run = from_plain(StepRun, json.loads((tmp_path / "result.json").read_text()), where="result")
        assert run.peers() == ("verl 4",)
        assert [misfit.name for misfit in run.peer_misfits] == ["verl 2"]
        assert "longest sequence" in run.peer_misfits[0].reason
        (check,) = run.peer_checks
        assert check.loss_error < 1e-6 and check.gradient_error < 1e-5 and check.gradients_meant_right
        steps = run.of_peer("verl 4")
        assert [step.num_tokens for step in steps] == [sum(batch) for batch in run.batches]
        assert [step.num_padding_tokens for step in steps] == [-sum(batch) % 4 for batch in run.batches]
        assert all(step.num_microbatches == -(-sum(batch) // 240) for step, batch in zip(
            steps, run.batches, strict=True
        ))
        for step, other in zip(steps, run.of("flexsp"), strict=True):
            assert step.loss == pytest.approx(other.loss, rel=1e-6) and step.measured_s > 0

    def test_wrong_gradients_end_the_run(self, pool, tmp_path):
        write_fake(tmp_path)
        few = dataclasses.replace(SETTINGS, num_ranks=2, num_batches=1, capacity_tokens=100)
        with pytest.raises(AssertionError, match="verl 2: gradients differ from Longhaul's by"):
            pool.run(measure_fake, str(tmp_path), few, 1.01, world_size=2)


def attend(rank, world_size, init_method, name, kind, dtype):
    """Errors of a real peer's output and gradients on this rank, relative to the largest value of each."""
    comm.init_process_group(device=CPU, rank=rank, world_size=world_size, timeout_s=60, init_method=init_method)
    lengths = (24, 8, 40)
    group = comm.new_group(list(range(world_size)), timeout_s=60)
    attention = connect(name, group, CpuFlashKernel(), CPU)(lengths)
    spans = shard_spans(AttentionGroup(kind=kind, ranks=tuple(range(world_size)), sequences=(0, 1, 2)), lengths)[rank]
    edges = (0, 24, 32)
    rows = torch.cat([torch.arange(s.start_token, s.stop_token) + edges[s.sequence] for s in spans])
    torch.manual_seed(0)
    whole = [torch.randn(sum(lengths), heads, 16, dtype=dtype) for heads in (4, 2, 2)]
    dout = torch.randn_like(whole[0])
    exact = [x.double().requires_grad_() for x in whole]
    want = FlashCall.apply(*exact, packed_pairs(lengths, CPU), CpuFlashKernel())
    wanted = (want.detach(), *torch.autograd.grad(want, exact, dout.double()))
    own = [x[rows].requires_grad_() for x in whole]
    out = attention(*own)
    found = (out.detach(), *torch.autograd.grad(out, own, dout[rows]))
    return [float((f.double() - w[rows]).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("name", PEERS)
def test_real_peer_is_exact(pool, name):
    peer = PEERS[name]
    if peer.problem() is not None:
        pytest.skip(f"{peer.problem()}")
    dtypes = [torch.bfloat16] if peer.wrong_gradients else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for errors in pool.run(attend, name, peer.kind, dtype, world_size=4):
            assert max(errors) < (1e-5 if dtype is torch.float32 else 3e-2), (dtype, errors)
