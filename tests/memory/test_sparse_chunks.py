"""SpaCO: the mean over all outcomes is the exact gradient for independent draws, and is not for the published ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.chunked_kv import ChunkStore
from memory.sparse_chunks import ChunkSampler, Sampling, moments
from parallel.kernel import CpuFlashKernel
from planner.plan import AttentionKind
from tests.memory.chunk_cases import (
    SPEC,
    chunked_gradients,
    dense_gradients,
    flat,
    group_of,
    make_model,
    random_documents,
    reader,
)
from trainer.step.chunk_policy import ChunkPolicy

SMALL = dataclasses.replace(SPEC, num_layers=3, ffn_dim=12)
LENGTHS = [17, 2, 9]
IGNORED = frozenset({1})
CHUNK_TOKENS = 6
LOSS_TOKENS = [6, 6, 5, 5, 4]
"""Labelled tokens by chunk: two of chunk 2's and 3's rows belong to the document without loss."""


@dataclasses.dataclass(frozen=True)
class FixedOutcome:
    """A sampler that draws what it is told. ``seen``: the loss tokens it was given."""

    weights: tuple
    seen: list = dataclasses.field(default_factory=list)
    needs_loss_tokens: bool = True

    def draw(self, loss_tokens, key):
        assert len(loss_tokens) == len(self.weights)
        self.seen.append(loss_tokens)
        return self.weights


def sampler(kind, fraction=0.4, seed=5):
    return ChunkSampler(kind=kind, fraction=fraction, seed=seed)


def gradient_of(model, weights, *, kind=AttentionKind.LOCAL, degree=1, lengths=LENGTHS, ignored=IGNORED):
    group = group_of(kind, degree, len(lengths))
    policy = ChunkPolicy(chunk_tokens=CHUNK_TOKENS // degree, sampler=FixedOutcome(weights))
    documents = random_documents(lengths)
    loss, grads = chunked_gradients(model, [group], lengths, policy, reader(documents, ignored), num_ranks=degree)
    return torch.cat([torch.tensor([loss], dtype=torch.float64), flat(grads)])


@pytest.fixture(scope="module")
def model(lone_rank):
    return make_model(SMALL)


@pytest.fixture(scope="module")
def exact(model):
    loss, grads = dense_gradients(model, random_documents(LENGTHS), SMALL, IGNORED)
    return torch.cat([torch.tensor([loss], dtype=torch.float64), flat(grads)])


class TestMean:
    def spread(self, model, kind, **case):
        outcomes = sampler(kind).outcomes(LOSS_TOKENS)
        return moments((gradient_of(model, weights, **case), chance) for weights, chance in outcomes)

    @pytest.mark.parametrize("kind", [Sampling.BERNOULLI, Sampling.IMPORTANCE])
    def test_of_independent_draws_is_the_exact_gradient_and_loss(self, model, exact, kind):
        found = self.spread(model, kind)
        assert ((found.mean - exact).norm() / exact.norm()).item() < 1e-10
        assert found.mean[0].item() == pytest.approx(exact[0].item(), rel=1e-10)
        assert found.variance > 0

    def test_of_the_published_sampling_is_not(self, model, exact):
        found = self.spread(model, Sampling.PUBLISHED)
        assert found.mean[0].item() == pytest.approx(exact[0].item(), rel=1e-10), "paths of one chunk are right"
        assert ((found.mean - exact)[1:].norm() / exact[1:].norm()).item() > 0.01

    @pytest.mark.parametrize("kind", [AttentionKind.ULYSSES, AttentionKind.RING])
    def test_is_exact_in_groups_of_ranks(self, model, kind):
        lengths, documents = [18], random_documents([18])
        wanted = flat(dense_gradients(model, documents, SMALL)[1])
        found = moments(
            (gradient_of(model, weights, kind=kind, degree=2, lengths=lengths, ignored=frozenset())[1:], chance)
            for weights, chance in sampler(Sampling.BERNOULLI).outcomes([6, 6, 6])
        )
        assert ((found.mean - wanted).norm() / wanted.norm()).item() < 1e-10

    def test_everything_selected_with_weight_one_is_seco(self, model, exact):
        (weights, chance), = sampler(Sampling.BERNOULLI, fraction=1.0).outcomes(LOSS_TOKENS)
        assert chance == 1 and ((gradient_of(model, weights) - exact).norm() / exact.norm()).item() < 1e-12


class TestWhatIsLeftOut:
    """Chunks that are not sampled: no backward of theirs, no dK/dV of theirs computed or stored."""

    def test_stores_and_kernels_see_sampled_chunks_only(self, model, monkeypatch):
        written, kernel_keys, light_keys = [], [], []
        add, backward = ChunkStore.add_gradients, CpuFlashKernel.backward
        query_gradient = CpuFlashKernel.query_gradient

        def watched_add(self, layer, rows, *grads):
            written.append((self.num_carried, rows))
            add(self, layer, rows, *grads)

        def watched_backward(self, *arguments):
            kernel_keys.append(sum(stop - start for start, stop in arguments[6].key_rows))
            return backward(self, *arguments)

        def watched_light(*arguments):
            light_keys.append(sum(stop - start for start, stop in arguments[6].key_rows))
            return query_gradient(*arguments)

        monkeypatch.setattr(ChunkStore, "add_gradients", watched_add)
        monkeypatch.setattr(CpuFlashKernel, "backward", watched_backward)
        monkeypatch.setattr(CpuFlashKernel, "query_gradient", staticmethod(watched_light))
        lengths = [36]
        chosen = sampler(Sampling.BERNOULLI).weigh([False, True, False, False, True, False], [6] * 6)
        gradient_of(model, chosen, lengths=lengths, ignored=frozenset())
        layers = SMALL.num_layers
        # chunk 4: itself and chunk 1 with dK/dV, chunks 0, 2 and 3 with dq alone; chunk 1: itself, and 0 with dq alone
        assert sorted(kernel_keys) == sorted([6, 6, 6] * layers)
        assert sorted(light_keys) == sorted([6, 12, 6] * layers)
        assert written == [(6, (0, 6))] * layers, "only chunk 1 carries dK/dV"

    def test_all_ranks_count_the_labels_of_the_whole_chunk(self, model):
        documents, lengths = random_documents(LENGTHS), LENGTHS
        fixed = FixedOutcome(sampler(Sampling.BERNOULLI).weigh([False] * 5, LOSS_TOKENS))
        group, policy = group_of(AttentionKind.RING, 2, 3), ChunkPolicy(chunk_tokens=CHUNK_TOKENS // 2, sampler=fixed)
        chunked_gradients(model, [group], lengths, policy, reader(documents, IGNORED), num_ranks=2)
        assert fixed.seen == [LOSS_TOKENS] * 2

    def test_an_empty_sample_does_nothing(self, model):
        nothing = sampler(Sampling.BERNOULLI).weigh([False] * 5, LOSS_TOKENS)
        assert not gradient_of(model, nothing).any()


class TestDraws:
    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=9), st.floats(0.05, 1.0),
        st.sampled_from([Sampling.BERNOULLI, Sampling.IMPORTANCE]),
    )
    def test_probabilities_add_up(self, loss_tokens, fraction, kind):
        chances = sampler(kind, fraction).probabilities(loss_tokens)
        assert sum(chances) == pytest.approx(fraction * len(loss_tokens)) and all(0 < p <= 1 for p in chances)
        if kind is Sampling.IMPORTANCE:
            order = sorted(range(len(chances)), key=loss_tokens.__getitem__)
            assert all(chances[a] <= chances[b] + 1e-12 for a, b in zip(order, order[1:], strict=False))

    @pytest.mark.parametrize("kind", [Sampling.BERNOULLI, Sampling.IMPORTANCE, Sampling.PUBLISHED])
    def test_outcomes_are_a_distribution_and_draws_follow_it(self, kind):
        drawn = sampler(kind)
        total = sum(chance for _, chance in drawn.outcomes(LOSS_TOKENS))
        assert total == pytest.approx(1)
        rates = torch.tensor([
            [weight.selected for weight in drawn.draw(LOSS_TOKENS, (step, 0, 0))] for step in range(4000)
        ], dtype=torch.float64).mean(0)
        wanted = torch.zeros(5, dtype=torch.float64)
        for weights, chance in drawn.outcomes(LOSS_TOKENS):
            wanted += chance * torch.tensor([float(weight.selected) for weight in weights], dtype=torch.float64)
        assert (rates - wanted).abs().max() < 0.04  # five standard deviations

    def test_a_draw_is_a_function_of_its_key(self):
        drawn = sampler(Sampling.BERNOULLI)
        assert drawn.draw(LOSS_TOKENS, (3, 1, 0)) == drawn.draw(LOSS_TOKENS, (3, 1, 0))
        keys = [(step, batch, first) for step in range(3) for batch in range(3) for first in range(3)]
        assert len({drawn.draw([1] * 30, key) for key in keys}) == len(keys)
        other = sampler(Sampling.BERNOULLI, seed=6)
        assert drawn.draw([1] * 30, (0, 0, 0)) != other.draw([1] * 30, (0, 0, 0))

    def test_published_weights(self):
        drawn = sampler(Sampling.PUBLISHED, fraction=1 / 4).draw([1] * 16, (0,))
        assert sum(weight.selected for weight in drawn) == 4
        assert {(w.loss_weight, w.hop_weight) for w in drawn if w.selected} == {(4.0, 2.0)}

    def test_even_spreads(self):
        drawn = sampler(Sampling.EVEN, fraction=1 / 4).draw([1] * 8, (7,))
        assert [place for place, weight in enumerate(drawn) if weight.selected] == [2, 6]

    def test_descriptions(self):
        assert sampler(Sampling.BERNOULLI, 0.125).describe() == (
            "gradients are estimates (SpaCO, fraction 0.125, bernoulli sampling)"
        )
        assert "biased" in sampler(Sampling.PUBLISHED).describe()


def test_moments():
    found = moments([(torch.tensor([1.0, 0.0]), 0.25), (torch.tensor([5.0, 0.0]), 0.75)])
    assert found.mean.tolist() == [4.0, 0.0] and found.variance == pytest.approx(0.25 * 9 + 0.75 * 1)
