"""SpaCO: backward through a sample of the chunks, weighted so that the expected gradient is right.

The gradient is a sum over paths: from the loss of a chunk through K/V of ever earlier chunks to a parameter. A path
counts if every chunk on it was sampled. Each chunk's backward multiplies its loss by ``loss_weight`` and the dK/dV that
later chunks accumulated for it by ``hop_weight``, so a path is weighted with the product over its chunks.

``bernoulli``, ``importance``: chunks are drawn independently, chunk i with probability p_i > 0; both weights are
1 / p_i. The expected weight of every path is then 1, so the expected gradient is the exact gradient. The expected
parameter update may still differ, because gradient clipping and Adam are not linear in the gradient.
``published``: the method of the paper (arXiv 2505.16710, sections 4 and 6.4): t of k chunks without replacement,
weights k / t, and hop weights at most 2. Drawing one chunk makes the others less likely, and the cap gives long paths
less weight: its expected gradient is *not* the gradient. It is included for comparison.
``even``: every n-th chunk, always the same ones. It estimates nothing; it serves to measure time and memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import StrEnum

import torch

_HOP_CAP = 2.0
_UNIFORM_SHARE = 0.5
"""Share of importance weights that is equal for all chunks. Chunks without loss tokens lie on paths too, so no chunk
may become unlikely."""


class Sampling(StrEnum):
    """How chunks are drawn."""

    BERNOULLI = "bernoulli"
    IMPORTANCE = "importance"
    PUBLISHED = "published"
    EVEN = "even"

    @property
    def is_unbiased(self) -> bool:
        return self in (Sampling.BERNOULLI, Sampling.IMPORTANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWeight:
    """One chunk: whether its backward runs, and the factors of its loss and of the gradients carried for it."""

    selected: bool
    loss_weight: float = 1.0
    hop_weight: float = 1.0


EXACT = ChunkWeight(selected=True)
"""SeCO: every chunk runs, nothing is scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSampler:
    """Draws chunks. ``fraction``: expected share of chunks drawn, in (0, 1]. ``seed``: the run's seed."""

    kind: Sampling
    fraction: float
    seed: int

    @property
    def needs_loss_tokens(self) -> bool:
        """Whether draws depend on the number of labelled tokens per chunk."""
        return self.kind is Sampling.IMPORTANCE

    def draw(self, loss_tokens: SequenceOf[int], key: tuple[int, ...]) -> tuple[ChunkWeight, ...]:
        """Weights by chunk: a pure function of the seed, ``key`` (identifies the group within the run) and
        ``loss_tokens[i]``, the labelled tokens of chunk i (ignored unless ``needs_loss_tokens``). All ranks of a group
        draw the same chunks.
        """
        uniforms = [_uniform(self.seed, *key, chunk) for chunk in range(len(loss_tokens))]
        if self.kind.is_unbiased:
            chances = self.probabilities(loss_tokens)
            return self.weigh([each < chance for each, chance in zip(uniforms, chances, strict=True)], loss_tokens)
        size, total = self._fixed_size(len(loss_tokens)), len(loss_tokens)
        if self.kind is Sampling.EVEN:
            chosen = {total * (2 * place + 1) // (2 * size) for place in range(size)}
        else:
            chosen = set(sorted(range(total), key=uniforms.__getitem__)[:size])
        return self.weigh([chunk in chosen for chunk in range(total)], loss_tokens)

    def probabilities(self, loss_tokens: SequenceOf[int]) -> tuple[float, ...]:
        """Probability of drawing each chunk, 0 < p <= 1; the sum is ``fraction`` times the number of chunks.

        ``importance``: half of the weight is equal for all chunks, half is proportional to their loss tokens.
        """
        total = sum(loss_tokens)
        if self.kind is not Sampling.IMPORTANCE or not total:
            return (self.fraction,) * len(loss_tokens)
        shares = [_UNIFORM_SHARE / len(loss_tokens) + (1 - _UNIFORM_SHARE) * n / total for n in loss_tokens]
        return _capped(shares, self.fraction * len(loss_tokens))

    def weigh(self, selected: SequenceOf[bool], loss_tokens: SequenceOf[int]) -> tuple[ChunkWeight, ...]:
        """The weights for this outcome of the draw."""
        if self.kind.is_unbiased:
            factors = [(1 / p, 1 / p) for p in self.probabilities(loss_tokens)]
        else:
            size = self._fixed_size(len(selected))
            factor = len(selected) / size if size else 1.0
            factors = [(factor, min(factor, _HOP_CAP))] * len(selected)
        return tuple(
            ChunkWeight(selected=chosen, loss_weight=loss if chosen else 0.0, hop_weight=hop if chosen else 0.0)
            for chosen, (loss, hop) in zip(selected, factors, strict=True)
        )

    def outcomes(self, loss_tokens: SequenceOf[int]) -> Iterator[tuple[tuple[ChunkWeight, ...], float]]:
        """Every outcome of 2^k with its probability, for tests and for measuring variance on small cases."""
        total = len(loss_tokens)
        chances, size = self.probabilities(loss_tokens), self._fixed_size(total)
        for selected in itertools.product((False, True), repeat=total):
            if self.kind.is_unbiased:
                chance = math.prod(p if on else 1 - p for p, on in zip(chances, selected, strict=True))
            elif self.kind is Sampling.PUBLISHED:
                chance = 1 / math.comb(total, size) if sum(selected) == size else 0.0
            else:
                raise ValueError(f"sampling {self.kind} draws nothing")
            if chance > 0:
                yield self.weigh(selected, loss_tokens), chance

    def describe(self) -> str:
        """One line for users about how exact the gradients are."""
        biased = "" if self.kind.is_unbiased else ", biased"
        return f"gradients are estimates (SpaCO, fraction {self.fraction:g}, {self.kind} sampling{biased})"

    def _fixed_size(self, num_chunks: int) -> int:
        return min(num_chunks, max(1, round(self.fraction * num_chunks)))


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean of a random vector, and the sum of its components' variances."""

    mean: torch.Tensor
    variance: float


def moments(outcomes: Iterable[tuple[torch.Tensor, float]]) -> Moments:
    """Mean and variance of a vector from (value, probability) pairs whose probabilities sum to 1; in float64."""
    pairs = [(value.to(torch.float64), chance) for value, chance in outcomes]
    mean = torch.stack([value * chance for value, chance in pairs]).sum(0)
    return Moments(mean, sum(chance * float((value - mean).square().sum()) for value, chance in pairs))


def _uniform(*key: int) -> float:
    """A number in [0, 1) that depends only on ``key``, so it is the same on every rank and machine."""
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float, never 1


def _capped(shares: SequenceOf[float], total: float) -> tuple[float, ...]:
    """Values proportional to ``shares``, none above 1, that sum to ``total`` (at most their number). What is cut from
    capped values goes to the others."""
    capped: set[int] = set()
    while True:
        free = sum(share for place, share in enumerate(shares) if place not in capped)
        scale = (total - len(capped)) / free if free else 0.0
        above = {place for place, share in enumerate(shares) if place not in capped and share * scale >= 1.0}
        if not above:
            return tuple(1.0 if place in capped else share * scale for place, share in enumerate(shares))
        capped |= above
