"""Chunked head and loss against torch's own, in float64: value and both gradients, split vocabulary included."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from memory.chunked_loss import IGNORE, VocabShard, chunked_token_loss
from tests.ranks import run_threads


def whole_vocab(size):
    return VocabShard(start=0, valid_size=size, reduce_max=lambda x: x, reduce_sum=lambda x: x)


class ThreadReduce:
    """Sum and maximum over threads, for a vocabulary split over tensor ranks."""

    def __init__(self, num_ranks):
        self.barrier = threading.Barrier(num_ranks)
        self.parts = [None] * num_ranks

    def over(self, rank, combine):
        def reduce(tensor):
            self.parts[rank] = tensor.clone()
            self.barrier.wait(timeout=30)
            tensor.copy_(combine(torch.stack(self.parts)))
            self.barrier.wait(timeout=30)
            return tensor

        return reduce


def make_case(num_tokens, vocab, ignored, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = IGNORE
    return hidden, weight, labels


def reference(hidden, weight, labels):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = functional.cross_entropy(leaves[0] @ leaves[1].T, labels, ignore_index=IGNORE, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * 0.37, leaves)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 25), st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0]))
def test_equals_torch(num_tokens, chunk_tokens, vocab, ignored):
    hidden, weight, labels = make_case(num_tokens, vocab, ignored)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = chunked_token_loss(*leaves, labels, shard=whole_vocab(vocab), chunk_tokens=chunk_tokens)
    got = (loss.detach(), *torch.autograd.grad(loss * 0.37, leaves))
    for ours, wanted in zip(got, reference(hidden, weight, labels), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_vocabulary_split_over_tensor_ranks_with_padding(num_ranks):
    vocab, padded = 10, 12
    hidden, weight, labels = make_case(17, vocab, 0.2)
    wanted = reference(hidden, weight, labels)
    sums, highs = ThreadReduce(num_ranks), ThreadReduce(num_ranks)
    slices = functional.pad(weight, (0, 0, 0, padded - vocab)).chunk(num_ranks)

    def rank_main(rank):
        leaves = [hidden.clone().requires_grad_(), slices[rank].clone().requires_grad_()]
        shard = VocabShard(
            start=rank * padded // num_ranks, valid_size=vocab,
            reduce_max=highs.over(rank, lambda parts: parts.amax(0)), reduce_sum=sums.over(rank, lambda p: p.sum(0)),
        )
        loss = chunked_token_loss(*leaves, labels, shard=shard, chunk_tokens=5)
        return loss.detach(), *torch.autograd.grad(loss * 0.37, leaves)

    results = run_threads(num_ranks, rank_main)
    for loss, dhidden, _ in results:
        torch.testing.assert_close(loss, wanted[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dhidden, wanted[1], rtol=1e-12, atol=1e-12)
    dweight = torch.cat([part for _, _, part in results])
    torch.testing.assert_close(dweight[:vocab], wanted[2], rtol=1e-12, atol=1e-12)
    assert not dweight[vocab:].any(), "padded vocabulary rows must get no gradient"
