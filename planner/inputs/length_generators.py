"""Sequence lengths of published corpora by name, drawn from quantile tables: ``longhaul plan --lengths wikipedia``.

A corpus is a table of (length in tokens, fraction of sequences that are at most this long). Between two knots the
logarithm of the length is linear in the fraction; two knots of equal length stand for sequences of exactly that length.
Numbers come from numpy's Philox generator, so a name and a seed give the same lengths on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from planner.errors import SpecError

_BLOCK = 4096
_BYTESCALE = "ByteScale (arXiv 2502.21231), figure 4: shares of 11 buckets, put in order again from its labels"
_BYTESCALE_NOTE = (
    "guess: a bucket reaches half an octave to both sides of its label, the last one is all 2M tokens; nothing is "
    "published below 2K tokens"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthTable:
    """One corpus. ``knots``: (tokens, fraction of sequences), both ascending, fractions from 0 to 1. ``note`` starts
    with ``guess`` if something had to be assumed."""

    name: str
    knots: tuple[tuple[float, float], ...]
    source: str
    note: str = ""

    def quantile(self, share: float) -> int:
        """The length in tokens that the fraction ``share`` (0 .. 1) of all sequences does not exceed."""
        for (low, start), (high, stop) in zip(self.knots, self.knots[1:], strict=False):
            if share <= stop and stop > start:
                part = max(0.0, (share - start) / (stop - start))
                return max(1, round(math.exp(math.log(low) + part * math.log(high / low))))
        return round(self.knots[-1][0])

    @property
    def shortest(self) -> int:
        return self.quantile(0.0)

    @property
    def mean(self) -> float:
        """Mean tokens per sequence. The mean of a log-linear piece from a to b is (b - a) / ln(b / a)."""
        pieces = zip(self.knots, self.knots[1:], strict=False)
        return sum(
            (stop - start) * (low if low == high else (high - low) / math.log(high / low))
            for (low, start), (high, stop) in pieces
        )


def length_names() -> tuple[str, ...]:
    return tuple(sorted(_TABLES))


def length_table(name: str) -> LengthTable:
    """Raises SpecError if there is no corpus of this name."""
    if name not in _TABLES:
        raise SpecError(f"no lengths are known by the name {name!r} (known: {', '.join(length_names())})")
    return _TABLES[name]()


def generate_lengths(name: str, *, seed: int = 0) -> Iterator[int]:
    """An endless stream of independent lengths (tokens). Raises SpecError for an unknown name."""
    return _draw(length_table(name), seed)


def _draw(table: LengthTable, seed: int) -> Iterator[int]:
    import numpy as np  # here, so that ``plan --help`` can name the corpora without it

    tokens, shares = np.array(table.knots).T
    logs = np.log(tokens)
    uniform = np.random.Generator(np.random.Philox(seed))
    while True:
        share = uniform.random(_BLOCK)
        upper = np.searchsorted(shares, share, side="right").clip(1, len(shares) - 1)
        start, stop = shares[upper - 1], shares[upper]
        part = (share - start) / np.where(stop > start, stop - start, 1.0)
        drawn = np.exp(logs[upper - 1] + part * (logs[upper] - logs[upper - 1]))
        yield from np.maximum(1, np.rint(drawn)).astype(int).tolist()


def _wikipedia() -> LengthTable:
    return LengthTable(
        name="wikipedia",
        knots=(
            (1, 0.0), (17, 0.001), (39, 0.01), (67, 0.05), (87, 0.10), (121, 0.20), (172, 0.30), (243, 0.40),
            (347, 0.50), (472, 0.60), (685, 0.70), (862, 0.75), (1024, 0.7881), (1464, 0.85), (2112, 0.90),
            (3720, 0.95), (7052, 0.98), (10919, 0.99), (16384, 0.9952), (25000, 0.998), (37353, 0.999),
            (65536, 0.9997), (101537, 0.9999), (192000, 0.99998), (384000, 0.999998), (1823777, 1.0),
        ),
        source="quantiles of the 1,000,000 lengths released with FlexSP (arXiv 2412.01523); below the median and at "
        "0.6, 0.7, 0.85 and 0.98 of the first 100,000",
    )


def _prolong() -> LengthTable:
    return LengthTable(
        name="prolong",
        knots=(
            (575, 0.0), (654, 0.005), (715, 0.02), (801, 0.05), (919, 0.10), (1130, 0.20), (1347, 0.30), (1594, 0.40),
            (1913, 0.50), (2362, 0.60), (3018, 0.70), (4050, 0.80), (6051, 0.90), (8379, 0.95), (12310, 0.98),
            (16273, 0.99), (21393, 0.995), (33207, 0.998), (47500, 0.999), (74890, 0.9995), (145573, 0.9998),
            (240055, 0.9999), (309251, 0.99995), (334921, 0.99998), (340149, 1.0),
        ),
        source="quantiles of 77,932 documents (ProLong lengths published with DistCA, arXiv 2510.18121)",
    )


def _github() -> LengthTable:
    return LengthTable(
        name="github",
        knots=_bucket_knots((34.0, 9.5, 10.4, 10.7, 10.2, 8.8, 6.4, 4.5, 2.6, 1.6, 1.1)),
        source=_BYTESCALE,
        note=f"{_BYTESCALE_NOTE}; of the shares at 512K, 1M and 2M only the sum of 5.3 % is sure",
    )


def _byted() -> LengthTable:
    return LengthTable(
        name="byted",
        knots=_bucket_knots((14.2, 11.4, 7.6, 7.6, 7.6, 7.6, 7.6, 7.6, 7.3, 9.7, 12.1)),
        source=_BYTESCALE,
        note=_BYTESCALE_NOTE,
    )


def _commoncrawl() -> LengthTable:
    stretch = 3.6
    return LengthTable(
        name="commoncrawl",
        knots=tuple((min(stretch * tokens, 2**21), share) for tokens, share in _wikipedia().knots),
        source="FlexSP (arXiv 2412.01523), table 3: 5 to 7 microbatches of 0.34M tokens for a batch of 512 sequences",
        note=f"guess: wikipedia's quantiles times {stretch}, which gives 1.9M tokens a batch; the histogram is not "
        "published",
    )


def _bucket_knots(token_shares: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Knots from each bucket's share of the tokens, with buckets labelled 2K, 4K ... 2M. A bucket's number of sequences
    is proportional to its tokens divided by its label; this reproduces all shares of sequences printed in the
    figure."""
    labels = [2 ** (11 + index) for index in range(len(token_shares))]
    counts = [share / label for share, label in zip(token_shares, labels, strict=True)]
    shares = [count / sum(counts) for count in accumulate(counts)]
    edges = [label * math.sqrt(2) for label in labels[:-1]]
    return (
        (labels[0] / math.sqrt(2), 0.0),
        *zip(edges, shares, strict=False),
        (labels[-1], shares[-2]),
        (labels[-1], 1.0),
    )


_TABLES = {
    "byted": _byted,
    "commoncrawl": _commoncrawl,
    "github": _github,
    "prolong": _prolong,
    "wikipedia": _wikipedia,
}
