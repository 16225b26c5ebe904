"""K/V and dK/dV of earlier chunks in a tier: the same bits as in memory, few of them resident, limits are errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory.chunked import cut_chunks, place_rows, schedule_chunks
from memory.chunked_tier import TieredChunkStore
from memory.disk_tier import DiskTier
from memory.ledger import MemoryFullError, MemoryLedger
from memory.sparse_chunks import ChunkSampler, Sampling
from memory.tiers import HostTier
from planner.plan import AttentionKind, Span
from planner.units import MIB
from tests.memory.chunk_cases import (
    CPU,
    KINDS,
    SPEC,
    chunked_gradients,
    dense_gradients,
    group_of,
    make_model,
    random_documents,
    reader,
    worst_error,
)
from trainer.step.chunk_policy import ChunkPolicy

ROW_BYTES = 2 * SPEC.num_kv_heads * SPEC.head_dim * 8
"""Of one layer's K/V, and as much again of dK/dV: float64."""


class LateTier(HostTier):
    """Copies when it is waited for and not before: whoever does not wait, or changes what is under way, gets wrong
    numbers."""

    def _copy(self, lane, target, source, stream):
        return Late(lambda: target.copy_(source))


class Late:
    def __init__(self, copy):
        self.copy = copy

    def wait(self):
        if self.copy is not None:
            self.copy()
            self.copy = None


def make_tier(kind=HostTier, capacity_bytes=4 * MIB):
    ledger = MemoryLedger({"host": capacity_bytes})
    return kind(capacity_bytes, ledger, CPU), ledger


def disk_tier(folder, capacity_bytes=4 * MIB):
    ledger = MemoryLedger({"disk": capacity_bytes})
    return DiskTier(folder / "rank-0.swap", capacity_bytes, ledger), ledger


@pytest.fixture(scope="module")
def model(lone_rank):
    return make_model()


def assert_same_bits(model, group, lengths, policy, tiers):
    """Returns the gradients."""
    read, num_ranks = reader(random_documents(lengths)), group.degree
    loss, wanted = chunked_gradients(model, [group], lengths, policy, read, num_ranks=num_ranks)
    offloads = dataclasses.replace(policy, offloads=True)
    got_loss, got = chunked_gradients(model, [group], lengths, offloads, read, num_ranks=num_ranks, tiers=tiers)
    assert got_loss == loss
    for name, grad in wanted.items():
        assert torch.equal(got[name], grad), name
    return got


class TestExactness:
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), degree=st.integers(1, 3),
        kind=st.sampled_from(KINDS), chunk_tokens=st.integers(1, 12), keep_rows=st.sampled_from([0, 15]),
        fraction=st.sampled_from([None, 0.5]),
    )
    def test_same_bits_as_in_memory(self, model, lengths, degree, kind, chunk_tokens, keep_rows, fraction):
        group = group_of(kind if degree > 1 else AttentionKind.LOCAL, degree, len(lengths))
        sampler = None if fraction is None else ChunkSampler(kind=Sampling.BERNOULLI, fraction=fraction, seed=3)
        policy = ChunkPolicy(chunk_tokens=chunk_tokens, keep_rows=keep_rows, sampler=sampler)
        tiers, ledgers = zip(*(make_tier(LateTier) for _ in range(degree)), strict=True)
        assert_same_bits(model, group, lengths, policy, tiers)
        assert all(ledger.used_bytes("host") == 0 for ledger in ledgers), "places left behind"

    @pytest.mark.parametrize("num_layers", [1, 2, 5])
    def test_more_and_fewer_layers_than_buffers(self, lone_rank, num_layers):
        spec = dataclasses.replace(SPEC, num_layers=num_layers)
        model, lengths, (tier, _) = make_model(spec), [30, 11, 25], make_tier(LateTier)
        got = assert_same_bits(
            model, group_of(AttentionKind.LOCAL, 1, 3), lengths, ChunkPolicy(chunk_tokens=6), [tier]
        )
        assert worst_error(got, dense_gradients(model, random_documents(lengths), spec)[1]) < 1e-12

    def test_on_disk_against_the_dense_model(self, model, tmp_path):
        tier, ledger = disk_tier(tmp_path)
        lengths = [50, 3, 2, 41]  # the last document begins in a chunk of four and goes on over two borders
        got = assert_same_bits(
            model, group_of(AttentionKind.LOCAL, 1, 4), lengths, ChunkPolicy(chunk_tokens=16), [tier]
        )
        assert worst_error(got, dense_gradients(model, random_documents(lengths))[1]) < 1e-12
        assert tier.written_bytes > 0 and tier.read_bytes > 0 and ledger.used_bytes("disk") == 0
        tier.close()


class TestMemory:
    NUM_LAYERS = 12

    def run(self, monkeypatch, sampler=None):
        """(most resident bytes of the store, tier, its peak) over one document of 256 tokens in 16 chunks."""
        spec = dataclasses.replace(SPEC, num_layers=self.NUM_LAYERS)
        model, (tier, ledger), resident = make_model(spec), make_tier(), []
        prepare = TieredChunkStore.prepare

        def watched(store, *arguments):
            prepare(store, *arguments)
            resident.append(store.num_bytes)

        monkeypatch.setattr(TieredChunkStore, "prepare", watched)
        policy = ChunkPolicy(chunk_tokens=16, sampler=sampler, offloads=True)
        group, read = group_of(AttentionKind.LOCAL, 1, 1), reader(random_documents([256]))
        chunked_gradients(model, [group], [256], policy, read, num_ranks=1, tiers=[tier])
        return max(resident), tier, ledger.peak_bytes("host")

    def test_the_tier_holds_all_layers_and_memory_five_layers_halves(self, lone_rank, monkeypatch):
        resident, tier, peak_bytes = self.run(monkeypatch)
        rows = 256 - 16  # nothing reads the last chunk
        assert peak_bytes == 2 * self.NUM_LAYERS * rows * ROW_BYTES
        assert resident <= (2 + 3) * rows * ROW_BYTES + 2 * 16 * ROW_BYTES  # and two chunks' K/V on their way
        kv_bytes = self.NUM_LAYERS * rows * ROW_BYTES
        # K/V once; dK/dV of a chunk again in the backward of every later one
        assert tier.written_bytes == kv_bytes + self.NUM_LAYERS * 16 * ROW_BYTES * (15 * 16 // 2)

    def test_gradients_of_chunks_that_are_not_sampled_are_never_in_the_tier(self, lone_rank, monkeypatch):
        sampler = ChunkSampler(kind=Sampling.EVEN, fraction=1 / 8, seed=0)
        _, tier, peak_bytes = self.run(monkeypatch, sampler)
        early, late = [place for place, weight in enumerate(sampler.draw([16] * 16, (0, 0, 0))) if weight.selected]
        assert early < late
        # K/V of all chunks before the later one, which leaves dK/dV for the earlier one only
        assert peak_bytes == tier.written_bytes == self.NUM_LAYERS * (late + 1) * 16 * ROW_BYTES

    def test_too_small_a_tier_says_need_and_have_before_it_is_written_to(self, model):
        tier, _ = make_tier(capacity_bytes=3 * 24 * ROW_BYTES)
        policy = ChunkPolicy(chunk_tokens=8, offloads=True)
        group, read = group_of(AttentionKind.LOCAL, 1, 1), reader(random_documents([32]))
        with pytest.raises(MemoryFullError, match=r"host: need 18 KiB for K/V of 24 tokens .* have 9 KiB"):
            chunked_gradients(model, [group], [32], policy, read, num_ranks=1, tiers=[tier])
        assert tier.written_bytes == 0


def test_half_precision_gradients_gather_in_fp32():
    chunks = cut_chunks((Span(0, 0, 8),), degree=1, chunk_tokens=4)
    places, _, _ = place_rows(chunks, schedule_chunks(chunks, [True, True]), member=None)
    tier, _ = make_tier()
    store = TieredChunkStore(places, tier, num_layers=1)
    part = torch.full((4, 1, 2), 1.0, dtype=torch.bfloat16)
    store.write(0, (0, 4), part, part)
    store.prepare(0, (0, 4), (0, 4), None)
    for _ in range(1000):
        store.add_gradients(0, (0, 4), part, part)
    dk, dv = store.gradients(0, (0, 4))
    assert dk.dtype == torch.float32 and dk.eq(1000).all() and dv.eq(1000).all()
    store.close()
