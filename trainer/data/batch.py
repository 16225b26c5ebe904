"""Reads the tokens of the spans in a rank's program, and no others."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from planner.plan import Span
from trainer.data.training_data import TrainingData


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Packed inputs of one microbatch on one rank, int64 ``[T]`` each. Positions restart at 0 for each sample."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    labels_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class SpanReader:
    """Reads one step's spans. ``sample_ids[i]`` is the sample behind the step's sequence i."""

    data: TrainingData
    sample_ids: tuple[int, ...]
    device: torch.device

    def __call__(self, spans: tuple[Span, ...]) -> TokenRows:
        """Reads one token beyond each span, which is the label of the span's last row."""
        return token_rows([self._ids(span) for span in spans], spans, self.device)

    def _ids(self, span: Span) -> npt.NDArray[np.int64]:
        samples, sample = self.data.samples, self.sample_ids[span.sequence]
        first = int(samples.start[sample])
        document = int(samples.document[sample])
        return self.data.store.read(document, first + span.start_token, first + span.stop_token + 1)


def token_rows(
    ids: SequenceOf[npt.NDArray[np.int64]], spans: SequenceOf[Span], device: torch.device
) -> TokenRows:
    """Pack spans into rows; ``ids[i]`` holds span i's tokens and the token that follows."""

    def tensor(parts: list[npt.NDArray[np.int64]]) -> torch.Tensor:
        joined = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(joined).to(device)

    return TokenRows(
        tokens_T=tensor([part[:-1] for part in ids]),
        positions_T=tensor([np.arange(span.start_token, span.stop_token) for span in spans]),
        labels_T=tensor([part[1:] for part in ids]),
    )
