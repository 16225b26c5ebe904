"""Which samples a step trains on: a pure function of the seed and the step, the same at any world size.

Every epoch is one permutation of all samples, drawn from a counter-based generator with the key (seed, epoch). Epochs
form one endless stream; each step takes samples from it as long as their lengths fit the step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPosition:
    """Where a step starts: ``offset`` samples into ``epoch``. ``digest``: hash of the stream it belongs to."""

    step: int
    epoch: int
    offset: int
    digest: str


class SampleLedger:
    """The stream of samples, cut into steps. Caches known step boundaries; results do not depend on the cache.

    ``sample_lengths``: tokens per sample [num_samples], each 1 .. ``tokens_per_step``. Raises SpecError otherwise.
    """

    def __init__(self, sample_lengths: npt.NDArray[np.int64], *, seed: int, tokens_per_step: int) -> None:
        lengths = np.array(sample_lengths, dtype=np.int64)
        if not len(lengths):
            raise SpecError("no samples: the corpus is empty")
        if lengths.min() < 1 or lengths.max() > tokens_per_step:
            raise SpecError(f"samples have {lengths.min()} to {lengths.max()} tokens; a step takes samples of 1 to "
                            f"{tokens_per_step} (data.tokens_per_step)")
        if not 0 <= seed < 2**63:
            raise SpecError(f"seed must be in [0, 2**63), got {seed}")
        self._lengths = lengths
        self._seed = seed
        self._tokens_per_step = tokens_per_step
        stream = f"{seed} {tokens_per_step} {len(lengths)} ".encode() + lengths.astype("<i8").tobytes()
        self.digest = hashlib.sha256(stream).hexdigest()
        self._first_known_step = 0
        self._starts = [0]  # stream position where each known step begins; position = epoch * num_samples + offset
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)
        self._totals = np.zeros(1, dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return len(self._lengths)

    def batch(self, step: int) -> tuple[int, ...]:
        """Sample ids of a step (from 0), in order: never empty, never more than ``tokens_per_step`` tokens.

        A batch may continue into the next epoch, so a corpus smaller than a step appears in it more than once.
        """
        position, end = self._start_of(step), self._start_of(step + 1)
        samples: list[int] = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            self._load(epoch)
            taken = min(end - position, self.num_samples - offset)
            samples.extend(self._order[offset:offset + taken].tolist())
            position += taken
        return tuple(samples)

    def position(self, step: int) -> LedgerPosition:
        """Where a step starts, for a checkpoint."""
        epoch, offset = divmod(self._start_of(step), self.num_samples)
        return LedgerPosition(step=step, epoch=epoch, offset=offset, digest=self.digest)

    def restore(self, position: LedgerPosition) -> None:
        """Continue from a saved position without recomputing it. Raises SpecError if it belongs to another stream."""
        if position.digest != self.digest:
            raise SpecError("the checkpoint was made with other data: corpus, tokenizer, run.seed, data.max_length, "
                            "data.over_length and data.tokens_per_step must be the same to resume")
        if position.step < 0 or position.epoch < 0 or not 0 <= position.offset < self.num_samples:
            raise SpecError(f"not a position in this corpus of {self.num_samples} samples: {position}")
        self._first_known_step = position.step
        self._starts = [position.epoch * self.num_samples + position.offset]

    def _start_of(self, step: int) -> int:
        """Stream position of a step's first sample; counts on from the last known step, or from step 0."""
        if step < 0:
            raise IndexError(f"step {step}")
        if step < self._first_known_step:
            self._first_known_step, self._starts = 0, [0]
        while self._first_known_step + len(self._starts) <= step:
            self._starts.append(self._end_after(self._starts[-1]))
        return self._starts[step - self._first_known_step]

    def _end_after(self, start: int) -> int:
        """Stream position after the last sample that fits a step starting at ``start``."""
        position, room = start, self._tokens_per_step
        while True:
            epoch, offset = divmod(position, self.num_samples)
            self._load(epoch)
            last = int(np.searchsorted(self._totals, self._totals[offset] + room, side="right")) - 1
            position += last - offset
            if last < self.num_samples:
                return position
            room -= int(self._totals[last] - self._totals[offset])

    def _load(self, epoch: int) -> None:
        """Compute the order and running token totals of ``epoch``."""
        if epoch == self._epoch:
            return
        key = np.array([self._seed, epoch], dtype=np.uint64)
        # sort raw draws instead of Generator.permutation: numpy guarantees only the raw stream across versions
        draws = np.random.Philox(key=key).random_raw(self.num_samples)
        self._order = np.argsort(draws, kind="stable")
        self._totals = np.concatenate(([0], np.cumsum(self._lengths[self._order])))
        self._epoch = epoch
