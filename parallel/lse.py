"""Partial softmax results and partial gradients, and how to merge them with as few passes over memory as possible.

Shapes: T query rows, N query heads, R key rows, K KV heads, H head dim. Outputs ``out_TNH``, log-sum-exps ``lse_TN``
(natural log, of the scaled scores). Merging is done in at least fp32 whatever the training dtype. A first part that
covers all rows is kept as it is, so a single call over everything costs nothing extra.
"""

from __future__ import annotations

import torch

RowIndex = torch.Tensor | slice


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself for fp32 and fp64."""
    return torch.promote_types(dtype, torch.float32)


def merge_partial(
    out_TNH: torch.Tensor, lse_TN: torch.Tensor, part_TNH: torch.Tensor, part_lse_TN: torch.Tensor
) -> None:
    """Fold a partial result over more keys into the running one, in place.

    The softmax output over the union of two key sets is the mean of the two outputs, weighted by exp(lse): the online
    softmax of Milakov and Gimelshein (arXiv 1805.02867), applied to whole blocks. The weights sum to one, so the mean
    is an interpolation in one pass over the outputs. A row that has seen no keys has lse -inf and so weight 0.
    """
    weight_TN1 = torch.sigmoid(part_lse_TN - lse_TN).unsqueeze(-1)
    out_TNH.lerp_(part_TNH.to(out_TNH.dtype), weight_TN1.to(out_TNH.dtype))
    torch.logaddexp(lse_TN, part_lse_TN, out=lse_TN)


class RunningResult:
    """Output and log-sum-exp of the queries over the keys seen so far. Takes ownership of the parts it is given."""

    def __init__(self, q_TNH: torch.Tensor) -> None:
        self._q_TNH = q_TNH
        self._result: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, rows: RowIndex, part_TNH: torch.Tensor, part_lse_TN: torch.Tensor) -> None:
        """Merge a part for these query rows, each listed at most once."""
        if self._result is None and rows == slice(0, self._q_TNH.shape[0]):
            self._result = part_TNH, part_lse_TN
            return
        out_TNH, lse_TN = self._empty(part_lse_TN.dtype) if self._result is None else self._result
        out_TNH = out_TNH.to(accumulate_dtype(self._q_TNH.dtype))
        out, lse = out_TNH[rows], lse_TN[rows]
        merge_partial(out, lse, part_TNH, part_lse_TN)
        if not isinstance(rows, slice):
            out_TNH[rows], lse_TN[rows] = out, lse
        self._result = out_TNH, lse_TN

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse), out in q's dtype or wider. A row that saw no key has output 0 and lse -inf."""
        return self._empty(accumulate_dtype(self._q_TNH.dtype)) if self._result is None else self._result

    def _empty(self, lse_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q_TNH = self._q_TNH
        lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, dtype=lse_dtype, device=q_TNH.device)
        return torch.zeros_like(q_TNH, dtype=accumulate_dtype(q_TNH.dtype)), lse_TN


class RowSum:
    """Sum of row gradients for a tensor of this shape, in fp32 or wider. Takes ownership of the parts it is given.

    ``like``: a tensor with the device and the dtype of the gradients.
    """

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor) -> None:
        self._shape, self._like = shape, like
        self._total: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """The sum so far; callers may read it or add to it."""
        if self._total is None:
            self._total = self._like.new_zeros(self._shape, dtype=accumulate_dtype(self._like.dtype))
        return self._total

    def add(self, rows: RowIndex, part: torch.Tensor) -> None:
        """Add a part for these rows, each listed at most once."""
        if self._total is None and rows == slice(0, self._shape[0]):
            self._total = part.to(accumulate_dtype(self._like.dtype))
        else:
            add_rows(self.total, rows, part)

    def add_keys_values(self, rows: RowIndex, dk_RKH: torch.Tensor, dv_RKH: torch.Tensor) -> None:
        """Add parts for K and V of these rows of a ``[R, 2, K, H]`` tensor."""
        if self._total is None and rows == slice(0, self._shape[0]):
            self._total = self._like.new_empty(self._shape, dtype=accumulate_dtype(self._like.dtype))
            self._total[:, 0] = dk_RKH
            self._total[:, 1] = dv_RKH
        else:
            add_rows(self.total[:, 0], rows, dk_RKH)
            add_rows(self.total[:, 1], rows, dv_RKH)


def add_rows(total: torch.Tensor, rows: RowIndex, part: torch.Tensor) -> None:
    """Add ``part`` to these rows of ``total`` in place; each row is listed at most once."""
    if isinstance(rows, slice):
        total[rows].add_(part)
    else:
        total.index_add_(0, rows, part.to(total.dtype))
