"""Tokens of the spans a rank's program names, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from planner.plan import Span
if TYPE_CHECKING:
    from trainer.token_store import SampleIndex, TokenStore


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Packed inputs of one microbatch on one rank, int64 ``[T]`` each. Positions count from each sample's start."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    labels_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class SpanReader:
    """Reads one step's spans. ``sample_ids[i]`` is the sample behind the step's sequence i."""

    store: TokenStore
    samples: SampleIndex
    sample_ids: tuple[int, ...]
    device: torch.device

    def read(self, spans: SequenceOf[Span]) -> TokenRows:
        """Reads one token more than the span: the label of its last row."""
        ids = [self._ids(span) for span in spans]
        return token_rows(ids, spans, self.device)

    def _ids(self, span: Span) -> np.ndarray:
        sample = self.sample_ids[span.sequence]
        start = int(self.samples.start[sample]) + span.start_token
        return self.store.read(int(self.samples.document[sample]), start, start + span.num_tokens + 1)


def token_rows(ids: SequenceOf[np.ndarray], spans: SequenceOf[Span], device: torch.device) -> TokenRows:
    """Pack spans into rows; ``ids[i]`` holds span i's tokens and the one that follows."""

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        joined = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(joined).to(device, non_blocking=True)

    return TokenRows(
        tokens_T=tensor([part[:-1] for part in ids]),
        positions_T=tensor([np.arange(span.start_token, span.stop_token) for span in spans]),
        labels_T=tensor([part[1:] for part in ids]),
    )
