"""The sample ledger: the same batches however, whenever and from wherever they are asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.codec import from_plain, to_plain
from planner.errors import SpecError
from tests.examples import by_day_and_nightly
from trainer.data.ledger import LedgerPosition, SampleLedger

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=25)
SEEDS = st.integers(0, 2**63 - 1)


def ledger(lengths: list[int], seed: int, tokens_per_step: int = 32) -> SampleLedger:
    return SampleLedger(np.array(lengths), seed=seed, tokens_per_step=tokens_per_step)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, SEEDS, st.integers(20, 200))
def test_every_sample_once_per_epoch_and_full_steps(lengths: list[int], seed: int, tokens_per_step: int) -> None:
    num_epochs = 3
    samples = ledger(lengths, seed, tokens_per_step)
    stream: list[int] = []
    batches = []
    while len(stream) < num_epochs * len(lengths):
        batches.append(samples.batch(len(batches)))
        stream.extend(batches[-1])
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * len(lengths):(epoch + 1) * len(lengths)]) == list(range(len(lengths)))
    for batch, following in itertools.pairwise(batches):
        total = sum(lengths[sample] for sample in batch)
        assert batch and total <= tokens_per_step < total + lengths[following[0]]


@by_day_and_nightly(15, 100)
def test_batches_do_not_depend_on_how_they_are_asked(num_examples: int) -> None:
    @settings(deadline=None, max_examples=num_examples)
    @given(LENGTHS, SEEDS, st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 30))
    def check(lengths: list[int], seed: int, steps: list[int], saved_at: int) -> None:
        reference = [ledger(lengths, seed).batch(step) for step in range(31)]
        walking = ledger(lengths, seed)
        assert [walking.batch(step) for step in range(31)] == reference
        jumping = ledger(lengths, seed)
        np.random.seed(0)  # noqa: NPY002
        assert [jumping.batch(step) for step in steps] == [reference[step] for step in steps]
        restored = ledger(lengths, seed)
        restored.restore(walking.position(saved_at))
        assert restored.position(saved_at) == walking.position(saved_at)
        assert [restored.batch(step) for step in (saved_at, *steps)] == [reference[step] for step in (saved_at, *steps)]

    check()


def test_global_random_state_is_neither_used_nor_changed() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    batches = [ledger([3, 5, 7] * 9, 1).batch(step) for step in range(9)]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    assert [ledger([3, 5, 7] * 9, 1).batch(step) for step in range(9)] == batches


def test_order_is_pinned_for_good() -> None:
    """These exact ids: a change of the generator would silently break every resume."""
    samples = ledger([4] * 12, seed=1234, tokens_per_step=16)
    assert [samples.batch(step) for step in range(4)] == [
        (8, 9, 7, 11), (3, 0, 1, 4), (2, 10, 5, 6), (0, 9, 5, 6),
    ]


def test_seeds_and_epochs_differ() -> None:
    orders = [ledger([1] * 50, seed, tokens_per_step=50).batch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_restore_does_not_walk_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [4] * 100
    position = ledger(lengths, 5).position(1000)
    resumed = ledger(lengths, 5)
    loaded: list[int] = []
    load = SampleLedger._load
    monkeypatch.setattr(SampleLedger, "_load", lambda self, epoch: (loaded.append(epoch), load(self, epoch))[1])
    resumed.restore(position)
    assert resumed.batch(1000)
    assert set(loaded) <= {position.epoch, position.epoch + 1}


def test_position_survives_json() -> None:
    position = ledger([1, 2, 3], 5).position(7)
    assert from_plain(LedgerPosition, to_plain(position), where="checkpoint") == position


def test_positions_of_other_data_are_refused() -> None:
    position = ledger([1, 2, 3], 5).position(7)
    others = (ledger([1, 2, 4], 5), ledger([1, 2], 5), ledger([1, 2, 3], 6), ledger([1, 2, 3], 5, 64))
    for other in others:
        with pytest.raises(SpecError, match="must be the same to resume"):
            other.restore(position)
    broken = LedgerPosition(step=7, epoch=0, offset=3, digest=position.digest)
    with pytest.raises(SpecError, match="not a position in this corpus"):
        ledger([1, 2, 3], 5).restore(broken)


@pytest.mark.parametrize(("lengths", "seed"), [([], 1), ([33], 1), ([0, 3], 1), ([3], -1), ([3], 2**63)])
def test_impossible_ledgers(lengths: list[int], seed: int) -> None:
    with pytest.raises(SpecError):
        SampleLedger(np.array(lengths, dtype=np.int64), seed=seed, tokens_per_step=32)


def test_a_large_corpus_is_quick() -> None:
    samples = SampleLedger(np.full(200_000, 100), seed=1, tokens_per_step=10_000)
    assert sum(len(samples.batch(step)) for step in range(4000)) == 400_000  # two epochs of 100-sample steps
