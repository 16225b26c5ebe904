"""The opened data of a run: store, samples, order, and the model shape for the tokenizer. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planner.inputs.model import ModelSpec
from trainer.data.histogram import length_histogram
from trainer.data.ledger import SampleLedger
from trainer.data.token_store import SampleIndex, TokenStore, build_sample_index, open_store
from trainer.settings.tree import TrainConfig, model_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Read access to everything a step needs to know about its samples."""

    store: TokenStore
    samples: SampleIndex
    ledger: SampleLedger
    spec: ModelSpec

    def batch(self, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(sample ids, their tokens) of one step: a function of (seed, step), the same at any world size."""
        ids = self.ledger.batch(step)
        return ids, tuple(int(self.samples.num_tokens[index]) for index in ids)

    def describe(self) -> list[str]:
        """Lines for the log: corpus, samples, length histogram, and the loss of a model that ignores context."""
        entropy = self.store.meta.unigram_entropy_nats
        return [
            *self.store.describe(),
            *self.samples.describe(),
            *length_histogram(self.samples.num_tokens),
            f"corpus: unigram entropy {entropy:.3f} nats per token, the loss of a model that ignores context",
        ]


def open_training_data(config: TrainConfig, cache_root: Path) -> TrainingData:
    """Tokenise the corpus, or find it in the cache, and index it. Raises SpecError."""
    store = open_store(config.data, cache_root)
    over_length = config.data.over_length
    if over_length == "auto":
        over_length = "drop" if config.data.path is None else "split"
    samples = build_sample_index(store.lengths, max_length=config.data.max_length, over_length=over_length)
    ledger = SampleLedger(
        samples.num_tokens, seed=config.run.seed, tokens_per_step=config.data.tokens_per_step
    )
    return TrainingData(
        store=store, samples=samples, ledger=ledger, spec=model_spec(config, vocab_size=store.vocab_size)
    )
