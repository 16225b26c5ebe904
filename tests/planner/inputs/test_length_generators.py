"""Named lengths follow the tables they are made from, and a seed is the same lengths everywhere."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from planner.errors import SpecError
from planner.inputs.length_generators import LengthTable, generate_lengths, length_names, length_table

NUM_DRAWS = 200_000
GITHUB_TOKENS = (34.0, 9.5, 10.4, 10.7, 10.2, 8.8, 6.4, 4.5, 2.6, 1.6, 1.1)
GITHUB_SEQUENCES = (77.7, 10.9, 5.9, 3.1, 1.46, 0.63, 0.23, 0.08, 0.02, 0.007, 0.002)
BYTED_TOKENS = (14.2, 11.4, 7.6, 7.6, 7.6, 7.6, 7.6, 7.6, 7.3, 9.7, 12.1)
BYTED_SEQUENCES = (59.9, 24.1, 8.0, 4.0, 2.0, 1.0, 0.50, 0.25, 0.12, 0.08, 0.05)


def draw(name: str, *, seed: int = 0, num: int = NUM_DRAWS) -> np.ndarray:
    return np.array(list(islice(generate_lengths(name, seed=seed), num)))


# Published quantiles: FlexSP's released Wikipedia lengths; ProLong's documents. Not all of them are knots.
@pytest.mark.parametrize(("name", "published"), [
    ("wikipedia", {0.50: 347, 0.75: 862, 0.90: 2112, 0.95: 3720, 0.99: 10919, 0.999: 37353}),
    ("prolong", {0.01: 678, 0.10: 919, 0.50: 1914, 0.75: 3467, 0.85: 4834, 0.95: 8379, 0.99: 16273, 0.999: 47500}),
])
def test_quantiles(name: str, published: dict[float, int]) -> None:
    drawn = draw(name)
    for share, tokens in published.items():
        # Standard error of a drawn quantile, from the table's own slope there; 5 of them.
        wide = (share * (1 - share) / NUM_DRAWS) ** 0.5
        low, high = (length_table(name).quantile(share + sign * 5 * wide) for sign in (-1, 1))
        assert low <= np.quantile(drawn, share) <= high
        assert length_table(name).quantile(share) == pytest.approx(tokens, rel=0.03)  # 0.01 and 0.85 are no knots


@pytest.mark.parametrize(("upto", "sequences", "tokens"), [
    (1024, 78.81, 24.9), (2048, 89.65, 40.3), (4096, 95.61, 57.0), (8192, 98.40, 72.5), (16384, 99.52, 84.9),
])
def test_wikipedia_shares(upto: int, sequences: float, tokens: float) -> None:
    drawn = draw("wikipedia")
    assert 100 * (drawn <= upto).mean() == pytest.approx(sequences, abs=0.4)
    assert 100 * drawn[drawn <= upto].sum() / drawn.sum() == pytest.approx(tokens, abs=3)


@pytest.mark.parametrize(("name", "tokens", "sequences"), [
    ("github", GITHUB_TOKENS, GITHUB_SEQUENCES), ("byted", BYTED_TOKENS, BYTED_SEQUENCES),
])
def test_bytescale_buckets(name: str, tokens: tuple[float, ...], sequences: tuple[float, ...]) -> None:
    """Exact in the table: shares of sequences from its knots, shares of tokens from the mean of each piece."""
    knots = length_table(name).knots
    pieces = [
        (100 * (stop - start), low if low == high else (high - low) / np.log(high / low))
        for (low, start), (high, stop) in zip(knots, knots[1:], strict=False) if stop > start
    ]
    assert len(pieces) == 11
    total = sum(share * mean for share, mean in pieces)
    for (share, mean), of_tokens, of_sequences in zip(pieces, tokens, sequences, strict=True):
        assert share == pytest.approx(of_sequences, rel=0.2, abs=0.06)
        assert 100 * share * mean / total == pytest.approx(of_tokens, rel=0.03)
    buckets = np.rint(np.log2(draw(name))).astype(int) - 11
    for place in range(5):  # the rare ones vary too much
        assert 100 * (buckets == place).mean() == pytest.approx(pieces[place][0], rel=0.05)


@pytest.mark.parametrize(("name", "mean"), [
    ("wikipedia", 1013.6), ("prolong", 3052), ("github", 4700), ("byted", 8700), ("commoncrawl", 1.9e6 / 512),
])
def test_means(name: str, mean: float) -> None:
    assert length_table(name).mean == pytest.approx(mean, rel=0.025)
    assert draw(name).mean() == pytest.approx(mean, rel=0.08)


def test_every_corpus_is_sound_and_says_where_it_is_from() -> None:
    for name in length_names():
        table = length_table(name)
        lengths, shares = zip(*table.knots, strict=True)
        assert table.name == name and "arXiv" in table.source
        assert list(lengths) == sorted(lengths) and list(shares) == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0) and lengths[0] >= 1
        drawn = draw(name, num=20_000)
        assert table.shortest <= drawn.min() and drawn.max() <= round(lengths[-1])
    assert length_table("commoncrawl").note.startswith("guess") and length_table("byted").note.startswith("guess")
    assert not length_table("prolong").note


def test_a_seed_is_the_same_lengths_and_another_is_not() -> None:
    first = draw("byted", num=10_000)
    assert first[:8].tolist() == draw("byted", num=8).tolist()
    assert (first == draw("byted", num=10_000)).all()
    assert (first != draw("byted", seed=1, num=10_000)).mean() > 0.9
    assert draw("wikipedia", num=6).tolist() == draw("wikipedia", num=5000)[:6].tolist()


def test_equal_knots_are_sequences_of_exactly_that_length() -> None:
    table = LengthTable(name="x", knots=((4, 0.0), (8, 0.5), (64, 0.5), (64, 1.0)), source="")
    assert [table.quantile(share) for share in (0.0, 0.25, 0.5, 0.51, 1.0)] == [4, 6, 8, 64, 64]
    assert table.mean == pytest.approx(0.5 * 4 / np.log(2) + 32)


def test_unknown_names() -> None:
    with pytest.raises(SpecError, match="known: byted, commoncrawl, github"):
        length_table("pile")
